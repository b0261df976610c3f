"""Batch norm with ReLU on a GPU: the launchers of its Triton kernels.

All kernels are bound by memory, so they move the maps as rarely as the mathematics allows. Forward reads x once for
mean and variance, and once to write the result. Backward reads x and the gradient once for two sums per channel, and
once to write the gradient of x. Nothing else of the size of a map is written or kept: backward recomputes from x what
passed ReLU and pooling.

Sums are taken in parts, which the last program to arrive, or a second kernel, adds in a fixed order, without
floating-point atomics on them, so that results are reproducible on a device. Maps of few pixels need no parts: one
kernel does forward, one backward. No launcher synchronises with the GPU.

The constants below are calculated, those of a prototype measured (bench/results/prototypes-cuda.json). With a second
kernel for every sum the kernels take 286 µs of a step of ResNet9 on an H100, where moving the maps alone takes 150 to
175 (bench/results/cnn-cuda.json). MERGED_ELEMENTS, MERGE_SUMS, and `SMALL_ROWS` of `op` turn what is newer on and off,
until batch_norm_times has timed both sides on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from ncollapse.kernels.batch_norm import gpu_kernels as kernels
from ncollapse.kernels.batch_norm import small_kernels
from ncollapse.kernels.batch_norm.counters import zero_counters
from ncollapse.kernels.operators import multiprocessors

#: The most channels per program: 128 bytes of a row in half precision, one cache line.
COLUMNS = 64
#: Elements of a map that a program sums per iteration, 16 per thread: two 128-bit loads in half precision, four in
#: float32, and 32 registers for the two sums.
SUMMED = 2048
#: Bytes of a map that a program writes, 64 per thread: four 128-bit loads of each map are in flight at once. Its other
#: loads, 16 bytes per channel, are an eighth of that (COLUMNS · 16 of 8192), and come from the caches.
WRITTEN = 8192
#: Pooling windows per iteration, of four pixels each: with 8 per thread, each of the five maps is one 128-bit load.
WINDOWS = 1024
#: Whether a kernel is launched while the one before it on the stream still runs, and waits for it itself (programmatic
#: dependent launch, of GPUs from sm_90 on). Off: unmeasured, predicted to take 10 µs from a step of ResNet9.
DEPENDENT = False
#: For every launch. Fused multiply-add is allowed: the reference does not fix how products and sums are rounded.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": 128}
#: Programs per multiprocessor for sums: with 512 threads of two loads each, 16 KB are in flight per multiprocessor,
#: about what 3.35 TB/s over 132 multiprocessors needs at a latency of 0.7 µs; 128 registers per thread allow it.
PROGRAMS = 4
#: The most parts, all of which a finishing program loads at once, and its channels: 32 bytes, the smallest memory
#: transaction, so that 64 channels make eight programs.
PARTS, FINISHED = 512, 8
FINISH_OPTIONS = OPTIONS | {"num_warps": 8}
#: The most elements of a map whose moments the last program merges: 32 MB in half precision, which the second-level
#: cache holds, so that one program per multiprocessor keeps up (measured to 26 MB). 0: a second kernel merges them.
MERGED_ELEMENTS = 2**24
#: The most parts then, one per multiprocessor of an H100, all loaded at once. With 16 warps, so that a thread holds
#: fewer, the kernel was measured 3 to 8 µs slower than with 4; these may take 168 registers instead.
MERGED_PARTS = 128
MERGED_OPTIONS = OPTIONS | {"maxnreg": 168}
#: Whether the last program also adds the parts of backward's sums, so many at a time: 128 would spill registers.
MERGE_SUMS, ADDED_PARTS = True, 64
#: Channels of a program that holds all rows of a small map, and of rows at least so many, lest each size be compiled:
#: with 2,048 rows, 64 elements per thread and map. 2, 4 columns, and 4, 16 warps were measured slower.
SMALL_COLUMNS, LEAST_ROWS = 8, 256
SMALL_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def channels_per_program(channels: int) -> int:
    """Channels per program: a power of two."""
    return min(COLUMNS, 1 << (channels - 1).bit_length())


def elements_per_program(dtype: torch.dtype, pool: bool) -> int:
    """Elements that a program writes, or pooling windows that it processes."""
    return WINDOWS if pool else WRITTEN // dtype.itemsize


def launch_moments(
    x: Tensor, mean: Tensor, rstd: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> None:
    """Write mean and 1/√(variance + eps) of each channel of x into `mean` and `rstd`; update the running statistics.

    Args:
        x: `[N, C, H, W]`, dense, channels-last.
        mean, rstd, running_mean, running_var: `[C]` float32.
    """
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    columns = channels_per_program(channels)
    blocks, tile = _blocks(channels, columns), SUMMED // columns
    merge = x.numel() <= MERGED_ELEMENTS
    results = mean, rstd, running_mean, running_var, momentum, eps
    with torch.cuda.device_of(x):  # Triton launches on the current device
        per_multiprocessor, most = (1, MERGED_PARTS) if merge else (PROGRAMS, PARTS)
        rows_each, parts = _cut(rows, tile, blocks, per_multiprocessor, most, x.device)
        partial = x.new_empty(3, parts, channels, dtype=torch.float32)
        arrived = zero_counters(blocks, x.device) if merge else partial
        kernels.moments_kernel[(parts * blocks,)](
            x, rows, rows_each, channels, partial, arrived, *results,
            tile, columns, MERGED_PARTS if merge else 0, **_options(MERGED_OPTIONS if merge else OPTIONS, x.device),
        )  # fmt: skip
        if not merge:
            kernels.finish_moments_kernel[(_blocks(channels, FINISHED),)](
                partial, parts, rows, rows_each, channels, *results, PARTS, FINISHED, **_allowed(FINISH_OPTIONS)
            )


def launch_small_forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, residual: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """`launch_moments` and `launch_apply` in one launch, without pooling, for maps of few pixels."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    with torch.cuda.device_of(x):
        small_kernels.small_forward_kernel[(_blocks(channels, SMALL_COLUMNS),)](
            x, weight, bias, mean, rstd, running_mean, running_var, momentum, eps, x if residual is None else residual,
            out, rows, channels, residual is not None, _held(rows), SMALL_COLUMNS, **_options(SMALL_OPTIONS, x.device),
        )  # fmt: skip


def launch_apply(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, residual: Tensor | None, pool: bool,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the result into `out`; x, the residual and `out` are dense and channels-last, the vectors `[C]` float32."""
    channels, rows = x.shape[1], out.numel() // x.shape[1]
    columns = channels_per_program(channels)
    tile = elements_per_program(x.dtype, pool) // columns
    with torch.cuda.device_of(x):
        kernels.apply_kernel[(_blocks(rows, tile) * _blocks(channels, columns),)](
            x, weight, bias, mean, rstd, x if residual is None else residual, out,
            rows, *x.shape[2:], channels, pool, residual is not None, tile, columns, **_options(OPTIONS, x.device),
        )  # fmt: skip


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, pool: bool,
    x_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor,
) -> None:  # fmt: skip
    """Write the gradients of x, weight and bias into the last three, from the gradient `grad` of the result.

    `grad`, x and `x_grad` are dense and channels-last, the vectors `[C]` float32.
    """
    samples, channels, height, width = x.shape
    columns, pixels = channels_per_program(channels), x.numel() // channels
    blocks = _blocks(channels, columns)
    with torch.cuda.device_of(x):
        tile, rows = (WINDOWS if pool else SUMMED) // columns, grad.numel() // channels
        rows_each, parts = _cut(rows, tile, blocks, PROGRAMS, PARTS, x.device)
        partial = x.new_empty(2, parts, channels, dtype=torch.float32)
        arrived = zero_counters(blocks, x.device) if MERGE_SUMS else partial
        kernels.sums_kernel[(parts * blocks,)](
            grad, x, weight, bias, mean, rstd, rows, rows_each, height, width, channels, partial,
            arrived, weight_grad, bias_grad, pool, tile, columns, ADDED_PARTS if MERGE_SUMS else 0,
            **_options(OPTIONS, x.device),
        )  # fmt: skip
        if not MERGE_SUMS:
            kernels.finish_sums_kernel[(_blocks(channels, FINISHED),)](
                partial, parts, channels, rstd, weight_grad, bias_grad, PARTS, FINISHED, **_allowed(FINISH_OPTIONS)
            )
        tile = elements_per_program(x.dtype, pool) // columns
        rows = samples * _blocks(height, 2) * _blocks(width, 2) if pool else pixels
        kernels.backward_kernel[(_blocks(rows, tile) * blocks,)](
            grad, x, weight, bias, mean, rstd, weight_grad, bias_grad, x_grad,
            rows, height, width, channels, pixels, pool, tile, columns, **_options(OPTIONS, x.device),
        )  # fmt: skip


def launch_small_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor,
    x_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor,
) -> None:  # fmt: skip
    """`launch_backward` in one launch, without pooling, for maps of few pixels."""
    channels, rows = x.shape[1], x.numel() // x.shape[1]
    with torch.cuda.device_of(x):
        small_kernels.small_backward_kernel[(_blocks(channels, SMALL_COLUMNS),)](
            grad, x, weight, bias, mean, rstd, weight_grad, bias_grad, x_grad,
            rows, channels, _held(rows), SMALL_COLUMNS, **_options(SMALL_OPTIONS, x.device),
        )  # fmt: skip


def _options(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Options of a launch, and DEPENDENT."""
    options = _allowed(options)
    if DEPENDENT and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        return options | {"DEPENDENT": True, "launch_pdl": True}
    return options | {"DEPENDENT": False}


def _allowed(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch without those that Triton refuses for AMD's GPUs."""
    return options if torch.version.hip is None else {k: v for k, v in options.items() if k != "maxnreg"}


def _cut(
    rows: int, tile: int, blocks: int, per_multiprocessor: int, most: int, device: torch.device
) -> tuple[int, int]:
    """Rows per part, a multiple of the tile, and the number of parts, at most `most`."""
    wanted = max(1, min(most, per_multiprocessor * multiprocessors(device) // blocks))
    rows_each = _blocks(_blocks(rows, wanted), tile) * tile
    return rows_each, _blocks(rows, rows_each)


def _held(rows: int) -> int:
    """Rows that a program of a small map has room for: a power of two."""
    return max(LEAST_ROWS, 1 << (rows - 1).bit_length())


def _blocks(total: int, size: int) -> int:
    """Blocks of a size that cover the total. (Calling `triton.cdiv` takes longer than allocating a tensor.)"""
    return -(-total // size)
