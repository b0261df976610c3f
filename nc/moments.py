"""The float64 algebra of `ClassStats`: move sums to other shifts, merge and all-reduce them, compute covariances.

Sums are kept about a shift per class (`ncollapse.kernels.class_stats.reference.State`). To add sums of the same class
about different shifts, one is moved to the shift of the other (Chan et al. 1979).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ncollapse.kernels.class_stats.reference import State


class Totals(NamedTuple):
    """The sums of `State`, in float64, about other shifts; counts are int64."""

    counts: Tensor
    sums: Tensor
    squares: Tensor
    scatter: Tensor | None


def moved(state: State, shifts: Tensor) -> Totals:
    """Compute the sums about other shifts `[*, K, d]`; those of a class without samples are zero."""
    counts, sums = state.counts.double().unsqueeze(-1), state.sums.double()
    offset = torch.where(counts > 0, state.shifts.double() - shifts.double(), 0.0)
    squares = state.squares.double() + 2 * (offset * sums).sum(-1) + (counts * offset.square()).sum(-1)
    scatter = None
    if state.scatter is not None:
        z, by = (sums, offset) if state.axes is None else (t @ state.axes.double().mT for t in (sums, offset))
        cross = z.mT @ by
        scatter = state.scatter.double() + cross + cross.mT + (counts * by).mT @ by
    return Totals(state.counts.clone(), sums + counts * offset, squares, scatter)


def merge(state: State, other: State) -> None:
    """Add the sums of `other` in place; both have the same axes and are on one device."""
    new = (state.counts == 0).unsqueeze(-1)
    state.shifts.copy_(torch.where(new, other.shifts.to(state.shifts.dtype), state.shifts))
    totals = moved(other, state.shifts)
    state.counts.add_(totals.counts)
    state.refused.add_(other.refused)
    for kept, total in ((state.sums, totals.sums), (state.squares, totals.squares), (state.scatter, totals.scatter)):
        if kept is not None and total is not None:
            kept.copy_(kept.double() + total)


def all_reduce(state: State, group: Any) -> None:
    """Add the sums of all processes of a `torch.distributed` group, in place in each of them.

    The shift of a class becomes that of the first process that has samples of it.
    """
    rank = dist.get_rank(group)
    counts = [torch.empty_like(state.counts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, state.counts, group=group)
    owner = (torch.stack(counts) > 0).int().argmax(0)  # argmax gives the first of equal values
    owned = ((owner == rank) & (state.counts > 0)).unsqueeze(-1)
    shifts = torch.where(owned, state.shifts.double(), 0.0)
    dist.all_reduce(shifts, group=group)
    totals = moved(state, shifts)
    for total in (*totals, state.refused):
        if total is not None:
            dist.all_reduce(total, group=group)
    state.shifts.copy_(shifts)
    for kept, total in zip((state.counts, state.sums, state.squares, state.scatter), totals, strict=True):
        if kept is not None and total is not None:
            kept.copy_(total)


def within(state: State, directions: Tensor | None) -> Tensor:
    """Compute D Σ Dᵀ `[*, n, n]` float64; Σ is the covariance within classes (of the projections if there are axes).

    Args:
        state: must have a scatter.
        directions: D `[*, n, m]` float64; None: the identity.
    """
    assert state.scatter is not None
    # The scatter is symmetric, and only its part on and below the diagonal is valid.
    lower, sums = state.scatter.double().tril(), state.sums.double()
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
