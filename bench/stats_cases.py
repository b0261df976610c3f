"""What the benchmark of the class statistics compares: features near collapse, and the ways to NC1."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ncollapse import ClassStats
from ncollapse.metrics import nc1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NORM, NOISE, OFFSET = 10.0, 1e-3, 50.0  # of the class means, of the samples about them, of every coordinate
LOOPED = 600  # samples that the loop over samples gets; its time is scaled to all


@dataclass(frozen=True)
class Case:
    """Features `[samples, dim]` of so many classes, which come in batches."""

    samples: int
    dim: int
    classes: int = 10
    batch: int | None = None  # None: all at once
    dtype: str = "fp32"

    def __str__(self) -> str:
        how = "in memory" if self.batch is None else f"batches of {self.batch:,}"
        return f"{self.samples:,} × {self.dim}, K = {self.classes}, {self.dtype}, {how}"


class Features:
    """The data of a case: `batches` for the candidates, `truth` their NC1 in float64."""

    def __init__(self, case: Case, device: str, noise: float = NOISE, offset: float = OFFSET) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.k, self.d = case.classes, case.dim
        labels = torch.randint(self.k, (case.samples,), generator=g, device=device)
        means = torch.randn(self.k, self.d, generator=g, device=device)
        means = offset + NORM * means / means.norm(dim=1, keepdim=True)
        within = torch.randn(case.samples, self.d, generator=g, device=device)
        features = (means[labels] + noise * within).to(DTYPES[case.dtype])
        del within
        size = case.batch or case.samples
        self.batches = list(zip(features.split(size), labels.split(size), strict=True))
        self.truth = self._truth()

    def _truth(self) -> float:
        """By the definitions, with the K × K route, which in float64 is as exact as any."""
        counts = torch.zeros(self.k, dtype=torch.float64, device=self.batches[0][0].device)
        sums = counts.new_zeros(self.k, self.d)
        parts = [(h[i : i + 4096], y[i : i + 4096]) for h, y in self.batches for i in range(0, len(y), 4096)]
        for h, y in parts:
            counts += y.bincount(minlength=self.k)
            sums.index_add_(0, y, h.double())
        means = sums / counts.unsqueeze(1)
        centred = means - means.mean(0)
        # Σ_B⁺ by the singular values of the centred means, of which the last is rounding.
        _, s, v = torch.linalg.svd(centred, full_matrices=False)
        s, v = s[: self.k - 1], v[: self.k - 1]
        squares = sum(((h.double() - means[y]) @ v.T).square().sum(0) for h, y in parts)
        return float((squares / s.square()).sum() / counts.sum())


def full(data: Features) -> Tensor:
    stats = gathered(data, "full")
    return nc1(stats)


def projected(data: Features) -> Tensor:
    """Means first, then the second moment between them."""
    stats = gathered(data, "trace").projected()
    for h, y in data.batches:
        stats.update(h, y)
    return nc1(stats)


def trace(data: Features) -> Tensor:
    """Everything but the NC1 with the pseudo-inverse."""
    return nc1(gathered(data, "trace"), kind="trace_ratio")


def gathered(data: Features, moment: Any) -> ClassStats:
    stats = ClassStats(data.k, data.d, moment=moment, device=data.batches[0][0].device)
    for h, y in data.batches:
        stats.update(h, y)
    return stats


def two_passes(data: Features) -> Tensor:
    """Means, then the covariances about them, in float32, as accumulators that are written plainly do it."""
    counts, sums = _sums(data.batches, data)
    means = sums / counts.unsqueeze(1)
    within = torch.zeros(data.d, data.d, device=sums.device)
    for h, y in data.batches:
        centred = h.float() - means[y]
        within += centred.T @ centred
    return _nc1(within / counts.sum(), means)


def one_pass(data: Features) -> Tensor:
    """E[xxᵀ] − μμᵀ in float32."""
    counts, sums = _sums((), data)
    second = torch.zeros(data.d, data.d, device=sums.device)
    for h, y in data.batches:
        x = h.float()
        counts += y.bincount(minlength=data.k)
        sums.index_add_(0, y, x)
        second += x.T @ x
    means = sums / counts.unsqueeze(1)
    return _nc1((second - means.T @ (counts.unsqueeze(1) * means)) / counts.sum(), means)


def per_sample(data: Features) -> Tensor:
    """One outer product after the other, of the first samples alone."""
    h, y = (t[:LOOPED] for t in data.batches[0])
    counts, sums = _sums([(h, y)], data)
    means = sums / counts.clamp(min=1).unsqueeze(1)
    within = torch.zeros(data.d, data.d, device=sums.device)
    for x, k in zip(h.float(), y.tolist(), strict=True):
        centred = x - means[k]
        within += torch.outer(centred, centred)
    return within


def read(data: Features) -> Tensor:
    """The features once, and nothing else: no way is faster."""
    return torch.stack([h.sum() for h, _ in data.batches]).sum()


def _sums(batches: Iterable[tuple[Tensor, Tensor]], data: Features) -> tuple[Tensor, Tensor]:
    device = data.batches[0][0].device
    counts, sums = torch.zeros(data.k, device=device), torch.zeros(data.k, data.d, device=device)
    for h, y in batches:
        counts += y.bincount(minlength=data.k)
        sums.index_add_(0, y, h.float())
    return counts, sums


def _nc1(within: Tensor, means: Tensor) -> Tensor:
    centred = means - means.mean(0)
    return torch.trace(within @ torch.linalg.pinv(centred.T @ centred / len(means))) / len(means)


BASELINE = "two passes"
WAYS: dict[str, Callable[[Features], Tensor]] = {
    "nc full": full, "nc projected": projected, "nc trace": trace, BASELINE: two_passes, "one pass": one_pass,
    "per sample": per_sample, "read": read,
}  # fmt: skip
#: Those whose result is NC1.
SAME = ("nc full", "nc projected", BASELINE, "one pass")
