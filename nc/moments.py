"""What is done with gathered statistics, in float64: about other shifts (Chan et al. 1979), merged, as covariances."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ncollapse.kernels.class_stats.reference import State


class Totals(NamedTuple):
    """As in `State`, about other shifts; float64 but for the counts."""

    counts: Tensor
    sums: Tensor
    squares: Tensor
    scatter: Tensor | None


def moved(state: State, shifts: Tensor) -> Totals:
    """The statistics about other shifts `[*, K, d]`; of a class without samples they are zero."""
    counts, sums = state.counts.double().unsqueeze(-1), state.sums.double()
    by = torch.where(counts > 0, state.shifts.double() - shifts.double(), 0.0)
    squares = state.squares.double() + 2 * (by * sums).sum(-1) + (counts * by.square()).sum(-1)
    scatter = None
    if state.scatter is not None:
        z, b = (sums, by) if state.axes is None else (t @ state.axes.double().mT for t in (sums, by))
        cross = z.mT @ b
        scatter = state.scatter.double() + cross + cross.mT + (counts * b).mT @ b
    return Totals(state.counts.clone(), sums + counts * by, squares, scatter)


def merge(state: State, other: State) -> None:
    """Add what `other` holds, in place; both have the same axes and stand on one device."""
    new = (state.counts == 0).unsqueeze(-1)
    state.shifts.copy_(torch.where(new, other.shifts.to(state.shifts.dtype), state.shifts))
    totals = moved(other, state.shifts)
    state.counts.add_(totals.counts)
    state.refused.add_(other.refused)
    for kept, total in ((state.sums, totals.sums), (state.squares, totals.squares), (state.scatter, totals.scatter)):
        if kept is not None and total is not None:
            kept.copy_(kept.double() + total)


def all_reduce(state: State, group: Any) -> None:
    """The statistics of all processes of a `torch.distributed` group, into each of them.

    A class is summed about the shift of the first process that has samples of it.
    """
    rank = dist.get_rank(group)
    seen = [torch.empty_like(state.counts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(seen, state.counts, group=group)
    owner = (torch.stack(seen) > 0).int().argmax(0)  # of equal values the first
    own = ((owner == rank) & (state.counts > 0)).unsqueeze(-1)
    shifts = torch.where(own, state.shifts.double(), 0.0)
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
    """D Σ Dᵀ, `[*, n, n]` float64, where Σ is the covariance within classes (of the projections, if there are axes).

    Args:
        state: with a scatter.
        directions: D `[*, n, m]` float64; None: the identity.
    """
    assert state.scatter is not None
    # The part above the diagonal is the mirror of that below.
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
