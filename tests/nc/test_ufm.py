"""Predictions for any network, against networks trained with our optimizers; and what `predict` refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from ncollapse import metrics, optim, ufm
from ncollapse.ufm.prediction import _least_objective


def nc0_of_a_network(make: Callable[..., torch.optim.Optimizer], lrs: list[float]) -> NDArray[np.float64]:
    """NC0 of an MLP's last layer before and after every step, on new batches with random labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    optimizer = make(model.parameters())
    head = model[2].weight
    measured = [metrics.nc0(head.detach()).item()]
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 6).double()), torch.randint(5, (32,))).backward()
        optimizer.step()
        measured.append(metrics.nc0(head.detach()).item())
    return np.array(measured)


LRS = [0.1] * 60 + [0.01] * 40


@pytest.mark.parametrize("coupling", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_row_sum_follows_the_recursion_in_a_network(momentum: float, coupling: float) -> None:
    numbers = {"momentum": momentum, "weight_decay": 0.02, "coupling": coupling}
    measured = nc0_of_a_network(lambda params: optim.SGD(params, lr=0.1, **numbers), LRS)
    factor = ufm.row_sum_factor(LRS, **numbers)
    np.testing.assert_allclose(measured, measured[0] * factor**2, rtol=1e-10)
    predicted = ufm.predict("sgd", 5, 8, start=measured[0], lr=LRS, steps=100, **numbers)
    assert predicted is not None
    assert predicted.kind == "exact"
    assert predicted.limit == 0
    np.testing.assert_array_equal(predicted.nc0, measured[0] * factor**2)


def test_muon_follows_the_recursion_without_momentum_in_a_network() -> None:
    measured = nc0_of_a_network(lambda params: optim.Muon(params, lr=0.1, momentum=0.9, weight_decay=0.2), LRS)
    predicted = ufm.predict("muon", 5, 8, start=measured[0], lr=LRS, steps=100, momentum=0.9, weight_decay=0.2)
    assert predicted is not None
    assert predicted.kind == "exact"
    np.testing.assert_allclose(measured, predicted.nc0, rtol=1e-9)


@pytest.mark.parametrize("rule", ["signumw", "lion"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_signs_with_decoupled_decay_stay_below_their_bound_in_a_network(rule: str, decay: float) -> None:
    makes: dict[str, Any] = {
        "signumw": lambda params: optim.SignumW(params, momentum=0.9, weight_decay=decay),
        "lion": lambda params: optim.Lion(params, weight_decay=decay),
    }
    measured = nc0_of_a_network(makes[rule], LRS)
    predicted = ufm.predict(rule, 5, 8, start=measured[0], lr=LRS, steps=100, momentum=0.9, weight_decay=decay)
    assert predicted is not None
    assert predicted.kind == "bound"
    assert predicted.limit == (8 * 3**2 / decay**2 if decay else np.inf)
    assert predicted.nc0[0] == pytest.approx(measured[0])
    assert (measured[1:] <= predicted.nc0[1:]).all()
    assert measured.max() > 0.01 * predicted.nc0[-1]  # else the bound would be vacuous


def test_the_number_worked_out_from_the_papers_table() -> None:
    """SGDW reduces the row sum by 68.9 %: 469 steps an epoch, tenfold drops at 66 and 133 of 200 epochs."""
    lrs = [0.0679 * f for epochs, f in ((66, 1.0), (67, 0.1), (67, 0.01)) for _ in range(469 * epochs)]
    factor = ufm.row_sum_factor(lrs, weight_decay=5e-4, coupling=0.0)
    assert len(factor) == 93_801
    assert factor[-1] == pytest.approx(0.3109, abs=5e-5)


def test_no_decay_leaves_the_row_sum() -> None:
    assert set(ufm.row_sum_factor([0.1] * 5, momentum=0.9, weight_decay=0.0, coupling=1.0)) == {1.0}
    for name in ("sgd", "sgdw", "muon"):
        predicted = ufm.predict(name, 4, 4, start=2.0, lr=0.1, steps=5, momentum=0.9)
        assert predicted is not None
        assert set(predicted.nc0) == {2.0}
        assert predicted.limit == 2.0


@pytest.mark.parametrize("K", [4, 10])
@pytest.mark.parametrize("decay", [0.1, 0.5])
def test_signumw_goes_to_the_papers_limit(K: int, decay: float) -> None:
    steps = int(20 / (0.05 * decay))
    start = np.random.default_rng(0).normal(size=(K, K + 2))
    predicted = ufm.predict(
        "signumw", K, K + 2, start=start, lr=0.05, steps=steps, weight_decay=decay, features="fixed"
    )
    assert predicted is not None
    assert predicted.kind == "exact"
    assert predicted.limit == pytest.approx(K * (K - 2) ** 2 / decay**2)
    assert predicted.nc0[0] == pytest.approx(np.square(start.sum(0)).sum())
    assert predicted.nc0[-1] == pytest.approx(predicted.limit, rel=1e-7)


def test_two_classes_have_no_row_sum_to_rise() -> None:
    start = np.arange(4.0).reshape(2, 2)
    predicted = ufm.predict("signumw", 2, 2, start=start, lr=0.1, steps=50, features="fixed")
    assert predicted is not None
    assert predicted.nc0 == pytest.approx(np.full(51, predicted.limit))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_bound_of_signum_goes_to_zero_as_the_learning_rate_does(momentum: float) -> None:
    steps = 40_000
    lr = 0.1 / np.sqrt(1 + np.arange(steps))
    setting: dict[str, Any] = {"steps": steps, "momentum": momentum, "weight_decay": 0.3, "features": "fixed"}
    predicted = ufm.predict("signum", 4, 4, start=np.zeros((4, 4)), lr=lr, **setting)
    assert predicted is not None
    assert predicted.kind == "bound"
    assert predicted.limit == 0
    tail = predicted.nc0[4000:]
    assert (np.diff(tail) <= 0).all()
    # Of the order η², which falls by a factor of 10 from there on.
    assert tail[-1] == pytest.approx(tail[0] / 10, rel=0.1)


@pytest.mark.parametrize(("K", "decay"), [(2, 0.5), (10, 0.01), (10, 1e-5)])
def test_least_objective_is_where_newton_ends(K: int, decay: float) -> None:
    """On the line W = g(I − 11ᵀ/K), on which the minimiser lies."""
    g = 1.0
    for _ in range(200):
        q = (K - 1) * np.exp(-g) / (1 + (K - 1) * np.exp(-g))
        g -= (decay * (K - 1) * g - q) / (decay * (K - 1) + q * (1 - q))
    least = np.log1p((K - 1) * np.exp(-g)) / K + decay / 2 * g**2 * (1 - 1 / K)
    assert _least_objective(K, decay) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adam", {"features": "fixed"}),
        ("adamw", {}),
        ("lion", {"coupling": 1.0}),
        ("muon", {"coupling": 0.5}),
        ("signum", {}),
        ("signum", {"features": "etf"}),
        ("signum", {"features": "fixed", "coupling": 0.5}),
    ],
)
def test_no_prediction_where_theory_has_none(optimizer: str, options: dict[str, Any]) -> None:
    assert ufm.predict(optimizer, 4, 4, start=1.0, lr=0.1, steps=5, weight_decay=0.1, **options) is None


@pytest.mark.parametrize("decay", [0.002, 5e-4])
def test_an_exact_prediction_says_where_the_softmax_underflows(decay: float) -> None:
    """The paper's decay is the second."""
    setting: dict[str, Any] = {"lr": 1.0, "steps": 900, "weight_decay": decay}
    run = ufm.simulate("signumw", 4, 4, record=range(901), **setting)
    predicted = ufm.predict("signumw", 4, 4, start=run.start, features="fixed", **setting)
    assert predicted is not None
    until = predicted.holds_until
    assert until is not None
    assert 300 < until < 900
    wrong = np.abs(run.nc0 / predicted.nc0 - 1) > 1e-9
    assert not wrong[: until + 1].any()
    assert wrong[until + 5 :].all()
    assert predicted.largest_gap == pytest.approx(744.44 - np.log(4), abs=0.01)
    early = ufm.predict("signumw", 4, 4, start=run.start, features="fixed", dtype="float32", **setting)
    assert early is not None
    assert early.holds_until is not None
    assert early.holds_until < 60


def test_where_predictions_hold() -> None:
    assert ufm.largest_gap("float32") == pytest.approx(103.28, abs=0.01)
    assert ufm.largest_gap("float32", "torch") == pytest.approx(16.64, abs=0.01)
    assert ufm.largest_gap("float64", "torch") == pytest.approx(36.74, abs=0.01)
    with pytest.raises(ValueError, match="loss 'ncollapse' or 'torch'; got 'float16'"):
        ufm.largest_gap("float16")
    setting: dict[str, Any] = {"start": 1.0, "lr": 0.1, "steps": 7, "weight_decay": 0.1}
    linear, bound = (ufm.predict(name, 4, 4, loss="torch", **setting) for name in ("sgdw", "signumw"))
    assert linear is not None
    assert bound is not None
    assert (linear.largest_gap, linear.holds_until) == (np.inf, 7)
    assert bound.largest_gap == ufm.largest_gap("float64", "torch")
    assert bound.holds_until is None
    ours = ufm.predict("signumw", 4, 4, **setting)
    assert ours is not None
    assert (ours.largest_gap, ours.holds_until) == (np.inf, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "rmsprop"}, "unknown optimizer 'rmsprop'; there are adam"),
        ({"K": 1}, "K ≥ 2 classes"),
        ({"d": 0}, "d ≥ 1 features"),
        ({"features": "frozen"}, "features is 'fixed', 'etf', 'free'; got 'frozen'"),
        ({"features": "fixed", "d": 3}, "need d ≥ K = 4; got d = 3"),
        ({"features": "etf", "d": 2}, "needs d ≥ K − 1 = 3 features; got d = 2"),
        ({"lr": 0.0}, "lr must be positive and finite; got 0"),
        ({"lr": [0.1, 0.1]}, r"shape \[5\], one for each step; got shape \[2\]"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"momentum": 1.0}, "momentum lies in"),
        ({"weight_decay": -1.0}, "got 0, -1 and 1"),
        ({"coupling": 2.0}, "coupling in"),
        ({"start": np.zeros((4, 5))}, r"start is W_0, of shape \(4, 4\), or NC0_0, a number; got shape \(4, 5\)"),
        ({"start": -1.0}, "NC0 must be at least 0 and finite; got -1"),
        ({"optimizer": "signumw", "features": "fixed"}, "start must be W_0"),
    ],
)
def test_refuses_in_words(change: dict[str, Any], words: str) -> None:
    setting: dict[str, Any] = {"optimizer": "sgd", "K": 4, "d": 4, "start": 1.0, "lr": 0.1, "steps": 5} | change
    with pytest.raises(ValueError, match=words):
        ufm.predict(**setting)
