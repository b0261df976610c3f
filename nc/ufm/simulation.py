"""Training of the unconstrained features model by any optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ncollapse import optim
from ncollapse.measurement import Measurement
from ncollapse.ufm.prediction import Features, check_shape, learning_rates

_Floats = NDArray[np.float64]
_RECORDED = ("nc0", "nc1", "nc2", "nc3", "degenerate")


@dataclass(frozen=True)
class Simulation:
    """The record of a simulation; `*` is R for several runs, trained as a stack, else empty. Floats are float64.

    Attributes:
        start: W_0 `[*, K, d]`, as `predict` takes it.
        W: the weights at the end, `[*, K, d]`.
        H: the features at the end, `[*, K·n, d]`, sorted by class.
        steps: `[T]` int64, the numbers of steps after which the rest was recorded: from 0 to the last.
        loss: the mean cross-entropy, without decay, `[*, T]`.
        nc0, nc1, nc2, nc3: as `metrics` has them by default, `[*, T]`; NaN where weights or features have vanished
            or are not finite. NC1 and NC2 of features that are not trained are zero by construction.
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
    K: int, d: int, n: int = 10, *, lr: ArrayLike, steps: int, features: Features = "fixed",
    start: ArrayLike | None = None, record: int | Sequence[int] = 100, seed: int = 0, **options: Any,
) -> Simulation:  # fmt: skip
    """Train a classifier W without bias on unconstrained features: full-batch cross-entropy, in float64.

    Args:
        optimizer: a name, as in `optim.by_name`; several names, which train from the same start as one stack (a rule
            that is not elementwise only with its own kind); or a class or function that makes a
            `torch.optim.Optimizer` of (parameters, lr=…, **options). Its `step` gets a closure, which sets the
            gradients and returns the loss, with a graph for optimizers that differentiate it themselves.
        K, d, n: numbers of classes, features and samples of each class.
        lr: η, a number or `[steps]`; for several names also `[R, 1]` or `[R, steps]`.
        features: "fixed": e_k for all samples of class k, which needs d ≥ K. "etf": a random simplex of unit vectors,
            d ≥ K − 1. "free": a parameter `[K·n, d]` of the same optimizer and decay, from N(0, I).
        start: W_0 `[K, d]`; by default uniform within ±1/√d, as `torch.nn.Linear` has it.
        record: the number of steps to record, in geometric spacing; or which steps. The first and the last are always
            recorded.
        seed: of the start and the features.
        options: of the optimizer. With names those of `optim.Stacked` or of a class that is not elementwise, each a
            number or a tensor `[R]`: momentum and weight_decay, both 0 unless given, betas, eps, coupling.

    Raises:
        ValueError: an unknown optimizer, numbers out of range, arrays of the wrong shape.
        RuntimeError: an optimizer that was given as a class or function never moved a weight that has a gradient.

    Example:
        >>> setting = {"lr": 0.01, "steps": 1000, "weight_decay": 0.1, "features": "fixed"}
        >>> run = simulate("sgdw", 10, 10, **setting)
        >>> theory = predict("sgdw", 10, 10, start=run.start, **setting)
        >>> run.nc0, theory.nc0[run.steps]
    """
    check_shape(K, d, features)
    if n < 1:
        raise ValueError(f"n, the samples of each class, must be at least 1; got {n}")
    names = [] if callable(optimizer) else [optimizer] if isinstance(optimizer, str) else list(optimizer)
    several = not callable(optimizer) and not isinstance(optimizer, str)
    runs = 1 if callable(optimizer) else len(names)
    schedule = torch.tensor(learning_rates(lr, steps, (runs,) if several else ()).reshape(-1, steps).T, device="cpu")
    changes = set(((schedule.diff(dim=0) != 0).any(1).nonzero().flatten() + 1).tolist())
    at = _recorded(record, steps)
    generator = torch.Generator().manual_seed(seed)
    W, H = _weight(K, d, start, generator), _features(K, d, n, features, generator)
    if not callable(optimizer):
        W = W.repeat(runs, 1, 1)
        H = H.repeat(runs, 1, 1) if features == "free" else H
    model = _Model(W.clone(), H.clone(), trained=features == "free")
    rate = schedule[0].expand(runs).clone()
    if callable(optimizer):
        chosen = optimizer(model.parameters, lr=rate.item(), **options)
        if not isinstance(chosen, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer; got {type(chosen).__name__}")
    else:  # its steps read the tensor `rate`
        chosen = _by_names(names, model.parameters, {"lr": rate, "momentum": 0.0, "weight_decay": 0.0} | options)
    records = []
    with torch.no_grad():
        for t in range(steps + 1):
            if t in at:
                records.append(model.measure())
            if t == steps:
                break
            if t in changes:
                rate.copy_(schedule[t])
                if callable(optimizer):
                    for group in chosen.param_groups:
                        group["lr"] = rate.item()
            if callable(optimizer):
                chosen.step(model.closure)  # some optimizers need one
            else:
                model.gradients()
                chosen.step()
        if callable(optimizer):
            model.check_moved([W, *([H] if features == "free" else [])], type(chosen).__name__)
        H = model.H if features == "free" else H.repeat_interleave(n, 0)
        arrays = [a.expand(runs, *a.shape[-2:]) for a in (W, model.W.detach(), H.detach())]
    series = torch.stack(records, -1)
    if not several:
        arrays, series = [a[0] for a in arrays], series[:, 0]
    initial, weight, features_at_end = (a.numpy() for a in arrays)
    return Simulation(initial, weight, features_at_end, np.array(sorted(at)), *series.numpy())


class _Model:
    """W `[*, K, d]` and H, their gradients and metrics.

    Args:
        H: `[*, N, d]` if trained, else one sample of each class, `[K, d]`: all samples of a class are the same.
    """

    def __init__(self, W: Tensor, H: Tensor, *, trained: bool) -> None:
        (self.K, self.d), N = W.shape[-2:], H.shape[-2]
        self.W, self.H, self.trained = W.requires_grad_(), H.requires_grad_(trained), trained
        self.parameters = [self.W, self.H] if trained else [self.W]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._labels = torch.arange(self.K, device="cpu").repeat_interleave(N // self.K)
        self._targets = torch.eye(self.K, dtype=torch.float64, device="cpu")[:, self._labels]  # Yᵀ, [K, N]
        self._others = (1 - self._targets) / N

    def gradients(self) -> None:
        """∇W = (P − Y)ᵀH/N and ∇H = (P − Y)W/N into `grad`."""
        gradient = (self.W @ self.H.mT).softmax(-2).mul_(self._others)
        # The label's entry as −Σ of the others: p − 1 cancels near collapse, and the sum would no longer be zero.
        gradient.addcmul_(self._targets, gradient.sum(-2, keepdim=True), value=-1)
        for parameter in self.parameters:
            if parameter.grad is None:  # as `zero_grad` leaves it
                parameter.grad = torch.empty_like(parameter)
        torch.matmul(gradient, self.H, out=self.W.grad)
        if self.trained:
            torch.matmul(gradient.mT, self.W, out=self.H.grad)

    def loss(self) -> Tensor:
        """The mean cross-entropy, `[*]`."""
        logits = self.W @ self.H.mT
        others = logits.masked_fill(self._targets.bool(), -torch.inf).logsumexp(-2)
        label = (logits * self._targets).sum(-2)
        return torch.logaddexp(torch.zeros_like(label), others - label).mean(-1)

    def closure(self) -> Any:
        """Set the gradients and return the loss, with a graph where gradients are enabled."""
        with torch.no_grad():
            self.gradients()
        return self.loss().sum()

    def check_moved(self, start: list[Tensor], name: str) -> None:
        """Raise RuntimeError if all parameters are where they started, although there is a gradient."""
        if all(torch.equal(a, b) for a, b in zip(start, self.parameters, strict=True)):
            self.gradients()
            if any(p.grad is not None and bool(p.grad.any()) for p in self.parameters):
                raise RuntimeError(
                    f"simulate: {name} never moved the weights, although their gradient is not zero; its step(closure) "
                    "must use the gradients that the closure leaves, or differentiate the loss that it returns"
                )

    def measure(self) -> Tensor:
        """The loss and NC0–NC3, `[5, R]`."""
        W = self.W.detach().reshape(-1, self.K, self.d)
        measurement = Measurement(W, _RECORDED, nan_policy="propagate", dtype=torch.float64)
        H, labels = self.H.detach(), self._labels
        if not self.trained:  # all samples of a class are the same: two of them show that NC1 is zero
            H, labels = H.repeat(2, 1), labels.repeat(2)
        measurement.add(H.expand(len(W), -1, -1), None, labels)
        values, _ = measurement.finish()
        geometry = [values[name].masked_fill(values["degenerate"], torch.nan) for name in ("nc1", "nc2", "nc3")]
        return torch.stack([self.loss().reshape(-1), values["nc0"], *geometry])


def _by_names(names: list[str], parameters: list[Tensor], numbers: dict[str, Any]) -> torch.optim.Optimizer:
    """One optimizer of `ncollapse.optim` for the whole stack."""
    if not names:
        raise ValueError("no optimizer: the list of names is empty")
    try:
        classes = [optim.by_name(name) for name in names]
    except ValueError as error:
        raise ValueError(f"{error}, or give a class of torch.optim") from None
    if all(cls.rule.elementwise for cls in classes):
        return optim.Stacked(parameters, names, **numbers)
    if len(set(classes)) == 1:
        make: Callable[..., torch.optim.Optimizer] = classes[0]
        return make(parameters, **numbers, stacked=True)
    single = next(name for name, cls in zip(names, classes, strict=True) if not cls.rule.elementwise)
    raise ValueError(f"{single} cannot share a stack with others: simulate it by itself; got {', '.join(names)}")


def _recorded(record: int | Sequence[int], steps: int) -> set[int]:
    at = np.geomspace(1, steps, record).round().astype(int).tolist() if isinstance(record, int) else list(record)
    if wrong := [t for t in at if not 0 <= t <= steps]:
        raise ValueError(f"record: steps lie in [0, {steps}]; got {', '.join(map(str, wrong))}")
    return {0, *at, steps}


def _weight(K: int, d: int, start: ArrayLike | None, generator: torch.Generator) -> Tensor:
    drawn = (2 * torch.rand(K, d, dtype=torch.float64, generator=generator, device="cpu") - 1) / d**0.5
    if start is None:
        return drawn
    weight = torch.tensor(np.asarray(start, dtype=np.float64), device="cpu")
    if weight.shape != (K, d):
        raise ValueError(f"start is W_0, of shape {(K, d)}; got shape {tuple(weight.shape)}")
    return weight


def _features(K: int, d: int, n: int, features: Features, generator: torch.Generator) -> Tensor:
    """H: `[K·n, d]` if free, else `[K, d]`."""
    if features == "free":
        return torch.randn(K * n, d, dtype=torch.float64, generator=generator, device="cpu")
    if features == "fixed":
        return torch.eye(K, d, dtype=torch.float64, device="cpu")
    # I − 11ᵀ/K in an orthonormal basis of its K − 1 dimensions, embedded in d dimensions by a random rotation.
    simplex = torch.linalg.eigh(torch.eye(K, dtype=torch.float64, device="cpu") - 1 / K).eigenvectors[:, 1:]
    rotation = torch.linalg.qr(torch.randn(d, K - 1, dtype=torch.float64, generator=generator, device="cpu")).Q
    return (K / (K - 1)) ** 0.5 * simplex @ rotation.mT
