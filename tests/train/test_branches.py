"""Runs as branches of one step: each has the bits that it has alone; checkpoints go over between the forms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse.train.config import RunConfig, is_own
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.throughput import DataFacts, measure_rate
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.checkpoints import OptimizerStates
from ncollapse.train.training.lane import Lane
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")


class Drawing(nn.Module):
    """Draws random numbers in its forward pass, and counts in a buffer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.drop, self.head = nn.Linear(64, 16), nn.Dropout(0.3), nn.Linear(16, num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.hidden(x.flatten(1)).relu()))


class Noisy(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param += 1e-3 * torch.randn_like(param)


class Averaged(torch.optim.SGD):
    """Evaluates other parameters than it trains, as schedule-free optimizers do, and does not get them back exactly."""

    def train(self) -> None:
        self._scale(1.1)

    def eval(self) -> None:
        self._scale(1 / 1.1)

    @torch.no_grad()
    def _scale(self, factor: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param *= factor


def margin(weight: Tensor, stats: Any, logits: Tensor) -> float:
    """Mean of the largest logit, with noise."""
    return float(logits.max(1).values.mean() + torch.randn(()))


GIVEN: dict[str, Any] = {
    "model": {"drawing": Drawing}, "optimizer": {"noisy": Noisy, "averaged": Averaged}, "metric": {"margin": margin},
}  # fmt: skip
PLUGINS = Plugins(given=GIVEN)


def run_of(**settings: Any) -> RunConfig:
    given = {"limit": 64, "batch_size": 24, "epochs": 4, "eval_every": 2, **settings}
    named = {name: given[name] for name in ("model", "optimizer") if name in given and is_own(name, given[name])}
    return RunConfig(code=PLUGINS.code_of(named), **given)


def runs_of(*each: dict[str, Any], **shared: Any) -> list[RunConfig]:
    return [run_of(**shared | one) for one in each]


def events(training: Training) -> list[Evaluation]:
    return [event for event in training if isinstance(event, Evaluation)]


def of_run(evaluations: list[Evaluation], i: int) -> list[tuple[Any, ...]]:
    """Return everything that is evaluated of a run, as text: NaN equals NaN there."""
    found = []
    for event in evaluations:
        if i in event.rows:
            at = event.rows.index(i)
            values = {name: column[at] for name, column in event.values.items()}
            layers = {name: {n: c[at] for n, c in of.items()} for name, of in event.layers.items()}
            end = event.ended.get(i)
            status = None if end is None else (end.status, end.diverged_epoch)
            found.append(
                (event.epoch, repr(values), repr(layers), status, event.weights.get(i), event.snapshots.get(i))
            )
    return found


CASES: dict[str, tuple[list[RunConfig], tuple[str, ...]]] = {
    "cnn": (
        runs_of(
            {"optimizer": "sgd", "lr": 0.05}, {"optimizer": "adamw", "lr": 3e-3}, {"optimizer": "signum", "seed": 1},
            model="cnn", layers="all", lr=1e-3,
        ), (),
    ),
    "bfloat16, augmented, seeds": (
        runs_of({"seed": 0}, {"seed": 3, "lr": 0.02}, model="cnn", precision="bf16", augment="flip-crop", lr=0.05), (),
    ),
    "batch norm": (
        runs_of({}, {"lr": 0.02, "seed": 2}, model="resnet9", width=4, lr=0.05, epochs=2, batch_size=32), (),
    ),
    "mlp of one seed": (runs_of({"optimizer": "muonw"}, {"optimizer": "muon", "lr": 0.01}, lr=1e-3), ()),
    "diverging, of other lengths": (
        runs_of({"lr": 1e6}, {"epochs": 2}, {"epochs": 3, "eval_every": 3}, model="cnn", optimizer="sgd", lr=0.05), (),
    ),
    "a model that draws": (runs_of({}, {"seed": 1}, model="drawing", lr=0.05), ("margin",)),
    "optimizers that draw": (runs_of({}, {"seed": 1}, model="drawing", optimizer="noisy", lr=0.05), ()),
    "parameters to evaluate": (runs_of({}, {"eval_every": 1}, optimizer="averaged", lr=0.05), ()),
    "torch's": (runs_of({}, {"lr": 1e-3}, optimizer="torch.optim:NAdam", model="cnn", precision="bf16", lr=3e-3), ()),
}  # fmt: skip


@pytest.mark.parametrize(("runs", "metrics"), CASES.values(), ids=CASES)
def test_a_branch_has_the_bits_of_the_run_alone(
    runs: list[RunConfig], metrics: tuple[str, ...], digits: Dataset
) -> None:
    options: dict[str, Any] = {"plugins": PLUGINS, "metrics": metrics, "keep_weights": True}
    together = events(Training(runs, digits, CPU, branches=True, **options))
    for i, run in enumerate(runs):
        assert of_run(together, i) == of_run(events(Training([run], digits, CPU, **options)), 0), run.describe()


@pytest.mark.parametrize("case", ["cnn", "bfloat16, augmented, seeds", "batch norm", "diverging, of other lengths"])
def test_a_checkpoint_continues_in_its_form_bit_for_bit(case: str, digits: Dataset) -> None:
    runs, _ = CASES[case]
    whole, kept = Training(runs, digits, CPU, branches=True), b""
    expected = []
    for event in whole:
        if isinstance(event, Evaluation):
            expected.append(event)
        elif event == 1:
            kept = whole.checkpoint()
    resumed = events(Training(runs, digits, CPU, branches=True, checkpoint=kept))
    for i in range(len(runs)):
        assert of_run(resumed, i) == [one for one in of_run(expected, i) if one[0] > 1]


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("case", ["cnn", "mlp of one seed", "torch's"])
def test_a_checkpoint_continues_in_the_other_form_up_to_rounding(case: str, branches: bool, digits: Dataset) -> None:
    """Both the states that only some rules keep, and the number of steps, go over."""
    runs, _ = CASES[case]
    whole, kept, expected = Training(runs, digits, CPU, branches=branches, plugins=PLUGINS), b"", []
    for event in whole:
        if isinstance(event, Evaluation):
            expected.append(event)
        elif event == 2:
            kept = whole.checkpoint()
    *_, last = events(Training(runs, digits, CPU, branches=not branches, plugins=PLUGINS, checkpoint=kept))
    for name in ("train_loss", "weight_norm", "nc0"):
        assert last.values[name] == pytest.approx(expected[-1].values[name], rel=2e-3), name


def test_a_checkpoint_of_branches_that_remain_continues(digits: Dataset) -> None:
    """After a run has left: the rows of the others are theirs."""
    runs, _ = CASES["diverging, of other lengths"]
    whole, kept, expected = Training(runs, digits, CPU, branches=True), b"", []
    for event in whole:
        if isinstance(event, Evaluation):
            expected.append(event)
        elif event == 2:
            kept = whole.checkpoint()
    assert [lane.stack.runs for lane in whole._step.lanes] == [1]
    resumed = events(Training(runs, digits, CPU, branches=True, checkpoint=kept))
    assert of_run(resumed, 2) == of_run(expected, 2)[1:]


def test_states_of_some_rules_are_zero_for_the_others() -> None:
    one, two = torch.ones(1, 3), torch.full((1, 3), 2.0)
    sgd = OptimizerStates({0: {"exp_avg": one}})
    adam = OptimizerStates({0: {"exp_avg": two, "exp_avg_sq": two, "step": torch.tensor(7.0)}})
    joined = OptimizerStates.joined([sgd, adam]).stacked[0]
    assert {name: value.tolist() for name, value in joined.items()} == {
        "exp_avg": [[1.0] * 3, [2.0] * 3], "exp_avg_sq": [[0.0] * 3, [2.0] * 3], "step": 7.0,
    }  # fmt: skip
    assert OptimizerStates.joined([sgd]) is sgd


def test_branches_share_the_images_that_crops_need(digits: Dataset) -> None:
    runs, _ = CASES["bfloat16, augmented, seeds"]
    first, second = Training(runs, digits, CPU, branches=True)._step.lanes
    assert first.samples is second.samples


def test_branches_are_measured_and_may_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    key, facts = StackKey.of(RunConfig(model="cnn", augment="flip-crop")), DataFacts((1, 8, 8), 10, 1437, "")
    rate = measure_rate(key, facts, 2, CPU, branches=True, quick=True)
    assert rate is not None
    assert rate.steps > 0

    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Lane, "gradients", exhausted)
    assert measure_rate(key, facts, 2, CPU, branches=True) is None
