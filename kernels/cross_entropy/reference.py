"""The gradient of a mean cross-entropy: plain-PyTorch reference, which also runs on CPUs."""

import torch
from torch import Tensor


@torch.no_grad()
def cross_entropy_grad_reference(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """As `cross_entropy_grad`, for any floating dtype."""
    label = labels.expand(logits.shape[:2]).unsqueeze(-1)
    others = logits.softmax(-1)
    if label_smoothing:
        others -= label_smoothing / logits.shape[-1]
    others.scatter_(-1, label, 0.0)
    # Minus the sum of the others, not p − 1: for p near 1 that is only rounding error, and the row sum is not zero.
    return others.scatter_(-1, label, others.sum(-1, keepdim=True).neg_()).div_(logits.shape[1])
