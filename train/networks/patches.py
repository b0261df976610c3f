"""Compute a convolution of images with few channels as one matrix product.

Convolution libraries are optimised for many channels. As a matrix product the first layer of ResNet9, one channel to 64
at 28 × 28 in batches of 128, takes 18 µs forward and backward on an H100 (bench/results/cnn-cuda.json, `aten::mm`),
little more than writing and reading its maps.
"""

from torch import Tensor
from torch.nn import functional as F

#: The most values per filter for which the matrix product is used.
MAX_VALUES = 32
#: Rows of the patch matrix are padded to a multiple of this, so that they are aligned to 16 bytes in half precision.
ROW_MULTIPLE = 16


def is_small_filter(weight: Tensor) -> bool:
    """Return whether filters `[O, C, h, w]` have so few values that `convolve` is the faster way."""
    return weight[0].numel() <= MAX_VALUES


def convolve(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Compute `F.conv2d` with stride 1 and zero padding, of images that need no gradient.

    Args:
        images: `[N, C, H, W]`.
        weight: `[O, C, h, w]`, of the images' dtype.
        padding: rows and columns of zeros on each side.

    Returns:
        `[N, O, H', W']`, channels-last.
    """
    (rows, cols), size = padding, weight.shape[1:]
    values = size.numel()
    windows = F.pad(images, (cols, cols, rows, rows)).unfold(2, size[1], 1).unfold(3, size[2], 1)
    samples, _, height, width = windows.shape[:4]
    columns = -(-values // ROW_MULTIPLE) * ROW_MULTIPLE
    patches = images.new_zeros(samples, height, width, columns)
    patches[..., :values].unflatten(-1, size).copy_(windows.permute(0, 2, 3, 1, 4, 5))
    filters = F.pad(weight.flatten(1), (0, columns - values))
    return (patches.flatten(0, 2) @ filters.T).view(samples, height, width, len(weight)).permute(0, 3, 1, 2)
