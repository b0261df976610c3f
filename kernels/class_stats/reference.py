"""How a batch of features changes the statistics of its classes: plain-PyTorch reference.

All sums are relative to a shift per class, the class's first sample, which is as close to the class's samples as they
are to each other. So sums stay accurate when collapse is nearly complete and the features are far from the origin,
where E[xxᵀ] − μμᵀ, or one global shift, leaves only rounding errors.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """The statistics of K classes of d features; `*` is empty or the stacked runs R. All on one device.

    Attributes:
        counts: `[K]` int64, samples of each class.
        shifts: `[*, K, d]` float32 or float64, the shift s_k of class k; set when the class's first sample arrives.
        sums: `[*, K, d]` like shifts, Σ (h − s_k) over the samples of class k.
        squares: `[*, K]` like shifts, Σ ‖h − s_k‖² over the samples of class k.
        scatter: `[*, m, m]` like shifts: with z = h − s_y, or z = axes · (h − s_y) if there are axes, Σ zzᵀ over all
            samples. Only the elements on and below the diagonal are valid. None: not kept.
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
        """Statistics of no samples; `dtype` is that of the sums, to which axes are converted."""
        lead = () if runs is None else (runs,)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*lead, *shape, dtype=dtype, device=device)

        m = dim if axes is None else axes.shape[-2]
        return cls(
            counts=torch.zeros(classes, dtype=torch.int64, device=device),
            shifts=zeros(classes, dim),
            sums=zeros(classes, dim),
            squares=zeros(classes),
            scatter=zeros(m, m) if scatter else None,
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
    in_batch = one_hot.sum(0)
    # argmax returns the first of equal values: the class's first sample in this batch.
    first = features[..., one_hot.argmax(0), :].to(shifts.dtype)
    new = (counts == 0) & (in_batch > 0)
    shifts.copy_(torch.where(new.unsqueeze(-1), first, shifts))
    counts += in_batch
    centred = centre_reference(features, labels, shifts)
    weights = one_hot.to(shifts.dtype).T
    sums += weights @ centred
    squares += (weights @ centred.square().sum(-1, keepdim=True)).squeeze(-1)
    if scatter is not None:
        z = centred if axes is None else centred @ axes.mT
        scatter += z.mT @ z


def centre_reference(features: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """h − s_y, `[*, B, d]` in the dtype of the shifts `[*, K, d]`."""
    return features.to(shifts.dtype) - shifts[..., labels, :]


def project_reference(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """axes · (h − s_y), `[*, B, m]` in the dtype of the shifts `[*, K, d]` and of the axes `[*, m, d]`."""
    return centre_reference(features, labels, shifts) @ axes.mT
