"""The maximum over space and a linear head on a GPU: the Triton kernels and their launchers.

In a step of ResNet9 these are small operations, each of them shorter than its launch: 12 launches by torch's own
operations, two here, one of which does all of backward. Arithmetic is in float32, and the products of the head are
IEEE's, never rounded to tf32. Sums are taken in a fixed order, so that results are reproducible on a device. No
launcher synchronises with the GPU.

The arguments of both kernels (R runs, B samples, P = H·W pixels, C channels of a run, K classes):

- `maps`, `maps_grad`: `[B, P, R·C]` in memory (channels-last), in float32, bfloat16 or float16;
- `features` `[R, B, C]` in the maps' dtype and `ties` `[R, B, C]` float32: the maximum of each channel, and how many
  pixels have it;
- `weight` `[R, K, C]`, `bias` `[R, K]`, `logits` `[R, B, K]`, and their gradients: float32, contiguous.

A program of COLUMNS channels takes all channels of a run, PIXELS pixels or CLASSES classes at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a tile, 32 per thread. Maps of 3 × 3 or 4 × 4 with 512 channels are one tile; so is the weight of 16
#: classes.
ELEMENTS = 8192
#: The most channels of a run: with more, a tile would hold less than four pixels.
MOST_CHANNELS = 2048
#: Tile of the weight's gradient: samples, classes and channels. A program adds all samples of its classes and
#: channels; 128 samples are two rounds.
SAMPLES, GRAD_CLASSES, GRAD_COLUMNS = 64, 16, 16
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["batch"])
def pooled_head_forward_kernel(
    maps_ptr, weight_ptr, bias_ptr, features_ptr, ties_ptr, logits_ptr, runs, batch, pixels, channels, classes,
    HAS_BIAS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Features, ties and logits: a program computes one sample of one run."""
    run, sample = tl.program_id(0) % runs, tl.program_id(0) // runs
    row = run.to(tl.int64) * batch + sample
    column = tl.arange(0, COLUMNS)
    inside = column < channels
    # 1. Find the maximum and its ties, tile by tile. NaN is counted aside, whatever tl.max makes of it.
    largest, ties = tl.full([COLUMNS], -float("inf"), tl.float32), tl.zeros([COLUMNS], tl.float32)
    nans = tl.zeros([COLUMNS], tl.float32)
    weight = _weight_tile(weight_ptr, run, tl.arange(0, CLASSES), column, classes, channels)  # waits with the maps
    for begin in range(0, pixels, PIXELS):
        at, mask = _pixels(begin, run, sample, column, runs, pixels, channels, PIXELS)
        x = tl.load(maps_ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
        before, is_nan = largest, x != x
        largest = tl.maximum(largest, tl.max(tl.where(is_nan, -float("inf"), x), 0))
        equal = tl.sum(((x == largest[None, :]) & mask).to(tl.float32), 0)
        ties = tl.where(largest == before, ties, 0.0) + equal
        nans += tl.sum(is_nan.to(tl.float32), 0)
    feature = tl.where(nans > 0, float("nan"), largest)
    ties = tl.where(nans > 0, 0.0, ties)  # as NaN equals no pixel
    tl.store(features_ptr + row * channels + column, feature.to(features_ptr.dtype.element_ty), mask=inside)
    tl.store(ties_ptr + row * channels + column, ties, mask=inside)
    # 2. Compute the logits.
    feature = tl.where(inside, feature, 0.0)
    for begin in range(0, classes, CLASSES):
        k = begin + tl.arange(0, CLASSES)
        logits = tl.sum(weight * feature[None, :], 1)
        if HAS_BIAS:
            logits += tl.load(bias_ptr + run * classes + k, mask=k < classes, other=0.0)
        tl.store(logits_ptr + row * classes + k, logits, mask=k < classes)
        weight = _weight_tile(weight_ptr, run, k + CLASSES, column, classes, channels)


@triton.jit(do_not_specialize=["batch", "parts"])
def pooled_head_backward_kernel(
    logits_grad_ptr, features_grad_ptr, maps_ptr, weight_ptr, features_ptr, ties_ptr,
    maps_grad_ptr, weight_grad_ptr, bias_grad_ptr, runs, batch, pixels, channels, classes, parts,
    HAS_FEATURES_GRAD: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
    SAMPLES: tl.constexpr, GRAD_CLASSES: tl.constexpr, GRAD_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first `parts` programs compute the gradients of weight and bias, which take longest, the others of the maps.

    Args:
        features_grad_ptr: of what else the features are used for, `[R, B, C]` in the maps' dtype, or unused.
    """
    if tl.program_id(0) < parts:
        _weight_gradient(
            tl.program_id(0), logits_grad_ptr, features_ptr, weight_grad_ptr, bias_grad_ptr,
            batch, channels, classes, SAMPLES, GRAD_CLASSES, GRAD_COLUMNS,
        )  # fmt: skip
    else:
        _maps_gradient(
            tl.program_id(0) - parts, logits_grad_ptr, features_grad_ptr, maps_ptr, weight_ptr, features_ptr, ties_ptr,
            maps_grad_ptr, runs, batch, pixels, channels, classes, HAS_FEATURES_GRAD, PIXELS, CLASSES, COLUMNS,
        )  # fmt: skip


@triton.jit
def _pixels(begin, run, sample, column, runs, pixels, channels, PIXELS: tl.constexpr):
    """Offsets in the maps, and which of them exist, of pixels from `begin` on, `[PIXELS, COLUMNS]`."""
    pixel = begin + tl.arange(0, PIXELS)
    row = sample.to(tl.int64) * pixels + pixel
    at = row[:, None] * (runs * channels) + (run * channels + column)[None, :]
    return at, (pixel < pixels)[:, None] & (column < channels)[None, :]


@triton.jit
def _weight_tile(weight_ptr, run, k, column, classes, channels):
    """The weights `[CLASSES, COLUMNS]` of some classes of a run, zero outside."""
    at = (run * classes + k).to(tl.int64)[:, None] * channels + column[None, :]
    return tl.load(weight_ptr + at, mask=(k < classes)[:, None] & (column < channels)[None, :], other=0.0)


@triton.jit
def _weight_gradient(
    part, logits_grad_ptr, features_ptr, weight_grad_ptr, bias_grad_ptr, batch, channels, classes,
    SAMPLES: tl.constexpr, GRAD_CLASSES: tl.constexpr, GRAD_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum of the logits' gradients, times the features for the weight, over all samples of a run."""
    blocks, class_blocks = tl.cdiv(channels, GRAD_COLUMNS), tl.cdiv(classes, GRAD_CLASSES)
    run, block = part // (blocks * class_blocks), part % blocks
    k = part // blocks % class_blocks * GRAD_CLASSES + tl.arange(0, GRAD_CLASSES)
    column = block * GRAD_COLUMNS + tl.arange(0, GRAD_COLUMNS)
    inside, known = column < channels, k < classes
    weight_grad = tl.zeros([GRAD_CLASSES, GRAD_COLUMNS], tl.float32)
    bias_grad = tl.zeros([GRAD_CLASSES], tl.float32)
    for begin in range(0, batch, SAMPLES):
        sample = begin + tl.arange(0, SAMPLES)
        row = run.to(tl.int64) * batch + sample
        g = tl.load(
            logits_grad_ptr + row[None, :] * classes + k[:, None],
            mask=known[:, None] & (sample < batch)[None, :], other=0.0,
        )  # fmt: skip
        feature = tl.load(
            features_ptr + row[:, None] * channels + column[None, :],
            mask=(sample < batch)[:, None] & inside[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        weight_grad = tl.dot(g, feature, weight_grad, input_precision="ieee")
        bias_grad += tl.sum(g, 1)
    at = (run * classes + k).to(tl.int64)[:, None] * channels + column[None, :]
    tl.store(weight_grad_ptr + at, weight_grad, mask=known[:, None] & inside[None, :])
    if block == 0:
        tl.store(bias_grad_ptr + run * classes + k, bias_grad, mask=known)


@triton.jit
def _maps_gradient(
    program, logits_grad_ptr, features_grad_ptr, maps_ptr, weight_ptr, features_ptr, ties_ptr, maps_grad_ptr,
    runs, batch, pixels, channels, classes,
    HAS_FEATURES_GRAD: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The features' gradient of one sample of one run, shared evenly by the pixels that have the maximum."""
    run, sample = program % runs, program // runs
    row = run.to(tl.int64) * batch + sample
    column = tl.arange(0, COLUMNS)
    inside = column < channels
    at, mask = _pixels(0, run, sample, column, runs, pixels, channels, PIXELS)
    x = tl.load(maps_ptr + at, mask=mask, other=0.0)  # waits with the weights
    feature = tl.load(features_ptr + row * channels + column, mask=inside, other=0.0).to(tl.float32)
    ties = tl.load(ties_ptr + row * channels + column, mask=inside, other=1.0)
    grad = tl.zeros([COLUMNS], tl.float32)
    for begin in range(0, classes, CLASSES):
        k = begin + tl.arange(0, CLASSES)
        g = tl.load(logits_grad_ptr + row * classes + k, mask=k < classes, other=0.0)
        grad += tl.sum(g[:, None] * _weight_tile(weight_ptr, run, k, column, classes, channels), 0)
    if HAS_FEATURES_GRAD:
        grad += tl.load(features_grad_ptr + row * channels + column, mask=inside, other=0.0).to(tl.float32)
    share = grad / ties
    for begin in range(0, pixels, PIXELS):
        # A product, as autograd has it: a gradient that is not finite, or a maximum of NaN, makes all pixels NaN.
        out = share[None, :] * (x.to(tl.float32) == feature[None, :]).to(tl.float32)
        tl.store(maps_grad_ptr + at, out.to(maps_grad_ptr.dtype.element_ty), mask=mask)
        at, mask = _pixels(begin + PIXELS, run, sample, column, runs, pixels, channels, PIXELS)
        x = tl.load(maps_ptr + at, mask=mask, other=0.0)


def launch_forward(
    maps: Tensor, weight: Tensor, bias: Tensor | None, features: Tensor, ties: Tensor, logits: Tensor
) -> None:
    """Write features, ties and logits into the last three."""
    runs, batch, classes = logits.shape
    channels, pixels = weight.shape[2], maps.shape[2] * maps.shape[3]
    if not batch:
        return
    with torch.cuda.device_of(maps):  # Triton launches on the current device
        pooled_head_forward_kernel[(runs * batch,)](
            maps, weight, weight if bias is None else bias, features, ties, logits,
            runs, batch, pixels, channels, classes, bias is not None, *tile(pixels, classes, channels), **OPTIONS,
        )  # fmt: skip


def launch_backward(
    logits_grad: Tensor, features_grad: Tensor | None, maps: Tensor, weight: Tensor, features: Tensor, ties: Tensor,
    maps_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of maps, weight and bias into the last three; those of logits and features are contiguous."""
    runs, batch, classes = logits_grad.shape
    channels, pixels = weight.shape[2], maps.shape[2] * maps.shape[3]
    parts = runs * -(-channels // GRAD_COLUMNS) * -(-classes // GRAD_CLASSES)
    with torch.cuda.device_of(maps):
        pooled_head_backward_kernel[(parts + runs * batch,)](
            logits_grad, features if features_grad is None else features_grad, maps, weight, features, ties,
            maps_grad, weight_grad, bias_grad, runs, batch, pixels, channels, classes, parts,
            features_grad is not None, *tile(pixels, classes, channels),
            SAMPLES, GRAD_CLASSES, GRAD_COLUMNS, **OPTIONS,
        )  # fmt: skip


def tile(pixels: int, classes: int, channels: int) -> tuple[int, int, int]:
    """PIXELS, CLASSES and COLUMNS: powers of two."""
    columns = _power_of_two(channels)
    most = ELEMENTS // columns
    return min(most, _power_of_two(pixels)), min(most, _power_of_two(classes)), columns


def _power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()
