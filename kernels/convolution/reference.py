"""Convolutions of 3 × 3 filters, with one pixel of zeros around the maps: plain-PyTorch reference."""

from torch import Tensor
from torch.nn import functional as F


def small_convolution_reference(x: Tensor, weight: Tensor) -> Tensor:
    """As `small_convolution`, for any floating dtype, shape and layout."""
    return F.conv2d(x, weight, padding=1)


def small_convolution_input_grad_reference(grad: Tensor, weight: Tensor) -> Tensor:
    """As `small_convolution_input_grad`, for any floating dtype, shape and layout."""
    return F.conv_transpose2d(grad, weight, padding=1)
