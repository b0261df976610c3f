"""The unconstrained features model: training against autograd and torch.optim, and NC0 against the predictions."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from ncollapse import ufm


def schedule(kind: str, lr: float, steps: int) -> NDArray[np.float64]:
    t = np.arange(steps)
    factors = {
        "constant": np.ones(steps),
        "drops": 0.1 ** (3 * t // steps),
        "cosine": 0.51 + 0.49 * np.cos(np.pi * t / steps),
        "root": (1 + t) ** -0.5,
    }
    return lr * factors[kind]


def both(optimizer: str, K: int, d: int, **setting: Any) -> tuple[ufm.Simulation, ufm.Prediction, NDArray[np.float64]]:
    """A simulation, its prediction, and the predicted NC0 where the simulation was recorded."""
    steps = setting["steps"]
    run = ufm.simulate(optimizer, K, d, 3, record=range(0, steps, max(1, steps // 70)), **setting)
    predicted = ufm.predict(optimizer, K, d, start=run.start, **setting)
    assert predicted is not None
    assert predicted.nc0.shape == (steps + 1,)
    return run, predicted, predicted.nc0[run.steps]


# Exact predictions. The precision is that of W: s is a sum of numbers around 1.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("coupling", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("K", "d", "features", "decay", "kind"),
    [
        (2, 2, "fixed", 0.01, "constant"),
        (10, 16, "fixed", 0.02, "cosine"),
        (4, 3, "etf", 0.02, "drops"),
        (5, 8, "free", 0.005, "drops"),
    ],
)
def test_sgd_is_predicted_exactly(
    K: int, d: int, features: str, decay: float, kind: str, coupling: float, momentum: float
) -> None:
    setting: dict[str, Any] = {"features": features, "steps": 300, "lr": schedule(kind, 0.1, 300)}
    setting |= {"momentum": momentum, "weight_decay": decay, "coupling": coupling}
    run, predicted, nc0 = both("sgd", K, d, **setting)
    assert predicted.kind == "exact"
    np.testing.assert_allclose(run.nc0, nc0, rtol=1e-10)
    # It changes, but not to a size at which the rounding of W matters.
    assert 1e-6 < run.nc0[-1] / run.nc0[0] < 0.95


def test_the_names_with_w_decouple() -> None:
    setting: dict[str, Any] = {"steps": 50, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    run, _, nc0 = both("sgdw", 4, 4, **setting)
    np.testing.assert_allclose(run.nc0, run.nc0[0] * 0.99 ** (2 * run.steps), rtol=1e-10)
    np.testing.assert_allclose(run.nc0, nc0, rtol=1e-10)


@pytest.mark.parametrize(("K", "d", "features"), [(5, 5, "fixed"), (5, 8, "free"), (7, 6, "etf")])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_muon_is_predicted_exactly(K: int, d: int, features: str, momentum: float) -> None:
    setting: dict[str, Any] = {"features": features, "steps": 200, "lr": schedule("cosine", 0.05, 200)}
    run, predicted, nc0 = both("muon", K, d, **setting, momentum=momentum, weight_decay=0.2)
    assert predicted.kind == "exact"
    # Newton–Schulz amplifies the rounding error of a row sum.
    np.testing.assert_allclose(run.nc0, nc0, rtol=1e-9)


@pytest.mark.parametrize(("optimizer", "momentum"), [("signumw", 0.0), ("signumw", 0.9), ("lion", 0.0), ("lionw", 0.0)])
@pytest.mark.parametrize(("K", "d"), [(2, 2), (4, 4), (10, 10), (10, 12)])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5])
def test_signs_with_decoupled_decay_are_predicted_exactly(
    optimizer: str, momentum: float, K: int, d: int, decay: float
) -> None:
    setting: dict[str, Any] = {"steps": 200, "lr": schedule("drops", 0.05, 200), "features": "fixed"}
    run, predicted, nc0 = both(optimizer, K, d, **setting, momentum=momentum, weight_decay=decay)
    assert predicted.kind == "exact"
    np.testing.assert_allclose(run.nc0, nc0, rtol=1e-10)


@pytest.mark.parametrize("K", [4, 10])
@pytest.mark.parametrize("decay", [0.1, 0.5])
def test_signumw_reaches_the_papers_limit(K: int, decay: float) -> None:
    run = ufm.simulate("signumw", K, K, lr=0.1, steps=int(200 / decay), momentum=0.9, weight_decay=decay)
    assert run.nc0[-1] == pytest.approx(K * (K - 2) ** 2 / decay**2, rel=1e-6)
    S = 1 - 2 * np.eye(K)
    np.testing.assert_allclose(run.W, -S / decay, rtol=1e-6)


# Bounds, and results of simulation alone.


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("K", "d", "decay", "kind"),
    [(4, 4, 0.5, "root"), (10, 10, 0.1, "drops"), (10, 14, 0.02, "drops"), (3, 5, 1.0, "constant")],
)
def test_signum_stays_below_its_bound(K: int, d: int, decay: float, kind: str, momentum: float) -> None:
    setting: dict[str, Any] = {"steps": 1500, "lr": schedule(kind, 0.05, 1500), "features": "fixed"}
    run, predicted, nc0 = both("signum", K, d, **setting, momentum=momentum, weight_decay=decay)
    assert predicted.kind == "bound"
    assert predicted.nc0[0] == pytest.approx(run.nc0[0])
    assert (run.nc0[1:] <= nc0[1:]).all()


def test_the_bound_of_signgd_is_reached_while_it_rises() -> None:
    """From W_0 = 0 the row sum rises by K − 2 a step; the bound allows one step more."""
    setting: dict[str, Any] = {
        "steps": 20,
        "lr": 0.01,
        "weight_decay": 0.1,
        "features": "fixed",
        "start": np.zeros((6, 6)),
    }
    run = ufm.simulate("signum", 6, 6, record=range(20), **setting)
    predicted = ufm.predict("signum", 6, 6, **setting)
    assert predicted is not None
    rise = 6 * (4 * 0.01 * run.steps) ** 2
    early = run.steps <= 10
    np.testing.assert_allclose(run.nc0[early], rise[early], rtol=1e-12)
    np.testing.assert_allclose(predicted.nc0[1:], 6 * (0.06 + 0.04 * (run.steps[1:] - 1)) ** 2, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_signum_rises_and_then_falls_as_the_learning_rate_does(momentum: float) -> None:
    setting: dict[str, Any] = {"steps": 4000, "lr": schedule("root", 0.05, 4000), "momentum": momentum}
    run = ufm.simulate("signum", 6, 6, weight_decay=0.1, record=500, **setting)
    assert run.nc0.max() > 2 * run.nc0[0]
    thirds = [
        run.nc0[(run.steps > low) & (run.steps <= high)].max() for low, high in ((60, 300), (600, 1500), (3000, 4000))
    ]
    assert thirds[0] > thirds[1] > thirds[2]
    assert thirds[2] < 1e-4 * run.nc0.max()


@pytest.mark.parametrize(("optimizer", "d"), [("signumw", 12), ("lion", 6)])
def test_signs_stay_below_their_bound_with_free_features(optimizer: str, d: int) -> None:
    run, predicted, nc0 = both(optimizer, 6, d, features="free", steps=400, lr=0.02, weight_decay=0.05, momentum=0.0)
    assert predicted.kind == "bound"
    assert (run.nc0[1:] <= nc0[1:]).all()


def test_coupled_decay_collapses_free_features_and_decoupled_does_not() -> None:
    names = ["sgd", "adam", "signum", "adamw", "signumw"]
    lr = np.array([2.0, 0.02, 0.02, 0.02, 0.02])[:, None] * schedule("drops", 1.0, 3000)
    run = ufm.simulate(names, 4, 8, 3, features="free", lr=lr, steps=3000, weight_decay=0.005, record=[])
    assert run.nc0.shape == (5, 2)
    assert list(run.steps) == [0, 3000]
    for metric in (run.nc0, run.nc1, run.nc2, run.nc3):
        assert (metric[:3, 1] < 1e-2).all()
    assert (run.nc0[3:, 1] > 10 * run.nc0[3:, 0]).all()
    assert (run.nc3[3:, 1] > 0.05).all()


# The model.


@pytest.mark.parametrize("features", ["fixed", "etf", "free"])
def test_a_step_is_that_of_autograd(features: Any) -> None:
    before = ufm.simulate("sgd", 4, 6, 3, features=features, lr=0.5, steps=1, weight_decay=0.1, seed=1)
    start = torch.tensor(before.start)
    generator = ufm.simulate("sgd", 4, 6, 3, features=features, lr=1e-300, steps=1, seed=1)  # W and H do not change
    W, H = start.clone().requires_grad_(), torch.tensor(generator.H, requires_grad=features == "free")
    loss = nn.functional.cross_entropy(H @ W.T, torch.arange(4).repeat_interleave(3))
    assert before.loss[0] == pytest.approx(loss.item(), rel=1e-12)
    parameters = [W, H] if features == "free" else [W]
    optimizer = torch.optim.SGD(parameters, lr=0.5, weight_decay=0.1)
    loss.backward()
    optimizer.step()
    np.testing.assert_allclose(before.W, W.detach().numpy(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(before.H, H.detach().numpy(), rtol=1e-12, atol=1e-15)


def test_gradients_and_loss_keep_their_digits_at_collapse() -> None:
    """1 − p is zero in float64 for margins above 37; the gradient is not."""
    run = ufm.simulate("sgd", 3, 3, lr=1.0, steps=1, start=50 * np.eye(3))
    assert run.loss[0] == pytest.approx(2 * np.exp(-50), rel=1e-12)
    signs = ufm.simulate("signumw", 3, 3, lr=1.0, steps=1, start=50 * np.eye(3))
    np.testing.assert_array_equal(signs.W, 50 * np.eye(3) - (1 - 2 * np.eye(3)))


@pytest.mark.parametrize("n", [1, 4])
def test_fixed_features_are_the_same_for_all_samples_of_a_class(n: int) -> None:
    run = ufm.simulate("sgd", 3, 5, n, lr=0.1, steps=10)
    np.testing.assert_array_equal(run.H, np.eye(3, 5).repeat(n, 0))
    assert (run.nc1 == 0).all()
    assert (run.nc2 < 1e-12).all()
    assert np.isfinite(run.nc3).all()


@pytest.mark.parametrize(("K", "d"), [(4, 3), (4, 9), (2, 1)])
def test_etf_features_are_a_simplex_of_unit_vectors(K: int, d: int) -> None:
    H = ufm.simulate("sgd", K, d, 1, features="etf", lr=0.1, steps=1).H
    np.testing.assert_allclose(H @ H.T, (np.eye(K) - 1 / K) * K / (K - 1), atol=1e-12)
    again, other = (ufm.simulate("sgd", K, d, 1, features="etf", lr=0.1, steps=1, seed=s).H for s in (0, 1))
    np.testing.assert_array_equal(H, again)
    assert not np.allclose(H, other) or d == 1


def test_vanished_features_have_no_geometry() -> None:
    run = ufm.simulate("sgdw", 3, 4, 2, features="free", lr=0.5, steps=200, weight_decay=0.9)
    assert np.isfinite([run.nc1[0], run.nc2[0], run.nc3[0]]).all()
    assert np.isnan([run.nc1[-1], run.nc2[-1], run.nc3[-1]]).all()
    assert run.nc0[-1] == pytest.approx(0, abs=1e-20)


def test_a_run_that_diverges_is_recorded_as_nan_beside_one_that_does_not() -> None:
    setting: dict[str, Any] = {"lr": 3.0, "steps": 3000, "momentum": 0.0, "features": "free"}
    run = ufm.simulate(["sgdw", "sgdw"], 3, 4, 2, weight_decay=torch.tensor([2.0, 0.0]).double(), **setting)
    assert np.isnan(run.nc1[0, -1])
    assert np.isfinite([run.nc0[1, -1], run.nc1[1, -1], run.loss[1, -1]]).all()


# Optimizers.


def test_a_stack_trains_as_its_runs_do_alone() -> None:
    names = ["sgd", "adamw", "signumw", "lion"]
    setting: dict[str, Any] = {"features": "free", "steps": 60, "weight_decay": 0.01, "momentum": 0.9, "seed": 3}
    lrs = np.array([0.3, 0.01, 0.01, 0.01])[:, None] * schedule("drops", 1.0, 60)
    stack = ufm.simulate(names, 4, 5, 2, lr=lrs, **setting)
    for r, name in enumerate(names):
        alone = ufm.simulate(name, 4, 5, 2, lr=lrs[r], **setting)
        np.testing.assert_array_equal(alone.steps, stack.steps)
        for part in ("start", "W", "H", "loss", "nc0", "nc1", "nc2", "nc3"):
            np.testing.assert_allclose(getattr(alone, part), getattr(stack, part)[r], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("features", ["fixed", "free"])
@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "NAdam", "Rprop", "LBFGS", "Muon"])
def test_any_optimizer_of_torch_runs(name: str, features: Any) -> None:
    run = ufm.simulate(getattr(torch.optim, name), 4, 5, 2, features=features, lr=0.01, steps=30)
    assert run.W.shape == (4, 5)
    assert run.H.shape == (8, 5)
    assert run.nc0.shape == run.steps.shape
    assert run.loss[-1] < run.loss[0]


@pytest.mark.parametrize("kind", ["constant", "drops"])
@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.99), "weight_decay": 0.1}),
        ("adamw", torch.optim.AdamW, {"eps": 1e-3, "weight_decay": 0.1}),
    ],
)
def test_names_and_classes_of_torch_agree(name: str, theirs: Any, options: dict[str, Any], kind: str) -> None:
    setting: dict[str, Any] = {"features": "free", "lr": schedule(kind, 0.05, 60), "steps": 60} | options
    ours, reference = ufm.simulate(name, 4, 5, 2, **setting), ufm.simulate(theirs, 4, 5, 2, **setting)
    for part in ("start", "W", "H", "loss", "nc0", "nc3"):
        np.testing.assert_allclose(getattr(ours, part), getattr(reference, part), rtol=1e-9, atol=1e-12)


def test_a_function_may_make_the_optimizer() -> None:
    def make(params: Any, lr: float, scale: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, weight_decay=scale)

    run = ufm.simulate(make, 3, 3, lr=0.1, steps=20, scale=0.5)
    np.testing.assert_allclose(run.nc0, run.nc0[0] * 0.95 ** (2 * run.steps), rtol=1e-10)


class Clearing(torch.optim.SGD):
    """Clears the gradients before it calls the closure, as SAM does; or after."""

    def __init__(self, params: Any, *, after: bool = False, **options: Any) -> None:
        super().__init__(params, **options)
        self.after = after

    def step(self, closure: Any = None) -> Any:
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        if self.after:
            self.zero_grad()
        super().step()
        return loss


class OwnGradients(torch.optim.SGD):
    """Differentiates the loss itself."""

    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        with torch.enable_grad():
            loss = closure()
            grads = torch.autograd.grad(loss, params, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), params)  # twice differentiable
        for p, g in zip(params, grads, strict=True):
            torch.testing.assert_close(p.grad, g)
            p.grad = g.detach()
        return super().step()


@pytest.mark.parametrize("features", ["fixed", "free"])
@pytest.mark.parametrize("cls", [Clearing, OwnGradients])
def test_optimizers_that_clear_gradients_or_make_their_own(cls: Any, features: Any) -> None:
    setting: dict[str, Any] = {"lr": 0.1, "steps": 20, "features": features}
    run, plain = ufm.simulate(cls, 4, 6, 2, **setting), ufm.simulate("sgd", 4, 6, 2, **setting)
    np.testing.assert_allclose(run.loss, plain.loss, rtol=1e-9)
    np.testing.assert_allclose(run.W, plain.W, rtol=1e-9, atol=1e-12)


def test_weights_that_never_move_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="Clearing never moved the weights"):
        ufm.simulate(Clearing, 4, 6, lr=0.1, steps=3, after=True)


def test_records_geometrically_or_where_told() -> None:
    geometric = ufm.simulate("sgd", 3, 3, lr=0.1, steps=1000, record=4).steps
    assert geometric.tolist() == [0, 1, 10, 100, 1000]
    assert ufm.simulate("sgd", 3, 3, lr=0.1, steps=9, record=[5, 3, 5]).steps.tolist() == [0, 3, 5, 9]


def test_is_the_same_again() -> None:
    a, b = (ufm.simulate("adam", 3, 4, 2, features="free", lr=0.1, steps=30) for _ in range(2))
    np.testing.assert_array_equal(a.W, b.W)
    np.testing.assert_array_equal(a.nc1, b.nc1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "rmsprop"}, "unknown optimizer 'rmsprop'; there are adam, .*or give a class of torch.optim"),
        ({"optimizer": ["sgd", "shampoo"]}, "unknown optimizer 'shampoo'"),
        ({"optimizer": []}, "list of names is empty"),
        ({"optimizer": ["sgd", "muon"]}, "simulate it by itself; got sgd, muon"),
        ({"K": 1}, "K ≥ 2 classes and d ≥ 1 features; got K = 1"),
        ({"d": 0}, "got K = 4 and d = 0"),
        ({"n": 0}, "n, the samples of each class, must be at least 1; got 0"),
        ({"features": "frozen"}, "features is 'fixed', 'etf', 'free'; got 'frozen'"),
        ({"features": "etf", "d": 2}, "needs d ≥ K − 1 = 3 features; got d = 2"),
        ({"d": 3}, "need d ≥ K = 4; got d = 3"),
        ({"lr": -0.1}, "lr must be positive and finite; got -0.1"),
        ({"lr": [0.1, 0.0, 0.1, 0.1, 0.1]}, "lr must be positive and finite; got 0"),
        ({"lr": float("nan")}, "lr must be positive and finite; got nan"),
        ({"lr": [0.1, 0.2]}, r"one for each step; got shape \[2\]"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"start": np.zeros((3, 4))}, r"start is W_0, of shape \(4, 4\); got shape \(3, 4\)"),
        ({"record": [6]}, r"record: steps lie in \[0, 5\]; got 6"),
        ({"weight_decay": -1.0}, "weight_decay must be a number"),
    ],
)
def test_refuses_in_words(change: dict[str, Any], words: str) -> None:
    setting: dict[str, Any] = {"optimizer": "sgd", "K": 4, "d": 4, "lr": 0.1, "steps": 5} | change
    with pytest.raises(ValueError, match=words):
        ufm.simulate(**setting)


def test_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="; got dict"):
        ufm.simulate(lambda params, lr: {}, 3, 3, lr=0.1, steps=1)  # type: ignore[arg-type, return-value]
