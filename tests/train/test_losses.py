"""Losses: values and gradients, the exact law of NC0 where it holds; losses and metrics of the user's; refusals."""

import dataclasses
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse import ufm
from ncollapse.stats import ClassStats
from ncollapse.train.config import LOSSES, RunConfig, sums_to_zero
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.losses import chance_level, make_loss, try_loss
from ncollapse.train.plugins import Plugins
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training, chance_loss
from ncollapse.train.training.metric_functions import MetricFunctions, try_metric

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "cross_entropy": {}, "label smoothing": {"label_smoothing": 0.1}, "mse": {"loss": "mse"},
    "mse_rescaled": {"loss": "mse_rescaled", "loss_options": {"k": 3, "M": 2.5}}, "focal": {"loss": "focal"},
    "focal of 1/2": {"loss": "focal", "loss_options": {"gamma": 0.5}},
    "focal of 0": {"loss": "focal", "loss_options": {"gamma": 0}},
}  # fmt: skip


def own(kind: Any, **named: Any) -> Plugins:
    return Plugins(given={kind: named})


def expected(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return each sample's loss in float64, written as the papers do."""
    k, p = logits.shape[-1], logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
    one_hot = F.one_hot(labels, k).double()
    if name == "label smoothing":
        return -((0.9 * one_hot + 0.1 / k) * logits.log_softmax(-1)).sum(-1)
    if name == "mse":
        return ((logits - one_hot) ** 2).mean(-1)
    if name == "mse_rescaled":
        others = (logits**2 * (1 - one_hot)).sum(-1)
        return (3 * (logits.gather(-1, labels[:, None])[:, 0] - 2.5) ** 2 + others) / k
    gamma = {"focal": 2, "focal of 1/2": 0.5}.get(name, 0)
    return -((1 - p) ** gamma) * p.log()


@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradients_are_those_of_the_formula(name: str) -> None:
    loss = make_loss(RunConfig(**SETTINGS[name]), Plugins())
    logits = (3 * torch.randn(2, 9, 5, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(5, (2, 9))
    values = torch.stack([expected(name, one, y) for one, y in zip(logits, labels, strict=True)])
    ours = torch.stack([loss.per_sample(one, y) for one, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(ours, values, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(values.mean(1).sum(), logits)
    torch.testing.assert_close(loss.grad(logits.detach(), labels), grad, rtol=1e-10, atol=1e-14)
    shared = torch.stack([loss.grad(one.detach()[None], labels[0])[0] for one in logits])
    torch.testing.assert_close(loss.grad(logits.detach(), labels[0]), shared, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["cross_entropy", "label smoothing", "focal", "focal of 1/2", "focal of 0"])
def test_row_sums_are_zero_also_of_confident_logits(name: str) -> None:
    """In float32, where p − 1 would be a rounding error: within that of adding the row up."""
    loss = make_loss(RunConfig(**SETTINGS[name]), Plugins())
    labels = torch.arange(64) % 10
    for scale in (1, 10, 30, 200):
        logits = torch.randn(1, 64, 10) + scale * F.one_hot(labels, 10)
        grad = loss.grad(logits, labels).double()
        assert bool(grad.isfinite().all())
        assert bool((grad.sum(-1).abs() <= 1e-6 * grad.abs().sum(-1) + 1e-40).all())


@pytest.mark.parametrize("name", ["label smoothing", "focal"])
@pytest.mark.parametrize("optimizer", ["sgd", "sgdw"])
def test_the_exact_law_of_nc0_holds(name: str, optimizer: str, digits: Dataset) -> None:
    run = RunConfig(optimizer=optimizer, epochs=6, lr=0.1, weight_decay=0.05, eval_every=1, limit=600, **SETTINGS[name])
    measured, factor = nc0_of(run, digits)
    assert measured == pytest.approx(list(measured[0] * factor**2), rel=1e-4)
    row = pd.Series(run.as_dict() | {"nc0_start": measured[0], "train_samples": 600})
    assert predicted_nc0(row) == pytest.approx(measured, rel=1e-4)
    assert predicted_nc0(pd.Series(row.to_dict() | {"optimizer": "torch.optim:SGD"})) is None
    own_model = row.to_dict() | {"model": "mine.py:Net", "code": "mine.py=1", "nc0": measured[-1]}
    assert predicted_nc0(pd.Series(own_model)) == pytest.approx(measured, rel=1e-4)
    with_a_fixed_head = own_model | {"nc0": measured[0]}
    assert predicted_nc0(pd.Series(with_a_fixed_head)) is None
    assert sums_to_zero(run.loss)


@pytest.mark.parametrize("name", ["mse", "mse_rescaled", "mine"])
def test_no_law_is_shown_for_other_losses(name: str, digits: Dataset) -> None:
    settings = SETTINGS.get(name, {"loss": "mine", "code": "loss mine=1"})
    run = RunConfig(optimizer="sgdw", epochs=3, lr=0.3, weight_decay=0.05, eval_every=1, limit=600, **settings)
    measured, factor = nc0_of(run, digits, own("loss", mine=per_sample))
    row = pd.Series(run.as_dict() | {"nc0_start": measured[0], "train_samples": 600})
    assert predicted_nc0(row) is None
    assert measured[-1] != pytest.approx(measured[0] * factor[-1] ** 2, rel=1e-2)
    assert not sums_to_zero(run.loss)


def nc0_of(run: RunConfig, data: Dataset, plugins: Plugins | None = None) -> tuple[list[float], Any]:
    events = [e for e in Training([run], data, CPU, plugins=plugins) if isinstance(e, Evaluation)]
    steps = run.steps_per_epoch(600)
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(run.epochs) for _ in range(steps)]
    decay = {"weight_decay": run.weight_decay, "coupling": run.decay_coupling}
    return [e.values["nc0"][0] for e in events], ufm.row_sum_factor(lrs, momentum=run.momentum, **decay)[::steps]


def per_sample(logits: Tensor, labels: Tensor, power: float = 2.0) -> Tensor:
    return (logits - F.one_hot(labels, logits.shape[-1])).abs().pow(power).mean(-1)


def test_a_loss_of_the_users_trains_as_ours(digits: Dataset) -> None:
    """Two runs of a stack, with the loss as a function, as one with options, and as a class."""
    base = RunConfig(loss="mse", lr=0.1, epochs=2, limit=300, eval_every=1)
    squared, halved = ({"lr": lr} for lr in (0.1, 0.05))

    def results(plugins: Plugins | None = None, **settings: Any) -> list[dict[str, list[float]]]:
        runs = [dataclasses.replace(base, **settings, **each) for each in (squared, halved)]
        return [e.values for e in Training(runs, digits, CPU, plugins=plugins) if isinstance(e, Evaluation)]

    ours = results()
    for plugins, settings in (
        (own("loss", mine=per_sample), {}),
        (own("loss", mine=Squares), {"loss_options": {"power": 2.0}}),
    ):
        theirs = results(plugins, loss="mine", code="loss mine=1", **settings)
        for one, other in zip(ours, theirs, strict=True):
            for name in ("train_loss", "val_loss", "nc1", "nc0"):
                assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert ours[-1]["train_loss"][0] < ours[0]["train_loss"][0]


class Squares(nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return per_sample(logits, labels, self.power)


def test_chance_level_is_the_best_constant_classifier() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    level = {n: chance_level(make_loss(RunConfig(**s), Plugins()), labels, 4) for n, s in SETTINGS.items()}
    assert level["cross_entropy"] == pytest.approx(chance_loss(labels), rel=1e-3)
    shares = torch.tensor([0.5, 1 / 6, 1 / 3, 0.0])
    assert level["mse"] == pytest.approx(float((shares * (1 - shares)).mean()), rel=1e-4)
    smoothed = 0.9 * shares + 0.1 / 4
    assert level["label smoothing"] == pytest.approx(-float((smoothed * smoothed.log()).sum()), rel=1e-4)


def test_a_run_that_stays_at_chance_level_is_hopeless_by_its_own_loss(digits: Dataset) -> None:
    runs = [RunConfig(loss="mse", lr=lr, epochs=4, limit=300, eval_every=1) for lr in (0.5, 1e-9)]
    events = [e for e in Training(runs, digits, CPU, hopeless_after=0.5) if isinstance(e, Evaluation)]
    assert {i: end.status for event in events for i, end in event.ended.items()} == {0: "done", 1: "hopeless"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "focal", "loss_options": {"alpha": 1}}, "focal has gamma, not alpha"),
        ({"loss": "focal", "loss_options": {"gamma": "2"}}, "gamma of focal is a number of at least 0; got '2'"),
        ({"loss": "mse_rescaled", "loss_options": {"M": -1}}, "M of mse_rescaled is a number of at least 0; got -1"),
    ],
)
def test_options_of_our_losses_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        try_loss(RunConfig(**settings), Plugins(), 10)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (F.cross_entropy, "", r"must return \[B\], .* it returns \[\]"),
        (lambda logits, labels: logits, "", r"it returns \[23, 10\]"),
        (lambda logits, labels: 1.0, "", "must return a tensor .* it returns 1.0"),
        (lambda logits: logits.sum(1), "", "is called with logits, labels and its options"),
        (per_sample, {"q": 1}, "unexpected keyword argument 'q'"),
        (nn.CrossEntropyLoss, {"reduce": 0, "nothing": 1}, "unexpected keyword argument 'nothing'"),
        (lambda logits, labels: per_sample(logits - logits.mean(0), labels), "", "depends on the other samples"),
        (lambda logits, labels: per_sample(logits, labels) * torch.rand(()), "", "or on chance"),
        (lambda logits, labels: per_sample(logits.detach(), labels), "", "has no gradient"),
        (lambda logits, labels: per_sample(logits, labels) / 0, "", "no finite numbers"),
        (lambda logits, labels: (logits * 0).sum(1), "", "only zeros"),
        (lambda logits, labels: (logits - logits.detach()).sqrt().sum(1), "", "logits that is not finite"),
        (lambda logits, labels: labels.undefined, "", r"test_losses.py, line \d+: AttributeError"),
        (lambda: None, "", "takes 0|too many positional"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_train_is_refused(loss: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"loss mine.*{message}"):
        try_loss(RunConfig(loss="mine", loss_options=options, code="loss mine=1"), own("loss", mine=loss), 10)


def test_losses_that_can_train_are_taken() -> None:
    for loss, options in (
        (per_sample, {"power": 1.5}),
        (nn.CrossEntropyLoss, {"reduction": "none"}),
        (Squares, {"power": 3.0}),
    ):
        try_loss(RunConfig(loss="mine", loss_options=options, code="loss mine=1"), own("loss", mine=loss), 10)
    for name in LOSSES:
        try_loss(RunConfig(loss=name), Plugins(), 10)


def test_an_error_in_training_is_that_of_the_loss(digits: Dataset) -> None:
    def fails(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.requires_grad:
            raise ValueError("in training")
        return per_sample(logits, labels)

    run = RunConfig(loss="mine", code="loss mine=1", epochs=2, limit=200)
    with pytest.raises(OwnCodeError, match=r"loss mine: test_losses.py, line \d+: ValueError: in training") as raised:
        list(Training([run], digits, CPU, plugins=own("loss", mine=fails)))
    assert raised.value.run == run.id
    assert "in fails" in raised.value.log


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    of_label = logits.gather(1, labels[:, None])[:, 0]
    return (of_label - logits.scatter(1, labels[:, None], -torch.inf).amax(1)).median()


def spread(weight: Tensor, statistics: ClassStats) -> float:
    return float(statistics.centred_means().norm() / weight.norm())


def random_spread(w: Tensor, s: ClassStats, features: Tensor) -> Any:
    return (features @ torch.randn(features.shape[1]) * len(s.counts)).std().numpy()


def test_metrics_of_the_users_are_in_the_evaluations(digits: Dataset) -> None:
    """Of each run of a stack those that it has alone, also random ones; NaN for a run that has diverged."""
    plugins = own("metric", margin=margin, spread=spread, random_spread=random_spread)
    names = ("margin", "spread", "random_spread")
    runs = [RunConfig(epochs=2, limit=300, eval_every=1, seed=seed) for seed in (0, 1)]
    runs.append(dataclasses.replace(runs[0], lr=1e30))
    events = [e for e in Training(runs, digits, CPU, plugins=plugins, metrics=names) if isinstance(e, Evaluation)]
    assert all(list(e.values)[-3:] == list(names) and set(e.values) == {*METRICS, *names} for e in events)
    (alone,) = (
        e
        for e in Training(runs[1:2], digits, CPU, plugins=plugins, metrics=names)
        if e.__class__ is Evaluation and e.epoch == 2
    )
    for name in names:
        assert events[-1].values[name][1] == pytest.approx(alone.values[name][0], rel=1e-5)
        assert events[1].values[name][2] != events[1].values[name][2]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda weight, statistics: weight.sum(0), r"returned an array of shape \[64\]"),
        (lambda weight, statistics: "0.5", "returned a str"),
        (lambda weight, statistics: float("nan"), "returns nan, of random weights"),
        (lambda weight, statistics, targets: 0.0, "there is no targets"),
        (lambda weight, statistics: 1 / 0, r"test_losses.py, line \d+: ZeroDivisionError"),
        (lambda weight: weight.sum(), ""), (lambda w, s: 1, ""), (lambda w, s, power=2: w.norm() ** power, ""),
        (lambda *, features: features.mean(), ""), (lambda w, stats: stats.within_trace(), ""), (spread, ""),
        (margin, ""), (random_spread, ""),
    ],
)  # fmt: skip
def test_a_metric_is_tried(function: Any, message: str) -> None:
    plugins = own("metric", mine=function)
    if not message:
        try_metric("mine", plugins)
        return
    with pytest.raises(UserError, match=rf"metric mine.*{message}"):
        try_metric("mine", plugins)


def test_a_metric_that_fails_later_names_its_run(digits: Dataset) -> None:
    def fails(weight: Tensor, statistics: ClassStats) -> Tensor:
        return weight if weight.norm() < 1 else weight.norm()

    run = RunConfig(epochs=1, limit=300, weight_decay=100.0, optimizer="sgdw", lr=0.005)
    with pytest.raises(OwnCodeError, match=r"metric fails: .*returned an array of shape \[10, 64\]") as raised:
        list(
            Training(
                [dataclasses.replace(run, lr=1e-9), run],
                digits,
                CPU,
                plugins=own("metric", fails=fails),
                metrics=["fails"],
            )
        )
    assert raised.value.run == run.id


def test_metrics_of_features_are_bounded(digits: Dataset) -> None:
    from ncollapse.train.networks.models import build
    from ncollapse.train.training.evaluate import evaluate_stack
    from ncollapse.train.training.stack import Stack

    metrics = MetricFunctions.of(["margin"], own("metric", margin=margin))
    stack = Stack.of([build("mlp", 1, 8, 10, 0)], CPU)
    with pytest.raises(UserError, match=r"margin: logits of the 1,437 training samples take .* GiB a run"):
        evaluate_stack(stack, digits, metrics=metrics, keep_bytes=50_000)


def test_the_statistics_of_one_run_are_those_of_its_features() -> None:
    features, labels = torch.randn(3, 40, 20), torch.arange(40) % 4
    stacked = ClassStats(4, 20, runs=3)
    stacked.update(features, labels)
    one_alone = ClassStats(4, 20)
    one_alone.update(features[1], labels)
    for stats, alone in ((stacked, one_alone), (stacked.projected(), one_alone.projected())):
        if stats is not stacked:
            stats.update(features, labels)
            alone.update(features[1], labels)
        one = stats.of_run(1)
        assert one.runs is None
        for mine, theirs in ((one.means, alone.means), (one.within_trace(), alone.within_trace())):
            torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(one.within_cov(alone.centred_means()), alone.within_cov(alone.centred_means()))
        before = stats.means.clone()
        one.update(features[1], labels)
        assert torch.equal(stats.means, before)
    with pytest.raises(ValueError, match="one model, not of stacked runs"):
        one.of_run(0)
