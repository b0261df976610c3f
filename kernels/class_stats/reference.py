"""How a batch of features changes the statistics of its classes: plain-PyTorch reference.

All sums are relative to a shift per class, the median of the class's first three samples, which is as close to the
class's samples as they are to each other. So sums stay accurate when collapse is nearly complete and the features are
far from the origin, where E[xxᵀ] − μμᵀ, or one global shift, leaves only rounding errors. A shift that turns out to lie
far from the class's samples, since the first ones were outliers or mislabelled, moves (`move_shifts`), so that the sums
are accurate for samples in any order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLES, FAR = 32, 2.5  # of `move_shifts`


class State(NamedTuple):
    """The statistics of K classes of d features; `*` is empty or the stacked runs R. All on one device.

    Attributes:
        counts: `[K]` int64, samples of each class.
        shifts: `[*, K, d]` float32 or float64, the shift s_k of class k; see `move_shifts`.
        sums: `[*, K, d]` float64, Σ (h − s_k) over the samples of class k.
        squares: `[*, K]` float64, Σ ‖h − s_k‖² over the samples of class k.
        scatter: `[*, m, m]` like shifts, or float64 if there are axes: with z = h − s_y, or z = axes · (h − s_y) if
            there are axes, Σ zzᵀ over all samples. Only the elements on and below the diagonal are valid. None: not
            kept.
        axes: `[*, m, d]` like shifts, the directions in which the scatter is kept; None: all (m = d).
        refused: `[3]` int64, counts: refused batches, their labels out of range, their values that are not finite.
    """

    counts: Tensor
    shifts: Tensor
    sums: Tensor
    squares: Tensor
    scatter: Tensor | None
    axes: Tensor | None
    refused: Tensor

    @classmethod
    def empty(
        cls, classes: int, dim: int, *, runs: int | None = None, scatter: bool = True, axes: Tensor | None = None,
        dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
    ) -> "State":  # fmt: skip
        """Statistics of no samples; `dtype` is that of shifts and scatter, to which axes are converted."""
        lead = () if runs is None else (runs,)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=dtype, device=device)

        m = dim if axes is None else axes.shape[-2]
        return cls(
            counts=torch.zeros(classes, dtype=torch.int64, device=device),
            shifts=zeros(classes, dim, dtype=dtype),
            sums=zeros(classes, dim),
            squares=zeros(classes),
            scatter=zeros(m, m, dtype=dtype if axes is None else torch.float64) if scatter else None,
            axes=None if axes is None else axes.to(device=device, dtype=dtype).contiguous(),
            refused=torch.zeros(3, dtype=torch.int64, device=device),
        )

    def to(self, device: torch.device | str) -> "State":
        """Copy to another device."""
        return State._make(t if t is None else t.to(device) for t in self)


@torch.no_grad()
def class_stats_reference(features: Tensor, labels: Tensor, state: State, propagate: bool = False) -> None:
    """Add a batch to the statistics, in place; a batch with a wrong label or a NaN changes only `refused`.

    Args:
        features: `[*, B, d]`, any floating dtype.
        labels: `[B]` int64 in [0, K), shared by the stacked runs.
        propagate: accept values that are not finite; the statistics of their run then become NaN.
    """
    counts, shifts, sums, squares, scatter, axes, refused = state
    k = len(counts)
    bad_labels = int(((labels < 0) | (labels >= k)).sum())
    bad_values = 0 if propagate else int(features.isfinite().logical_not().sum())
    if bad_labels or bad_values:
        refused += torch.tensor([1, bad_labels, bad_values], device=refused.device)
        return
    if labels.numel() == 0:
        return
    one_hot = torch.nn.functional.one_hot(labels, k)
    move_shifts(features, one_hot, state)
    counts += one_hot.sum(0)
    centred = centre_reference(features, labels, shifts)
    weights, exact = one_hot.double().T, centred.double()
    sums += weights @ exact
    squares += (weights @ exact.square().sum(-1, keepdim=True)).squeeze(-1)
    if scatter is not None:
        z = centred if axes is None else centred @ axes.mT
        scatter += z.mT @ z


def move_shifts(features: Tensor, one_hot: Tensor, state: State) -> None:
    """Set the shifts of new classes, and move those that lie far from their class's samples, before a batch is added.

    The shift of a new class is the median, coordinate by coordinate, of its first three samples in the batch; the first
    sample if there are fewer. That of another class is looked at when its number of samples reaches a new power of two
    with this batch. Of its n samples before, and of the first `SAMPLES` in the batch if there were fewer before, let o
    be the mean of h − s and n v the sum of ‖h − s − o‖². If n' ‖o‖² > `FAR` · n v, where n' counts all samples with the
    batch, the class gets a shift as if it were new: after an outlier, samples of the batch are nearer than the mean.

    The rounding error of the second moment is that of Σ ‖h − s‖², so it stays within a few times that of the second
    moment itself.

    Args:
        features, one_hot: `[*, B, d]`, and `[B, K]` of the labels.
    """
    counts, shifts, sums, squares, *_ = state
    in_batch, rank = one_hot.sum(0), one_hot.cumsum(0)
    look = bit_length(counts + in_batch) > bit_length(counts)
    if not look.any():
        return
    h = features.to(shifts.dtype)
    # argmax returns the first of equal values: the class's first sample, or its second or third, in this batch.
    three = torch.stack([h[..., (one_hot * (rank == i)).argmax(0), :] for i in (1, 2, 3)])
    start = torch.where((in_batch >= 3).unsqueeze(-1), three.median(0).values, three[0])
    shifts.copy_(torch.where(((counts == 0) & look).unsqueeze(-1), start, shifts))
    used = (one_hot * ((rank <= SAMPLES) & (counts < SAMPLES))).double().T
    centred = centre_reference(features, one_hot.argmax(1), shifts.double())
    n = counts + used.sum(1)
    distance = ((sums + used @ centred) / n.unsqueeze(-1)).square().sum(-1)
    total = squares + (used @ centred.square().sum(-1, keepdim=True)).squeeze(-1)
    far = (counts > 0) & look & ((counts + in_batch) * distance > FAR * (total - n * distance))
    if far.any():
        for kept, value in zip(state, moved(state, torch.where(far.unsqueeze(-1), start, shifts)), strict=True):
            if kept is not None and value is not None:
                kept.copy_(value)


def bit_length(counts: Tensor) -> Tensor:
    """Return the number of binary digits of integers, 0 for 0."""
    return torch.frexp(counts.double()).exponent


def moved(state: State, shifts: Tensor) -> State:
    """Compute the sums about other shifts `[*, K, d]`, in float64; those of a class without samples are zero."""
    counts, sums = state.counts.double().unsqueeze(-1), state.sums
    offset = torch.where(counts > 0, state.shifts.double() - shifts.double(), 0.0)
    squares = state.squares + 2 * (offset * sums).sum(-1) + (counts * offset.square()).sum(-1)
    scatter = None
    if state.scatter is not None:
        z, by = (sums, offset) if state.axes is None else (t @ state.axes.double().mT for t in (sums, offset))
        cross = z.mT @ by
        scatter = state.scatter.double() + cross + cross.mT + (counts * by).mT @ by
    return state._replace(
        counts=state.counts.clone(), shifts=shifts, sums=sums + counts * offset, squares=squares, scatter=scatter
    )


def centre_reference(features: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """h − s_y, `[*, B, d]` in the dtype of the shifts `[*, K, d]`."""
    return features.to(shifts.dtype) - shifts[..., labels, :]


def project_reference(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """axes · (h − s_y), `[*, B, m]` in the dtype of the shifts `[*, K, d]` and of the axes `[*, m, d]`."""
    return centre_reference(features, labels, shifts) @ axes.mT
