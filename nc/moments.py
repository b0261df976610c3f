"""The float64 algebra of class statistics: merging them, and the covariance within classes."""

import torch
from torch import Tensor

from ncollapse.kernels.class_stats.reference import State, moved


def totals(state: State) -> list[Tensor]:
    """Return the tensors that are added when statistics about the same shifts are merged."""
    return [t for t in (state.counts, state.sums, state.squares, state.scatter, state.refused) if t is not None]


def merge(state: State, other: State) -> None:
    """Add the sums of `other` in place; both have the same axes and are on one device."""
    new = (state.counts == 0).unsqueeze(-1)
    state.shifts.copy_(torch.where(new, other.shifts.to(state.shifts.dtype), state.shifts))
    for kept, added in zip(totals(state), totals(moved(other, state.shifts)), strict=True):
        kept.copy_(kept + added)  # float64 unless integers


def within(state: State, directions: Tensor | None) -> Tensor:
    """Compute D Σ Dᵀ `[*, n, n]` float64; Σ is the covariance within classes (of the projections if there are axes).

    D are the directions `[*, n, m]` float64; None: the identity. The state must have a scatter.
    """
    assert state.scatter is not None
    # The scatter is symmetric, and only its part on and below the diagonal is valid.
    lower, sums = state.scatter.double().tril(), state.sums
    if state.axes is not None:
        sums = sums @ state.axes.double().mT
    if directions is None:
        scatter = lower + lower.tril(-1).mT
    else:
        half, diagonal = directions @ lower @ directions.mT, lower.diagonal(dim1=-2, dim2=-1)
        scatter = half + half.mT - (directions * diagonal.unsqueeze(-2)) @ directions.mT
        sums = sums @ directions.mT
    counts = state.counts.double()
    return (scatter - sums.mT @ (sums / counts.clamp(min=1).unsqueeze(-1))) / counts.sum()


def defined(value: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """Return the value, or NaN where it is not finite or smaller than its rounding error: it then has no digit."""
    return value.where(value.isfinite() & (value >= rounding), torch.nan)
