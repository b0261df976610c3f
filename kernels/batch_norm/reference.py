"""Batch norm, ReLU, and pooling or a residual: plain-PyTorch reference."""

from torch import Tensor
from torch.nn import functional as F


def batch_norm_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    train: bool, momentum: float, eps: float, pool: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """As `batch_norm_relu`, for any floating dtype and layout."""
    y = F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, train, momentum, eps))
    if pool:
        y = F.max_pool2d(y, 2)
    return y if residual is None else residual + y
