"""Batch norm with ReLU on a GPU: what its Triton kernels are launched with.

All of it waits for memory, so the maps are moved as seldom as the mathematics allows. Forward reads x for mean and
variance (`moments`), and once more to write the result (`apply`). Backward reads x and the gradient for two sums a
channel, and once more to write the gradient of x. Nothing else of the size of a map is written or kept: what ReLU and
pooling let through is worked out from x again.

Sums are taken in parts that a second kernel adds in their order, without floating-point atomics: the same bits every
time on a device. Nobody waits for the GPU.

The constants below are arithmetic. With them the kernels take 286 µs of a step of ResNet9 on an H100, where moving the
maps alone takes 150 to 175 (bench/results/cnn-cuda.json); other constants have not been tried.
"""

import torch
from torch import Tensor

from ncollapse.kernels.batch_norm.gpu_kernels import (
    apply_kernel,
    backward_kernel,
    finish_moments_kernel,
    finish_sums_kernel,
    moments_kernel,
    sums_kernel,
)
from ncollapse.kernels.operators import multiprocessors

#: Channels of a program at most: 128 bytes of a row in half precision, a whole cache line.
COLUMNS = 64
#: Elements of a map that the 128 threads of a program sum at a time, 16 each: two 128-bit loads in half precision, four
#: in float32, and 32 registers for the two sums.
SUMMED = 2048
#: Bytes of a map that a program writes, 64 a thread: four 128-bit loads of each map that is read are under way at once,
#: and what else it loads, 16 bytes a channel, is an eighth of a map (COLUMNS · 16 of 8192) and comes from the caches.
WRITTEN = 8192
#: Pooling windows at a time, of four pixels each: with 8 a thread, its five maps are one 128-bit load each.
WINDOWS = 1024
#: Of every launch. A product and a sum in one rounding are as good as in two.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": 128}
#: Programs to a multiprocessor that sums are cut for: with 512 threads of two loads each, 16 KB are under way on it,
#: about what 3.35 TB/s over 132 multiprocessors takes at a latency of 0.7 µs; 128 registers a thread let them all in.
PROGRAMS = 4
#: Parts at most, all of which a finishing program loads at once, of so many channels: 32 bytes, the least that memory
#: gives, so that 64 channels make eight programs.
PARTS, FINISHED = 512, 8
FINISH_OPTIONS = OPTIONS | {"num_warps": 8}


def columns(channels: int) -> int:
    """Channels that a program takes."""
    return min(COLUMNS, 1 << (channels - 1).bit_length())


def elements(dtype: torch.dtype, pool: bool) -> int:
    """Elements that a program writes, or windows that it goes through."""
    return WINDOWS if pool else WRITTEN // dtype.itemsize


def moments(
    x: Tensor, mean: Tensor, rstd: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> None:
    """Mean and 1/√(variance + eps) of each channel of x into `mean` and `rstd` `[C]`; running statistics in place."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    across = columns(channels)
    blocks, tile = _blocks(channels, across), SUMMED // across
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rows_each, parts = _cut(rows, tile, blocks, x.device)
        partial = x.new_empty(3, parts, channels, dtype=torch.float32)
        moments_kernel[(parts * blocks,)](x, rows, rows_each, channels, partial, tile, across, **OPTIONS)
        finish_moments_kernel[(_blocks(channels, FINISHED),)](
            partial, parts, rows, rows_each, channels, mean, rstd, running_mean, running_var, momentum, eps,
            PARTS, FINISHED, **FINISH_OPTIONS,
        )  # fmt: skip


def apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, pool: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """The result into `out`, which has its shape, dense and channels-last as x and the residual."""
    channels, rows = x.shape[1], out.numel() // x.shape[1]
    across = columns(channels)
    tile = elements(x.dtype, pool) // across
    with torch.cuda.device_of(x):
        apply_kernel[(_blocks(rows, tile) * _blocks(channels, across),)](
            x, weight, bias, mean, rstd, x if residual is None else residual, out,
            rows, *x.shape[2:], channels, pool, residual is not None, tile, across, **OPTIONS,
        )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, pool: bool,
    x_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor,
) -> None:  # fmt: skip
    """The gradients into the last three, from that of the result, dense and channels-last as x and `x_grad`."""
    samples, channels, height, width = x.shape
    across, pixels = columns(channels), x.numel() // channels
    blocks = _blocks(channels, across)
    with torch.cuda.device_of(x):
        tile, rows = (WINDOWS if pool else SUMMED) // across, grad.numel() // channels
        rows_each, parts = _cut(rows, tile, blocks, x.device)
        partial = x.new_empty(2, parts, channels, dtype=torch.float32)
        sums_kernel[(parts * blocks,)](
            grad, x, weight, bias, mean, rstd, rows, rows_each, height, width, channels, partial,
            pool, tile, across, **OPTIONS,
        )  # fmt: skip
        finish_sums_kernel[(_blocks(channels, FINISHED),)](
            partial, parts, channels, rstd, weight_grad, bias_grad, PARTS, FINISHED, **FINISH_OPTIONS
        )
        tile = elements(x.dtype, pool) // across
        rows = samples * _blocks(height, 2) * _blocks(width, 2) if pool else pixels
        backward_kernel[(_blocks(rows, tile) * blocks,)](
            grad, x, weight, bias, mean, rstd, weight_grad, bias_grad, x_grad,
            rows, height, width, channels, pixels, pool, tile, across, **OPTIONS,
        )  # fmt: skip


def _cut(rows: int, tile: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """How many rows a part has, a multiple of the tile, and how many parts that makes."""
    wanted = max(1, min(PARTS, PROGRAMS * multiprocessors(device) // blocks))
    rows_each = _blocks(_blocks(rows, wanted), tile) * tile
    return rows_each, _blocks(rows, rows_each)


def _blocks(many: int, each: int) -> int:
    """How many blocks of so many make all. (Triton's own function takes longer to call than a tensor to allocate.)"""
    return -(-many // each)
