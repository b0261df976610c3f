"""The training loop against a plain loop of torch.optim, and stacked runs against single runs."""

import dataclasses
import functools
import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ncollapse import ufm
from ncollapse.optimizer_table import TABLE
from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.errors import CheckpointError, UserError
from ncollapse.train.networks import architecture
from ncollapse.train.networks.models import MODELS, build
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training import loop
from ncollapse.train.training.evaluate import evaluate_stack
from ncollapse.train.training.loop import Training
from ncollapse.train.training.stack import Stack

CPU = torch.device("cpu")


def evaluations(runs: list[RunConfig], data: Dataset) -> Iterator[Evaluation]:
    return (event for event in Training(runs, data, CPU) if isinstance(event, Evaluation))


def trained(runs: list[RunConfig], data: Dataset) -> tuple[Stack, dict[str, list[float]]]:
    """Train; return the stack after the last epoch, and the last metrics."""
    training = Training(runs, data, CPU)
    *_, final = (event for event in training if isinstance(event, Evaluation))
    return training.stack, final.values


@pytest.mark.parametrize(
    ("optimizer", "theirs", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
    ],
)
def test_trains_as_a_plain_loop_does(
    optimizer: str, theirs: type[torch.optim.Optimizer], options: dict[str, float], digits: Dataset
) -> None:
    run = RunConfig(optimizer=optimizer, model="cnn", lr=0.01, weight_decay=0.01, epochs=3, limit=300, seed=4)
    stack, values = trained([run], digits)

    model = build("cnn", 1, 8, 10, seed=4)
    plain = theirs(model.parameters(), lr=0.01, weight_decay=0.01, **options)
    order = torch.Generator().manual_seed(4)
    for epoch in range(3):
        plain.param_groups[0]["lr"] = 0.01 * 0.1**epoch
        for batch in torch.randperm(300, generator=order).split(128):
            plain.zero_grad()
            F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch]).backward()
            plain.step()
    model.eval()
    state = stack.state_dict(0)
    assert set(state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    model.load_state_dict(state)
    loss = F.cross_entropy(model(digits.val_x), digits.val_y)
    assert values["val_loss"][0] == pytest.approx(loss.item(), rel=1e-5)


@pytest.fixture
def in_float64(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Digits and networks in float64, so that differences are not due to rounding."""
    monkeypatch.setattr(loop, "build", lambda *args: architecture.build(*args).double())
    return dataclasses.replace(digits, train_x=digits.train_x.double(), val_x=digits.val_x.double())


def enlarged(data: Dataset) -> Dataset:
    """140 training images, a full and a small batch, at 16 × 16 pixels.

    At 8 × 8 VGG9's last maps are single pixels, and the next batch norm cancels a bias whose channel is active for all
    images: its gradient is only rounding error, with a random sign.
    """
    x, val_x = (F.interpolate(images, scale_factor=2) for images in (data.train_x[:140], data.val_x[:40]))
    return Dataset(x, data.train_y[:140], val_x, data.val_y[:40], data.classes, "")


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutional networks with few channels, so that training them takes seconds."""
    for name, width in {"cnn": 6, "resnet9": 4, "vgg9": 4}.items():
        monkeypatch.setitem(MODELS, name, functools.partial(MODELS[name], width=width))


STACKABLE = ["mlp", "cnn", "resnet9", "vgg9"]


def neighbours(model: str, **settings: Any) -> list[RunConfig]:
    """Every optimizer twice, with different hyperparameters; one run that diverges, one that ends earlier."""
    base = RunConfig(model=model, limit=300, eval_every=1, **settings)
    lr = {"sgd": 0.01, "signum": 1e-3, "adam": 1e-3, "lion": 1e-3}
    runs = []
    for optimizer in (row.name for row in TABLE.values() if not row.own_stack):
        run = dataclasses.replace(base, optimizer=optimizer, lr=lr[TABLE[optimizer].family], coupling=None)
        runs += [run, dataclasses.replace(run, weight_decay=0.1, momentum=0.5, lr_drops=0)]
    runs.insert(3, dataclasses.replace(base, lr=1e308))
    runs.insert(7, dataclasses.replace(base, epochs=1, lr=0.005))
    return runs


@pytest.mark.usefixtures("shrunk")
@pytest.mark.parametrize("model", STACKABLE)
def test_stacked_runs_match_single_runs(model: str, in_float64: Dataset) -> None:
    """Equal up to rounding, whatever the other runs are: in float64 1e-7 of a weight, 1e-5 of a metric."""
    runs, data = neighbours(model, epochs=3), enlarged(in_float64)
    training = Training(runs, data, CPU, keep_weights=True)
    together: dict[int, tuple[int, dict[str, float], bytes]] = {}
    for event in training:
        if isinstance(event, Evaluation):
            for position, i in enumerate(event.rows):
                if i in event.ended:
                    values = {name: of_run[position] for name, of_run in event.values.items()}
                    together[i] = event.epoch, values, event.weights[i]
    assert sorted(together) == list(range(len(runs)))
    assert not math.isfinite(together[3][1]["train_loss"])
    for i, run in enumerate(runs):
        epoch, values, weights = together[i]
        stack, alone = trained([run], data)
        assert epoch == (1 if i in (3, 7) else 3)
        if i == 3:
            continue
        mine = torch.load(io.BytesIO(weights), weights_only=True)["state_dict"]
        for name, theirs in stack.state_dict(0).items():
            torch.testing.assert_close(mine[name], theirs, rtol=1e-7, atol=1e-9)
        for name in METRICS:
            assert values[name] == pytest.approx(alone[name][0], rel=1e-5, abs=1e-7), name


@pytest.mark.usefixtures("shrunk")
@pytest.mark.parametrize("model", [name for name in STACKABLE if name != "vgg9"])  # the slowest; float64 covers it
def test_stacked_runs_match_single_runs_in_float32(model: str, digits: Dataset) -> None:
    """Six steps in float32, where rounding may flip a sign: 1e-5 of a weight, and for Signum twice its step size."""
    runs = [dataclasses.replace(run, epochs=3) for run in neighbours(model, epochs=3) if run.lr < 1]
    together, _ = trained(runs, enlarged(digits))
    for i, run in enumerate(runs):
        alone, _ = trained([run], enlarged(digits))
        bound = 2 * 6 * run.lr if run.family in ("signum", "lion") else 1e-5
        for name, theirs in alone.state_dict(0).items():
            torch.testing.assert_close(together.state_dict(i)[name], theirs, rtol=1e-5, atol=bound)


def test_runs_of_different_seeds_train_together(in_float64: Dataset) -> None:
    runs = [RunConfig(model=model, epochs=2, limit=300, seed=seed) for model in ("cnn",) for seed in (0, 1, 2)]
    together, values = trained(runs, in_float64)
    assert len(set(values["train_loss"])) == 3
    for i, run in enumerate(runs):
        alone, _ = trained([run], in_float64)
        for name, theirs in alone.state_dict(0).items():
            torch.testing.assert_close(together.state_dict(i)[name], theirs, rtol=1e-7, atol=1e-9)


def test_runs_that_have_ended_are_removed_from_the_stack(digits: Dataset) -> None:
    runs = [RunConfig(epochs=epochs, limit=200, eval_every=10) for epochs in (1, 2, 4, 4)]
    training = Training(runs, digits, CPU)
    sizes, ended = [], []
    for event in training:
        if isinstance(event, Evaluation):
            ended.append((event.epoch, event.rows, sorted(event.ended)))
            assert all(end.seconds > 0 for end in event.ended.values())  # also of a run of one epoch
        else:
            sizes.append(training.stack.runs)
    assert sizes == [3, 2, 2, 2]
    assert ended == [(0, (0, 1, 2, 3), []), (1, (0,), [0]), (2, (1,), [1]), (4, (2, 3), [2, 3])]


def test_the_last_run_of_a_rule_may_end_early(digits: Dataset) -> None:
    """Adam's states are dropped with its last run; the momentum of the others stays, and they match single runs."""
    short, long = RunConfig(optimizer="adam", lr=1e-3, epochs=1, limit=200), RunConfig(epochs=3, limit=200)
    together, _ = trained([short, dataclasses.replace(short, lr=1e-4), long], digits)
    alone, _ = trained([long], digits)
    assert together.runs == 1
    for name, theirs in alone.state_dict(0).items():
        torch.testing.assert_close(together.state_dict(0)[name], theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_checkpoint_continues_bit_for_bit(model: str, at: int, digits: Dataset) -> None:
    runs = neighbours(model, epochs=4)
    whole = Training(runs, digits, CPU)
    events = [event for event in whole if isinstance(event, Evaluation)]
    first = Training(runs, digits, CPU)
    for event in first:
        if event == at:
            break
    second = Training(runs, digits, CPU, checkpoint=first.checkpoint())
    rest = [event for event in second if isinstance(event, Evaluation)]
    assert second.epoch == whole.epoch
    for one, other in zip(events[at + 1 :], rest, strict=True):
        assert (one.epoch, one.rows) == (other.epoch, other.rows)
        assert {n: [repr(v) for v in of_runs] for n, of_runs in one.values.items()} == {
            n: [repr(v) for v in of_runs] for n, of_runs in other.values.items()
        }
    for name, value in whole.stack.tensors().items():
        torch.testing.assert_close(second.stack.tensors()[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_of_other_runs_or_broken_is_refused(digits: Dataset) -> None:
    run = RunConfig(epochs=2, limit=200)
    content = Training([run], digits, CPU).checkpoint()
    with pytest.raises(CheckpointError, match="of other runs"):
        Training([dataclasses.replace(run, lr=0.3)], digits, CPU, checkpoint=content)
    for broken in (content[: len(content) // 2], b"", b"nothing of the kind"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            Training([run], digits, CPU, checkpoint=broken)


def test_same_seed_same_run(digits: Dataset) -> None:
    run = RunConfig(model="cnn", epochs=1, limit=300)
    weights = [trained([r], digits)[0].weight for r in (run, run, dataclasses.replace(run, seed=1))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("optimizer", ["sgd", "sgdw"])
def test_row_sum_follows_theory_in_float32(optimizer: str, digits: Dataset) -> None:
    run = RunConfig(optimizer=optimizer, epochs=6, lr=0.1, weight_decay=0.05, eval_every=1)
    measured = [e.values["nc0"][0] for e in evaluations([run], digits)]
    steps = run.steps_per_epoch(1437)
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(6) for _ in range(steps)]
    factor = ufm.row_sum_factor(lrs, momentum=0.9, weight_decay=0.05, coupling=run.decay_coupling)
    assert measured == pytest.approx(list(measured[0] * factor[::steps] ** 2), rel=1e-4)


def test_evaluates_at_the_given_epochs_all_metrics_that_are_stored(digits: Dataset) -> None:
    events = list(Training([RunConfig(epochs=5, eval_every=2, limit=200)], digits, CPU))
    assert [e if isinstance(e, int) else -e.epoch for e in events] == [0, 1, -2, 2, 3, -4, 4, -5, 5]
    first = events[0]
    assert isinstance(first, Evaluation)
    assert set(first.values) >= set(METRICS)


@pytest.mark.parametrize("model", ["resnet9", "vgg9"])
def test_a_stack_matches_its_modules(model: str, in_float64: Dataset) -> None:
    """Logits and gradients of two stacked networks with different weights equal those of the modules."""
    modules = [build(model, 1, 8, 10, seed).double() for seed in (0, 1)]
    stack = Stack.of(modules, CPU)
    images, labels = in_float64.train_x[:6], in_float64.train_y[:6]
    _, logits = stack(images, train=True)
    loss = sum(F.cross_entropy(logits[r], labels) for r in range(2))
    grads = dict(zip(stack.params, torch.autograd.grad(loss, list(stack.params.values())), strict=True))  # type: ignore[arg-type]
    for r, module in enumerate(modules):
        expected = module(images)
        torch.testing.assert_close(logits[r], expected, rtol=1e-9, atol=1e-9)
        theirs = torch.autograd.grad(F.cross_entropy(expected, labels), list(module.parameters()))
        for (name, _), grad in zip(module.named_parameters(), theirs, strict=True):
            torch.testing.assert_close(grads[name][r], grad, rtol=1e-6, atol=1e-9)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(stack.state_dict(r)[name], value, rtol=1e-9, atol=1e-9)


def test_resnet9_and_vgg9_take_a_step_with_finite_metrics(digits: Dataset) -> None:
    for model in ("resnet9", "vgg9"):
        _, values = trained(
            [RunConfig(model=model, epochs=1, limit=64, lr=0.01)],
            dataclasses.replace(digits, val_x=digits.val_x[:50], val_y=digits.val_y[:50]),
        )
        assert all(abs(of_runs[0]) < 1e6 for of_runs in values.values())


def test_images_too_small_for_the_model_are_refused(digits: Dataset) -> None:
    tiny = dataclasses.replace(digits, train_x=digits.train_x[:, :, :4, :4], val_x=digits.val_x[:, :, :4, :4])
    with pytest.raises(UserError, match="resnet9 needs images of at least 8 pixels a side; data set digits has 4"):
        Training([RunConfig(model="resnet9")], tiny, CPU)


def test_a_last_batch_of_one_sample_with_one_pixel_is_refused(digits: Dataset) -> None:
    for model in ("resnet9", "vgg9"):
        with pytest.raises(UserError, match=r"has a single sample of the 65, .* another --batch-size or --limit"):
            Training([RunConfig(model=model, width=4, limit=65, batch_size=64)], digits, CPU)
    for run in (RunConfig(model="cnn", limit=65, batch_size=64), RunConfig(model="resnet9", limit=66, batch_size=64)):
        Training([dataclasses.replace(run, epochs=1, width=4)], digits, CPU)
    *_, last = Training([RunConfig(model="cnn", limit=65, batch_size=64, epochs=1)], digits, CPU)
    assert last == 1


def test_one_class_is_refused(digits: Dataset) -> None:
    with pytest.raises(UserError, match="the 1 training samples are all of one class; give a larger --limit"):
        Training([RunConfig(limit=1)], digits, CPU)


def test_evaluation_mode_does_not_change_running_statistics(digits: Dataset) -> None:
    stack = Stack.of([build("cnn", 1, 8, 10, 0)] * 2, CPU)
    before = stack.state_dict(1)
    with torch.no_grad():
        stack(digits.train_x[:32], train=False)
    assert all(torch.equal(before[name], value) for name, value in stack.state_dict(1).items())
    stack(digits.train_x[:32], train=True)
    assert stack.state_dict(1)["features.0.1.num_batches_tracked"] == 1


def test_an_evaluation_with_little_memory_runs_twice_and_has_the_same_metrics(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, passes, forward = Stack.of([build("cnn", 1, 8, 10, s) for s in range(3)], CPU), [0], Stack.__call__

    def counting(self: Stack, *args: Any, **kwargs: Any) -> Any:
        passes[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Stack, "__call__", counting)
    kept = evaluate_stack(stack, digits.limited(300), layers=True)
    once, passes[0] = passes[0], 0
    bounded = evaluate_stack(stack, digits.limited(300), layers=True, keep_bytes=1000)
    assert bounded == kept
    assert passes[0] == once + 2  # 300 training images are two batches
