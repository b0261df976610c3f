"""`small_convolution`, the gradient of its maps, and which convolutions they are used for."""

import torch
from torch import Tensor

from ncollapse.kernels import operators

#: Whether the values, and the gradients of maps, are computed by the kernels where `fits` says so. Off: unmeasured as
#: they are here (`python -m bench.step_times` times both). By a prototype and a model gradients take 25 µs from a step
#: of ResNet9, but 5 where weights' gradients run beside them, values 6 at most; two runs side by side lose 5 to 14.
#: Before one is turned on for good, `_runs_on` must ask for Triton 3.7.1 from compute capability 9.0 on: older ones put
#: no fence (`fence.proxy.async`) between asynchronous copies and the products that read what was copied.
VALUES, GRADIENTS = False, False
#: The most pixels of a map: at 3 × 3 cuDNN computes 81 taps of which 49 are inside; at 7 × 7, 441 of which 361 are, and
#: there the prototype was no faster. With fewer images half of a tile is idle, with more cuDNN fills the GPU; with
#: fewer channels there is nothing to share.
MOST_PIXELS, IMAGES, LEAST_CHANNELS = 9, (64, 256), 256
#: Channels must be a multiple of this, the width of a tile.
MULTIPLE = 128
#: Bytes of shared memory that a program has room in: four stages of 32 KB, and barriers. Data centres' GPUs have it.
SHARED = 129 * 2**10
_LARGEST = 2**31  # offsets within a tensor are int32


def small_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `F.conv2d(x, weight, padding=1)` without the products with zeros outside the maps.

    Products are summed in float32, in a fixed order, and rounded once. What is outside a map is left out, not
    multiplied: there a weight that is not finite makes no NaN.

    Args:
        x: `[N, C, H, W]` bfloat16, channels-last, on a GPU.
        weight: `[O, C, 3, 3]` bfloat16, channels-last; C and O are multiples of 128.

    Returns:
        `[N, O, H, W]` bfloat16, channels-last. It has no gradient: `small_convolution_input_grad` is the one of x.

    Raises:
        ValueError: other shapes, dtypes or layouts.
    """
    return _computed(x, weight, flip=False)


def small_convolution_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of x in `small_convolution(x, weight)`.

    Args:
        grad: `[N, O, H, W]` bfloat16, channels-last: the gradient of the result.
        weight: `[O, C, 3, 3]` bfloat16, channels-last; C and O are multiples of 128.

    Returns:
        `[N, C, H, W]` bfloat16, channels-last.

    Raises:
        ValueError: other shapes, dtypes or layouts.
    """
    return _computed(grad, weight, flip=True)


def _computed(x: Tensor, weight: Tensor, *, flip: bool) -> Tensor:
    from ncollapse.kernels.convolution import gpu

    if reason := why_refused(x, weight, flip=flip):
        raise ValueError(f"small convolutions take {reason}; torch.nn.functional.conv2d takes others")
    samples, _, height, width = x.shape
    out = torch.empty(
        samples, weight.shape[int(flip)], height, width, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    gpu.launch_convolution(x, weight, flip, out)
    return out


def why_refused(x: Tensor, weight: Tensor, *, flip: bool = False) -> str | None:
    """What maps, or with `flip` gradients of the result, and weights lack for the kernels; None if nothing."""
    tensors, shapes = (x, weight), f"not {tuple(x.shape)} and {tuple(weight.shape)}"
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[2:] != (3, 3) or x.shape[1] != weight.shape[int(not flip)]:
        return f"maps [N, C, H, W] and weights [O, C, 3, 3], {shapes}"
    if any(channels % MULTIPLE or not channels for channels in weight.shape[:2]):
        return f"channels by multiples of {MULTIPLE}, {shapes}"
    if any(t.dtype != torch.bfloat16 for t in tensors) or x.device != weight.device:
        return f"bfloat16 on one device, not {x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
    if not all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
        return "channels-last maps and weights, not strides " + " and ".join(str(t.stride()) for t in tensors)
    if max(len(x) * x.shape[2] * x.shape[3] * max(weight.shape[:2]), weight.numel()) >= _LARGEST:
        return f"less than 2³¹ elements, {shapes}"
    return None


def fits(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...] | str, dilation: tuple[int, ...],
    groups: int,
) -> bool:  # fmt: skip
    """Return whether the kernels compute this convolution of one run, and are expected to be the faster way.

    Args:
        x: `[N, C, H, W]`.
        weight: `[O, C', h, w]`, in the dtype of the product.
        stride, padding, dilation, groups: of `F.conv2d`.
    """
    if groups != 1 or stride != (1, 1) or dilation != (1, 1) or padding != (1, 1):
        return False
    if x.device.type != "cuda" or why_refused(x, weight) is not None:
        return False
    large = x.shape[2] * x.shape[3] > MOST_PIXELS or min(weight.shape[:2]) < LEAST_CHANNELS
    return not large and IMAGES[0] <= len(x) <= IMAGES[1] and _runs_on(x.device)


def _runs_on(device: torch.device) -> bool:
    """Whether a device has the instructions and the memory: NVIDIA's for data centres, from compute capability 8.0."""
    if operators.why_no_kernel(device) is not None or torch.version.hip is not None:
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 8 and properties.shared_memory_per_block_optin >= SHARED
