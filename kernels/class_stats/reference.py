"""What a batch of features adds to the statistics of its classes: plain-PyTorch reference.

Everything is accumulated about a shift per class, set to the class's first sample. Sums about a point that lies as near
to the class as its samples lie to each other keep their digits when collapse is nearly total and the features sit far
from the origin, where E[xxᵀ] − μμᵀ, or one global shift, leaves only rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """The statistics of K classes of d features; `*` is nothing or the stacked runs R. All on one device.

    Attributes:
        counts: `[K]` int64, samples of each class.
        shifts: `[*, K, d]` float32 or float64, the point s_k about which class k is summed; set where counts[k] was 0.
        sums: `[*, K, d]` like shifts, Σ (h − s_k) over the samples of class k.
        squares: `[*, K]` like shifts, Σ ‖h − s_k‖² over the samples of class k.
        scatter: `[*, m, m]` like shifts: with z = h − s_y, or z = axes · (h − s_y) if there are axes, Σ zzᵀ over all
            samples. Only what stands on and below the diagonal counts. None: not kept.
        axes: `[*, m, d]` like shifts, the directions of which the scatter is kept; None: of all (m = d).
        refused: `[3]` int64: batches that were refused, and in these the labels out of range and the values that are
            not finite.
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
        cls,
        classes: int,
        dim: int,
        *,
        runs: int | None = None,
        scatter: bool = True,
        axes: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "State":
        """Statistics of nothing yet; `dtype` is that of the sums, axes are moved to it and to the device."""
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
        """The same on another device."""
        return State._make(t if t is None else t.to(device) for t in self)


@torch.no_grad()
def class_stats_reference(features: Tensor, labels: Tensor, state: State, propagate: bool = False) -> None:
    """Add a batch to the statistics, in place; one with a label out of range or a NaN changes nothing but `refused`.

    Args:
        features: `[*, B, d]`, any floating dtype.
        labels: `[B]` int64 in [0, K), shared by the stacked runs.
        propagate: add values that are not finite all the same; the statistics of their run are then NaN.
    """
    counts, shifts, sums, squares, scatter, axes, refused = state
    k = counts.shape[0]
    bad_labels = int(((labels < 0) | (labels >= k)).sum())
    bad_values = 0 if propagate else int(features.isfinite().logical_not().sum())
    if bad_labels or bad_values:
        refused += torch.tensor([1, bad_labels, bad_values], device=refused.device)
        return
    if labels.numel() == 0:
        return
    one_hot = torch.nn.functional.one_hot(labels, k)
    in_batch = one_hot.sum(0)
    # argmax gives the first of equal values: the class's first sample in this batch.
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
    """axes · (h − s_y), `[*, B, m]` in the dtype of the shifts.

    Args:
        features: `[*, B, d]`, any floating dtype.
        labels: `[B]` int64 in [0, K).
        shifts: `[*, K, d]` float32 or float64.
        axes: `[*, m, d]` like shifts.
    """
    return centre_reference(features, labels, shifts) @ axes.mT
