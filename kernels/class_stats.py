"""Counts, sums and scatter of the features of each class in one pass: plain-PyTorch reference.

Everything is accumulated about a shift per class, set to the class's first sample. Sums about a point that lies as near
to the class as its samples lie to each other keep their digits when collapse is nearly total and the features sit far
from the origin, where E[xxᵀ] − μμᵀ, or one global shift, leaves only rounding.
"""

import torch
from torch import Tensor


@torch.no_grad()
def class_stats_reference(
    features: Tensor, labels: Tensor, counts: Tensor, shifts: Tensor, sums: Tensor, scatter: Tensor
) -> None:
    """Add a batch to the statistics, in place.

    Args:
        features: `[*, B, d]`, any floating dtype; `*` is nothing or the stacked runs R.
        labels: `[B]` int64 in [0, K), shared by the stacked runs.
        counts: `[K]` int64.
        shifts: `[*, K, d]`, the point s_k about which class k is summed; set where counts[k] was 0.
        sums: `[*, K, d]`, Σ (h − s_k) over the samples of class k.
        scatter: `[*, d, d]`, Σ (h − s_y)(h − s_y)ᵀ over all samples.
    """
    if labels.numel() == 0:
        return
    one_hot = torch.nn.functional.one_hot(labels, counts.shape[0])
    in_batch = one_hot.sum(0)
    # argmax gives the first of equal values: the class's first sample in this batch.
    first = features[..., one_hot.argmax(0), :].to(shifts.dtype)
    new = (counts == 0) & (in_batch > 0)
    shifts.copy_(torch.where(new.unsqueeze(-1), first, shifts))
    counts += in_batch
    centred = features.to(shifts.dtype) - shifts[..., labels, :]
    sums += one_hot.to(shifts.dtype).T @ centred
    scatter += centred.mT @ centred
