"""The training loop against a plain loop of torch.optim, and stacked runs against runs alone."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from nc import ufm
from nc.train import loop
from nc.train.config import RunConfig
from nc.train.data import Dataset
from nc.train.errors import UserError
from nc.train.loop import Evaluation, train
from nc.train.models import build
from nc.train.stack import Stack
from nc.train.store import METRICS

CPU = torch.device("cpu")


def evaluations(runs: list[RunConfig], data: Dataset) -> Iterator[Evaluation]:
    return (event for event in train(runs, data, CPU) if isinstance(event, Evaluation))


def last(runs: list[RunConfig], data: Dataset) -> Evaluation:
    *_, final = evaluations(runs, data)
    return final


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
    final = last([run], digits)

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
    state = final.stack.state_dict(0)
    assert set(state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    model.load_state_dict(state)
    loss = F.cross_entropy(model(digits.val_x), digits.val_y)
    assert final.values["val_loss"][0] == pytest.approx(loss.item(), rel=1e-5)


@pytest.fixture
def in_float64(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Digits in float64, and networks too: differences are then those of the program, not of rounding."""
    monkeypatch.setattr(loop, "build", lambda *args: build(*args).double())
    return dataclasses.replace(digits, train_x=digits.train_x.double(), val_x=digits.val_x.double())


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("family", ["sgd", "signum", "adam"])
def test_stacked_runs_train_as_alone(model: str, family: str, in_float64: Dataset) -> None:
    """The same numbers to rounding, whatever the neighbours are; one that diverges to NaN changes nothing."""
    base = RunConfig(model=model, optimizer=family, epochs=2, limit=300, eval_every=1, lr=0.01)
    runs = [
        base,
        dataclasses.replace(base, optimizer=family + "w", coupling=None, weight_decay=0.1),
        dataclasses.replace(base, lr=1e308),
        dataclasses.replace(base, momentum=0.5, coupling=0.3),
    ]
    together = last(runs, in_float64)
    assert not math.isfinite(together.values["train_loss"][2])
    for r in (0, 1, 3):
        alone = last([runs[r]], in_float64)
        mine, theirs = together.stack.state_dict(r), alone.stack.state_dict(0)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-7, atol=1e-9)
        for name in ("nc0", "nc1", "nc2", "nc3", "train_loss", "val_accuracy"):
            assert together.values[name][r] == pytest.approx(alone.values[name][0], rel=1e-5, abs=1e-7), name


def test_same_seed_same_run(digits: Dataset) -> None:
    run = RunConfig(model="cnn", epochs=1, limit=300)
    assert torch.equal(last([run], digits).stack.flat, last([run], digits).stack.flat)
    other = last([dataclasses.replace(run, seed=1)], digits).stack.flat
    assert not torch.equal(last([run], digits).stack.flat, other)


@pytest.mark.parametrize("optimizer", ["sgd", "sgdw"])
def test_row_sum_follows_theory_in_float32(optimizer: str, digits: Dataset) -> None:
    run = RunConfig(optimizer=optimizer, epochs=6, lr=0.1, weight_decay=0.05, eval_every=1)
    measured = [e.values["nc0"][0] for e in evaluations([run], digits)]
    steps = run.steps_per_epoch(1437)
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(6) for _ in range(steps)]
    factor = ufm.row_sum_factor(lrs, momentum=0.9, weight_decay=0.05, coupling=run.decay_coupling)
    assert measured == pytest.approx(list(measured[0] * factor[::steps] ** 2), rel=1e-4)


def test_evaluates_when_asked_and_everything_that_is_stored(digits: Dataset) -> None:
    events = list(train([RunConfig(epochs=5, eval_every=2, limit=200)], digits, CPU))
    assert [e if isinstance(e, int) else -e.epoch for e in events] == [0, 1, 2, -2, 3, 4, -4, 5, -5]
    first = events[0]
    assert isinstance(first, Evaluation)
    assert set(first.values) >= set(METRICS)


@pytest.mark.parametrize("model", ["resnet9", "vgg9"])
def test_a_stack_is_its_modules(model: str, in_float64: Dataset) -> None:
    """Logits and gradients of two stacked networks with different weights are those of the modules."""
    modules = [build(model, 1, 8, 10, seed).double() for seed in (0, 1)]
    stack = Stack(modules[0], 2, CPU)
    with torch.no_grad():
        stack.flat[1] = Stack(modules[1], 1, CPU).flat[0]
    images, labels = in_float64.train_x[:6], in_float64.train_y[:6]
    _, logits = stack(images, train=True)
    (grad,) = torch.autograd.grad(sum(F.cross_entropy(logits[r], labels) for r in range(2)), stack.flat)
    for r, module in enumerate(modules):
        expected = module(images)
        torch.testing.assert_close(logits[r], expected, rtol=1e-9, atol=1e-9)
        theirs = torch.autograd.grad(F.cross_entropy(expected, labels), list(module.parameters()))
        torch.testing.assert_close(grad[r], torch.cat([g.flatten() for g in theirs]), rtol=1e-6, atol=1e-9)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(stack.state_dict(r)[name], value, rtol=1e-9, atol=1e-9)


def test_resnet9_and_vgg9_take_a_step_with_finite_metrics(digits: Dataset) -> None:
    for model in ("resnet9", "vgg9"):
        final = last(
            [RunConfig(model=model, epochs=1, limit=64, lr=0.01)],
            dataclasses.replace(digits, val_x=digits.val_x[:50], val_y=digits.val_y[:50]),
        )
        assert all(abs(values[0]) < 1e6 for values in final.values.values())


def test_images_too_small_for_the_model_are_refused(digits: Dataset) -> None:
    tiny = dataclasses.replace(digits, train_x=digits.train_x[:, :, :4, :4], val_x=digits.val_x[:, :, :4, :4])
    with pytest.raises(UserError, match="resnet9 needs images of at least 8 pixels a side; data set digits has 4"):
        next(iter(train([RunConfig(model="resnet9")], tiny, CPU)))


def test_one_class_is_refused(digits: Dataset) -> None:
    with pytest.raises(UserError, match="the 1 training samples are all of one class; give a larger --limit"):
        next(iter(train([RunConfig(limit=1)], digits, CPU)))


def test_evaluation_mode_leaves_running_statistics(digits: Dataset) -> None:
    stack = Stack(build("cnn", 1, 8, 10, 0), 2, CPU)
    before = stack.state_dict(1)
    with torch.no_grad():
        stack(digits.train_x[:32], train=False)
    assert all(torch.equal(before[name], value) for name, value in stack.state_dict(1).items())
    stack(digits.train_x[:32], train=True)
    assert stack.state_dict(1)["features.0.1.num_batches_tracked"] == 1
