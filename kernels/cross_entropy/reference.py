"""The gradient of a mean cross-entropy: plain-PyTorch reference, and what CPUs use."""

import torch
from torch import Tensor


@torch.no_grad()
def cross_entropy_slope_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """As `cross_entropy_slope`, of any floating dtype."""
    label = labels.expand(logits.shape[:2]).unsqueeze(-1)
    others = logits.softmax(-1).scatter_(-1, label, 0.0)
    # Minus the sum of the others, not p − 1: once p is nearly 1 that is rounding, and a row sum that is not zero.
    return others.scatter_(-1, label, -others.sum(-1, keepdim=True)) / logits.shape[1]
