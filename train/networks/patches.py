"""A convolution of images with few channels as one matrix product.

Libraries of convolutions are made for many channels. As a product the first layer of ResNet9, one channel to 64 at
28 × 28 in batches of 128, takes 18 µs forward and backward on an H100 (bench/results/cnn-cuda.json, `aten::mm`), little
more than writing and reading its maps.
"""

from torch import Tensor
from torch.nn import functional as F

#: Values of a patch that are few, and what their number is rounded up to: rows of 16 bytes and more in half precision.
FEW, MULTIPLE = 32, 16


def few(weight: Tensor) -> bool:
    """Whether filters `[O, C, h, w]` have so few values that they go as a product."""
    return weight[0].numel() <= FEW


def convolve(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """`F.conv2d` with strides of 1 and zeros around, of images that need no gradient.

    Args:
        images: `[N, C, H, W]`.
        weight: `[O, C, h, w]`, of the images' dtype.
        padding: rows and columns of zeros on each side.

    Returns:
        `[N, O, H', W']`, channels-last.
    """
    (down, across), size = padding, weight.shape[1:]
    values = size.numel()
    windows = F.pad(images, (across, across, down, down)).unfold(2, size[1], 1).unfold(3, size[2], 1)
    samples, _, height, width = windows.shape[:4]
    columns = -(-values // MULTIPLE) * MULTIPLE
    patches = images.new_zeros(samples, height, width, columns)
    patches[..., :values].unflatten(-1, size).copy_(windows.permute(0, 2, 3, 1, 4, 5))
    filters = F.pad(weight.flatten(1), (0, columns - values))
    return (patches.flatten(0, 2) @ filters.T).view(samples, height, width, len(weight)).permute(0, 3, 1, 2)
