"""The unconstrained features model, trained by any optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ncollapse import metrics, optim
from ncollapse.stats import ClassStats
from ncollapse.ufm.checks import Features, check_shape, learning_rates

_Floats = NDArray[np.float64]
_NAMES = sorted({name.lower() for name in optim.__all__} - {"stacked"})


@dataclass(frozen=True)
class Simulation:
    """What a simulation recorded; `*` is nothing, or R for runs that trained as a stack. Floats are float64.

    Attributes:
        start: W_0 `[*, K, d]`, as `predict` takes it.
        W: the weights at the end, `[*, K, d]`.
        H: the features at the end, `[*, K·n, d]`, sorted by class.
        steps: `[T]` int64, after how many steps the rest was recorded: from 0 to the last.
        loss: the mean cross-entropy, without decay, `[*, T]`.
        nc0, nc1, nc2, nc3: as `metrics` has them by default, `[*, T]`; NaN where weights or features have vanished
            or are not finite. Features that are not trained have NC1 and NC2 zero, by their making.
    """

    start: _Floats
    W: _Floats
    H: _Floats
    steps: NDArray[np.int64]
    loss: _Floats
    nc0: _Floats
    nc1: _Floats
    nc2: _Floats
    nc3: _Floats


def simulate(
    optimizer: str | Sequence[str] | Callable[..., torch.optim.Optimizer],
    K: int,
    d: int,
    n: int = 10,
    *,
    lr: ArrayLike,
    steps: int,
    features: Features = "fixed",
    start: ArrayLike | None = None,
    record: int | Sequence[int] = 100,
    seed: int = 0,
    **options: Any,
) -> Simulation:
    """Train a classifier W without bias on features that no network constrains: full-batch cross-entropy, in float64.

    Args:
        optimizer: a name of `optim` in lower case ("lionw" and "muonw" are Lion and Muon, which decouple anyway);
            several, which train from the same start as one stack, Muon in one of its own; or a class or function that
            makes a `torch.optim.Optimizer` of (parameters, lr=…, **options).
        K, d, n: classes, features, samples of each class.
        lr: η, a number or `[steps]`; of several names also `[R, 1]` or `[R, steps]`.
        steps: how many.
        features: "fixed": e_k for all samples of class k, which needs d ≥ K. "etf": a random simplex of unit vectors,
            d ≥ K − 1. "free": a parameter `[K·n, d]` of the same optimizer and decay, from N(0, I).
        start: W_0 `[K, d]`; by default uniform within ±1/√d, as `torch.nn.Linear` has it.
        record: how many steps to record, in geometric spacing; or which. The first and the last always are.
        seed: of the start and the features.
        options: of the optimizer. With names those of `optim.Stacked` or `optim.Muon`, each a number or a tensor
            `[R]`: momentum and weight_decay, both 0 unless given, betas, eps, coupling.

    Raises:
        ValueError: an unknown optimizer, numbers out of range, arrays of the wrong shape.

    Example:
        >>> setting = {"lr": 0.01, "steps": 1000, "weight_decay": 0.1, "features": "fixed"}
        >>> run = simulate("signumw", 10, 10, **setting)
        >>> theory = predict("signumw", 10, 10, start=run.start, **setting)
        >>> run.nc0, theory.nc0[run.steps]
    """
    check_shape(K, d, features)
    if n < 1:
        raise ValueError(f"n, the samples of each class, must be at least 1; got {n}")
    names = None if callable(optimizer) else [optimizer] if isinstance(optimizer, str) else list(optimizer)
    several = not callable(optimizer) and not isinstance(optimizer, str)
    runs = 1 if names is None else len(names)
    rates = learning_rates(lr, steps, (runs,) if several else ()).reshape(-1, steps)
    at = _recorded(record, steps)
    generator = torch.Generator().manual_seed(seed)
    W, H = _weight(K, d, start, generator), _features(K, d, n, features, generator)
    if names is not None:
        W = W.repeat(runs, 1, 1)
        H = H.repeat(runs, 1, 1) if features == "free" else H
    model = _Model(W.clone(), H, trained=features == "free")
    take = (
        _given(optimizer, model, rates, options) if callable(optimizer) else _named(names or [], model, rates, options)
    )
    kept = []
    with torch.no_grad():
        for t in range(steps + 1):
            if t in at:
                kept.append(model.measure())
            if t < steps:
                take(t)
        if features != "free":
            H = H.repeat_interleave(n, 0)
        arrays = [a.expand(runs, *a.shape[-2:]) for a in (W, model.W.detach(), H.detach())]
    series = torch.stack(kept, -1)
    if not several:
        arrays, series = [a[0] for a in arrays], series[:, 0]
    first, last, seen = (a.numpy() for a in arrays)
    return Simulation(first, last, seen, np.array(sorted(at)), *series.numpy())


class _Model:
    """W `[*, K, d]` and H, their gradients and what is recorded of them.

    Args:
        H: `[*, N, d]` if trained, else one sample of each class, `[K, d]`: more would all be the same.
    """

    def __init__(self, W: Tensor, H: Tensor, *, trained: bool) -> None:
        (self.K, self.d), N = W.shape[-2:], H.shape[-2]
        self.W, self.H, self.trained = W.requires_grad_(), H.requires_grad_(trained), trained
        self.parameters = [self.W, self.H] if trained else [self.W]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._labels = torch.arange(self.K).repeat_interleave(N // self.K)
        self._own = torch.eye(self.K, dtype=torch.float64)[:, self._labels]  # Yᵀ, [K, N]
        self._others = (1 - self._own) / N

    def gradients(self) -> None:
        """∇W = (P − Y)ᵀH/N and ∇H = (P − Y)W/N into `grad`."""
        slope = (self.W @ self.H.mT).softmax(-2).mul_(self._others)
        # Of a sample's own class, −Σ of the others: p − 1 would lose its digits near collapse, and the sum its zero.
        slope.addcmul_(self._own, slope.sum(-2, keepdim=True), value=-1)
        torch.matmul(slope, self.H, out=self.W.grad)
        if self.trained:
            torch.matmul(slope.mT, self.W, out=self.H.grad)

    def loss(self) -> Tensor:
        """The mean cross-entropy, `[*]`."""
        logits = self.W @ self.H.mT
        others = logits.masked_fill(self._own.bool(), -torch.inf).logsumexp(-2)
        own = (logits * self._own).sum(-2)
        return torch.logaddexp(torch.zeros_like(own), others - own).mean(-1)

    def measure(self) -> Tensor:
        """The loss and NC0–NC3, `[5, R]`."""
        W = self.W.detach().reshape(-1, self.K, self.d)
        H = self.H.detach().expand(len(W), -1, -1)
        stats = ClassStats(self.K, self.d, runs=len(W), nan_policy="propagate", dtype=torch.float64)
        stats.update(H, self._labels)
        geometry = torch.stack([metrics.nc1(stats), metrics.nc2(stats), metrics.nc3(W, stats)])
        geometry = geometry.masked_fill(metrics.degenerate(W, stats), torch.nan)
        return torch.cat([torch.stack([self.loss().reshape(-1), metrics.nc0(W)]), geometry])


def _named(names: list[str], model: _Model, rates: _Floats, options: dict[str, Any]) -> Callable[[int], None]:
    """A step of optimizers of ours, as one stack."""
    rules = [name if name in _NAMES else name.removesuffix("w") for name in names]
    if not rules or not set(rules) <= set(_NAMES):
        unknown = ", ".join(repr(name) for name, rule in zip(names, rules, strict=True) if rule not in _NAMES)
        raise ValueError(
            f"unknown optimizer {unknown}; there are {', '.join(_NAMES)}, or give a class of torch.optim"
            if rules
            else "no optimizer: the list of names is empty"
        )
    schedule = torch.tensor(rates.T).expand(-1, len(rules))
    lr = schedule[0].clone()
    numbers: dict[str, Any] = {"lr": lr, "momentum": 0.0, "weight_decay": 0.0} | options
    optimizer: torch.optim.Optimizer
    if "muon" in rules:
        if len(set(rules)) > 1:
            raise ValueError(f"muon is no rule of a stack with others: simulate it by itself; got {', '.join(names)}")
        optimizer = optim.Muon(model.parameters, **numbers, stacked=True)
    else:
        optimizer = optim.Stacked(model.parameters, rules, **numbers)
    changes = _changes(rates)

    def take(t: int) -> None:
        if t in changes:
            lr.copy_(schedule[t])
        model.gradients()
        optimizer.step()

    return take


def _given(
    make: Callable[..., torch.optim.Optimizer], model: _Model, rates: _Floats, options: dict[str, Any]
) -> Callable[[int], None]:
    """A step of an optimizer of the user's; by a closure, which some of them need."""
    optimizer = make(model.parameters, lr=float(rates[0, 0]), **options)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer; got {type(optimizer).__name__}")
    changes = _changes(rates)

    @torch.no_grad()
    def closure() -> Any:
        model.gradients()
        return model.loss()

    def take(t: int) -> None:
        if t in changes:
            for group in optimizer.param_groups:
                group["lr"] = float(rates[0, t])
        optimizer.step(closure)

    return take


def _changes(rates: _Floats) -> set[int]:
    """Steps with other learning rates than the step before."""
    return set((np.flatnonzero((np.diff(rates, axis=1) != 0).any(0)) + 1).tolist())


def _recorded(record: int | Sequence[int], steps: int) -> set[int]:
    at = np.geomspace(1, steps, record).round().astype(int).tolist() if isinstance(record, int) else list(record)
    if any(not 0 <= t <= steps for t in at):
        raise ValueError(
            f"record: steps lie in [0, {steps}]; got {', '.join(str(t) for t in at if not 0 <= t <= steps)}"
        )
    return {0, *at, steps}


def _weight(K: int, d: int, start: ArrayLike | None, generator: torch.Generator) -> Tensor:
    drawn = (2 * torch.rand(K, d, dtype=torch.float64, generator=generator) - 1) / d**0.5
    if start is None:
        return drawn
    weight = torch.tensor(np.asarray(start, dtype=np.float64))
    if weight.shape != (K, d):
        raise ValueError(f"start is W_0, of shape {(K, d)}; got shape {tuple(weight.shape)}")
    return weight


def _features(K: int, d: int, n: int, features: Features, generator: torch.Generator) -> Tensor:
    """H: `[K·n, d]` if it is free, else `[K, d]`."""
    if features == "free":
        return torch.randn(K * n, d, dtype=torch.float64, generator=generator)
    if features == "fixed":
        return torch.eye(K, d, dtype=torch.float64)
    # I − 11ᵀ/K in an orthonormal basis of its K − 1 dimensions, turned into d at random.
    simplex = torch.linalg.eigh(torch.eye(K, dtype=torch.float64) - 1 / K).eigenvectors[:, 1:]
    turn = torch.linalg.qr(torch.randn(d, K - 1, dtype=torch.float64, generator=generator)).Q
    return (K / (K - 1)) ** 0.5 * simplex @ turn.mT
