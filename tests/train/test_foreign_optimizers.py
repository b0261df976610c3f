"""Optimizers that are not ncollapse's: as in a plain loop, in a stack as alone, resumed, refused before they train."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.errors import CheckpointError, OwnCodeError, UserError
from ncollapse.train.networks.models import build
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.checkpoints import OptimizerStates, read_state, write_state
from ncollapse.train.training.foreign import check_optimizers, load_exactly, make_foreign
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")


class Noisy(torch.optim.SGD):
    """SGD with noise from the global generator."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.add_(torch.randn_like(param), alpha=0.1 * group["lr"])


class Nested(torch.optim.Optimizer):
    """Its state has lists, with empty ones and None, float64 and texts, as SOAP's; and its group a number."""

    def __init__(
        self, params: Any, lr: float = 0.1, betas: tuple[float, float] = (0.8, 0.95), eps: float = 1e-6
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "d": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["d"] *= 1.01  # as Prodigy's
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["Q"] = [torch.zeros(param.shape, dtype=torch.float64), [], None]
                    state["count"], state["kind"] = torch.zeros((), dtype=torch.int64), "nested"
                state["count"] += 1
                state["Q"][0].mul_(group["betas"][0]).add_(param.grad.double())
                # A gradient and a parameter must allow a view, as most optimizers need.
                step = (
                    state["Q"][0].float().view(len(param), -1)
                    / (param.grad.view(len(param), -1).abs() + group["eps"]).sqrt()
                )
                param.sub_((0.01 * group["lr"] * group["d"] * step / state["count"].sqrt()).view(param.shape))


class Averaged(torch.optim.SGD):
    """Trains other weights than those that it evaluates, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay)
        for group in self.param_groups:
            group["training"] = False

    def train(self) -> None:
        self._to(True, 0.9)

    def eval(self) -> None:
        self._to(False, 1 / 0.9)

    def _to(self, training: bool, factor: float) -> None:
        for group in self.param_groups:
            for param in group["params"] if group["training"] != training else ():
                param.data = param.data * factor  # other memory, as some optimizers assign
            group["training"] = training

    def step(self, closure: Any = None) -> None:
        assert all(group["training"] for group in self.param_groups)
        super().step(closure)


OWN: dict[str, Any] = {"noisy": Noisy, "nested": Nested, "averaged": Averaged}
PLUGINS = Plugins(given={"optimizer": OWN})


def run_of(optimizer: str, **settings: Any) -> RunConfig:
    settings = {"model": "cnn", "width": 5, "lr": 0.01, "epochs": 3, "limit": 200, "eval_every": 1} | settings
    code = "" if ":" in optimizer else f"optimizer {optimizer}=1"
    return RunConfig(optimizer=optimizer, code=code, **settings)


def trained(runs: list[RunConfig], data: Dataset, checkpoint: bytes | None = None) -> tuple[Training, list[Evaluation]]:
    training = Training(runs, data, CPU, checkpoint=checkpoint, plugins=PLUGINS)
    return training, [event for event in training if isinstance(event, Evaluation)]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_trains_as_a_plain_loop_does(model: str, digits: Dataset) -> None:
    run = run_of(
        "torch.optim:AdamW", model=model, width=9, weight_decay=0.1, momentum=0.8, beta2=0.99, eps=1e-6, seed=4
    )
    training, _ = trained([run, dataclasses.replace(run, lr=0.02)], digits)
    plain_model = build(model, 1, 8, 10, seed=4, width=9)
    plain = torch.optim.AdamW(plain_model.parameters(), lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
    order = torch.Generator().manual_seed(4)
    for epoch in range(3):
        plain.param_groups[0]["lr"] = 0.01 * 0.1**epoch
        for batch in torch.randperm(200, generator=order).split(128):
            plain.zero_grad()
            F.cross_entropy(plain_model(digits.train_x[batch]), digits.train_y[batch]).backward()
            plain.step()
    for name, value in plain_model.state_dict().items():
        torch.testing.assert_close(training.stack.state_dict(0)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [*OWN, "torch.optim:Adam"])
def test_a_run_in_a_stack_is_the_run_alone(optimizer: str, precision: str, digits: Dataset) -> None:
    """Also where it draws random numbers; runs that end earlier, and another optimizer, do not matter."""
    runs = [run_of(optimizer, seed=seed, epochs=3 - seed, precision=precision) for seed in range(2)]
    runs.append(run_of("torch.optim:SGD", seed=2, epochs=1, precision=precision))
    together, events = trained(runs, digits)
    assert together.stack.runs == 1  # the others have been removed
    of_alone, alone = trained(runs[:1], digits)
    bound = 1e-5 if precision == "fp32" else 0.02
    for name, theirs in of_alone.stack.state_dict(0).items():
        torch.testing.assert_close(together.stack.state_dict(0)[name], theirs, rtol=bound, atol=bound)
    for one, other in zip(events, alone, strict=True):
        assert one.values["train_loss"][0] == pytest.approx(other.values["train_loss"][0], rel=bound)


def assert_resumes(runs: list[RunConfig], data: Dataset, plugins: Plugins) -> None:
    """A training that continues from each of its checkpoints has the same bits as the one that made them."""
    whole, contents, expected = Training(runs, data, CPU, plugins=plugins), [], []
    for event in whole:
        if isinstance(event, Evaluation):
            expected.append(event.values)
        else:
            contents.append(whole.checkpoint())
    for epoch, content in enumerate(contents[:-1], start=1):
        resumed = Training(runs, data, CPU, checkpoint=content, plugins=plugins)
        values = [event.values for event in resumed if isinstance(event, Evaluation)]
        assert repr(values) == repr(expected[epoch + 1 :])
        for name, value in whole.stack.tensors().items():
            assert torch.equal(resumed.stack.tensors()[name], value), name


@pytest.mark.parametrize("optimizer", [*OWN, "torch.optim:Adam"])
def test_a_resumed_run_has_the_same_bits(optimizer: str, digits: Dataset) -> None:
    assert_resumes([run_of(optimizer), run_of(optimizer, lr=0.02, seed=1, epochs=2)], digits, PLUGINS)


def test_schedule_free_optimizers_are_evaluated_at_their_average(digits: Dataset) -> None:
    """The average is here 1/0.9 of what is trained."""
    training = Training([run_of("averaged", epochs=1)], digits, CPU, plugins=PLUGINS, keep_weights=True)
    first, last = (event for event in training if isinstance(event, Evaluation))
    start = build("cnn", 1, 8, 10, 0, width=5).fc.weight.norm().item()
    assert first.values["weight_norm"][0] == pytest.approx(start, rel=1e-5)
    assert last.values["weight_norm"][0] == pytest.approx(training.stack.weight[0].norm().item(), rel=1e-6)
    assert set(last.weights) == {0}


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("SOAP", {"lr": 3e-3, "optimizer_options": {"precondition_frequency": 2}}),
        ("Shampoo", {"lr": 0.1}),
        ("MARS", {"lr": 3e-3}),
        ("ScheduleFreeAdamW", {"lr": 3e-3}),
        ("Prodigy", {"lr": 1.0}),
    ],
)
def test_optimizers_of_another_package_train_and_resume(
    optimizer: str, settings: dict[str, Any], digits: Dataset
) -> None:
    pytest.importorskip("pytorch_optimizer")
    run = run_of(f"pytorch_optimizer:{optimizer}", batch_size=20, **settings)
    runs = [run, dataclasses.replace(run, seed=1, weight_decay=0.1)]
    check_optimizers(runs, Plugins())
    assert_resumes(runs, digits, Plugins())


class Fails(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if any(not bool(p.isfinite().all()) for p in self.param_groups[0]["params"]):
            raise ArithmeticError("not finite")
        if self.param_groups[0]["lr"] < 0.02:
            raise RuntimeError("too small a step")


def test_an_error_names_its_run(digits: Dataset) -> None:
    plugins = Plugins(given={"optimizer": {"fails": Fails}})
    runs = [run_of("fails", lr=lr, lr_drops=0) for lr in (0.1, 0.01)]
    training = Training(runs, digits, CPU, plugins=plugins)
    with pytest.raises(
        OwnCodeError, match=r"optimizer fails: test_foreign_optimizers.py, line \d+: .*too small"
    ) as raised:
        list(training)
    assert raised.value.run == runs[1].id
    assert "Traceback" in raised.value.log


def test_a_run_that_diverges_is_no_error_of_its_optimizer(digits: Dataset) -> None:
    plugins = Plugins(given={"optimizer": {"fails": Fails}})
    runs = [run_of("fails", lr=lr, lr_drops=0) for lr in (0.1, 1e30)]
    events = [e for e in Training(runs, digits, CPU, plugins=plugins) if isinstance(e, Evaluation)]
    ended = {i: end.status for event in events for i, end in event.ended.items()}
    assert ended == {0: "done", 1: "diverged"}


def test_the_global_generators_stay_as_they_were(digits: Dataset) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index, union-attr]
    trained([run_of("noisy", epochs=1), run_of("noisy", epochs=1, lr=0.1)], digits)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert random.getstate() == before[2]


class Forgets(torch.optim.SGD):
    """Counts its steps where a checkpoint does not find it."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        self.param_groups[0]["lr"] = 0.1 / self.count
        super().step(closure)


class Keeps(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.param_groups[0]["kept"] = Path()


class Needs(torch.optim.SGD):
    def __init__(self, params: Any, rho: float, lr: float = 0.1) -> None:
        super().__init__(params, lr)


class Closure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class TakesAll(torch.optim.AdamW):
    def __init__(self, params: Any, scale: float = 1.0, **others: Any) -> None:
        super().__init__(params, **others)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (nn.Linear, [{}], "is no torch.optim.Optimizer"),
        (lambda params, lr: nn.Identity(), [{}], "makes a Identity"),
        (Forgets, [{}], "continues from its own state_dict with other numbers"),
        (Keeps, [{}], "keeps PosixPath in its state"),
        (Needs, [{}], "needs rho: give it in optimizer_options"),
        (Closure, [{}], "its step needs a closure"),
        (torch.optim.LBFGS, [{}], "its step needs a closure"),
        (torch.optim.SparseAdam, [{}], "cannot take a step .* does not support dense gradients"),
        (torch.optim.Adagrad, [{}, {"momentum": 0.5}], r"momentum differs .* \(0.5, 0.9\), but it takes no"),
        (torch.optim.SGD, [{}, {"eps": 0.5}], "eps differs among its runs .* but it takes no eps"),
        (torch.optim.SGD, [{}, {"beta2": 0.5}], "beta2 differs among its runs"),
        (torch.optim.SGD, [{"optimizer_options": {"nesterv": True}}], "has no option 'nesterv'; it has dampening"),
        (TakesAll, [{"optimizer_options": {"amsgrat": True}}], "has no option 'amsgrat'; it has scale, betas"),
        (torch.optim.SGD, [{"optimizer_options": {"lr": 1}}], "lr is a setting of the run"),
        (torch.optim.Adam, [{"optimizer_options": {"betas": [0.5, 1.5]}}], "Invalid beta parameter at index 1: 1.5"),
        (torch.optim.Adam, [{"optimizer_options": {"betas": [0, 0]}, "momentum": momentum} for momentum in (0.5, 0.6)],
         "momentum differs among its runs .* but optimizer_options give betas"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_train_is_refused(make: Any, settings: list[dict[str, Any]], message: str) -> None:
    plugins = Plugins(given={"optimizer": {"mine": make}})
    with pytest.raises(UserError, match=f"(?s)optimizer(_options of)? mine.*{message}"):
        check_optimizers([run_of("mine", **each) for each in settings], plugins)


def made(make: Callable[..., Any], **settings: Any) -> torch.optim.Optimizer:
    plugins = Plugins(given={"optimizer": {"mine": make}})
    run = run_of("mine", **settings)
    check_optimizers([run], plugins)
    return make_foreign(run, [nn.Parameter(torch.ones(2, 3))], plugins)


def test_numbers_are_passed_by_the_names_that_the_signature_has() -> None:
    group = made(torch.optim.SGD, lr=0.3, momentum=0.6, weight_decay=0.2, optimizer_options={"nesterov": True})
    assert {n: group.defaults[n] for n in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.3, "momentum": 0.6, "weight_decay": 0.2, "nesterov": True,
    }  # fmt: skip
    assert made(Nested, momentum=0.6).defaults["betas"] == (0.6, 0.95)
    assert made(Nested, momentum=0.6, beta2=0.9, eps=1e-3).defaults["betas"] == (0.6, 0.9)
    assert made(Nested).defaults["eps"] == 1e-6
    assert made(TakesAll, momentum=0.6, eps=1e-3, optimizer_options={"scale": 2.0}).defaults["eps"] == 1e-3

    def factory(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": params[:1], "lr": 10 * lr}, {"params": params[1:]}], lr=lr)

    assert [group["lr"] for group in made(factory, lr=0.5).param_groups] == [5.0, 0.5]


def test_a_checkpoint_with_states_of_other_shapes_is_refused(digits: Dataset) -> None:
    runs = [run_of("torch.optim:Adam")]
    training = Training(runs, digits, CPU)
    next(event for event in training if event == 1)
    content = read_state(training.checkpoint(), runs, CPU)
    (single,) = content["optimizer"].single
    wrong_groups: list[Any] = [[{"params": [0]}], [{}], [], [0], 0]
    wrong_singles: list[Any] = [[], [single, single], [{"state": {}}], [{"state": [], "param_groups": []}]]
    for wrong in (*wrong_singles, *([single | {"param_groups": groups}] for groups in wrong_groups)):
        parts = (content[name] for name in ("epoch", "rows", "over", "seconds", "orders", "tensors"))
        with pytest.raises(CheckpointError):
            Training(runs, digits, CPU, checkpoint=write_state(runs, *parts, OptimizerStates(single=wrong)))


class Shaken(torch.optim.SGD):
    """SGD with noise from the generators of NumPy, which computes a second normal number ahead, and of Python."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"][:3]:
                    param.add_(float(np.random.normal()) + random.gauss(0, 1), alpha=0.1 * group["lr"])


def test_what_an_optimizer_draws_from_any_generator_does_not_depend_on_other_runs(digits: Dataset) -> None:
    plugins = Plugins(given={"optimizer": {"shaken": Shaken}})
    runs = [run_of("shaken", model="mlp", width=9, lr=lr, limit=150, epochs=2) for lr in (0.01, 0.02, 0.03)]

    def weights(of: list[RunConfig]) -> list[dict[str, Any]]:
        training = Training(of, digits, CPU, plugins=plugins)
        list(training)
        return [training.stack.state_dict(r) for r in range(len(of))]

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]
    together = weights(runs)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]
    assert after == before
    for run, ours in zip(runs, together, strict=True):
        for name, value in weights([run])[0].items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_a_loaded_learning_rate_is_where_the_former_one_was() -> None:
    params = [nn.Parameter(torch.ones(2))]
    saved = torch.optim.SGD(params, lr=torch.tensor(0.5)).state_dict()
    optimizer = torch.optim.SGD(params)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    load_exactly(optimizer, saved)
    assert optimizer.param_groups[0]["lr"].device.type == "meta"
    optimizer = torch.optim.SGD(params, lr=torch.tensor(0.1))
    load_exactly(optimizer, saved)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
