"""Convolutions of maps of few pixels on a GPU: the launchers of the Triton kernels.

cuDNN computes all nine taps of every pixel, of which 49 of 81 lie inside a map of 3 × 3, and has 36 tiles for the
gradient of 128 such maps of 512 channels: 25.4 µs on an H200, most of whose 132 multiprocessors are idle. A prototype
took 12.8 µs either way, without the sum of its parts (`small_convolutions_us` in bench/results/prototypes-cuda.json).
Its tiles of 64 × 128 read 77 MB, at about 7.4 TB/s: what the second-level cache gives. So tiles are 128 × 128 here,
which read 51 MB, and 8 MB of parts are written. Loads are by pointers: with tensor descriptors, some of the prototype's
larger convolutions gave wrong results.

Sums are in a fixed order, without atomics: results are reproducible on a device. No launcher synchronises.
"""

import functools

import torch
from torch import Tensor

from ncollapse.kernels.convolution import gpu_kernels as kernels
from ncollapse.kernels.operators import multiprocessors

#: Images and channels of a tile, and channels of a step. The channels of all tensors are multiples of `COLUMNS`.
IMAGES, COLUMNS, STEP = 128, 128, 64
#: Steps whose operands shared memory holds, 32 KB each. Two or three of them are being copied, so that 64 to 96 KB are
#: under way: what a multiprocessor's share of the second-level cache needs at a latency of 0.7 µs.
STAGES = 4
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
#: The fewest steps of a part: with fewer, starting and the sum of the parts take longer than what is saved.
LEAST_STEPS = 8
#: Images and channels that a program sums: two 128-bit loads per thread and part.
ADDED_IMAGES, ADDED_COLUMNS = 16, 64
ADD_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def launch_convolution(x: Tensor, weight: Tensor, flip: bool, out: Tensor) -> None:
    """Write the convolution of x into `out`, or with `flip` the gradient of the maps from that of the result, x.

    Args:
        x, out: `[N, C, H, W]` bfloat16, dense, channels-last.
        weight: `[O, C, 3, 3]` bfloat16, dense, channels-last.
    """
    (images, inputs, height, width), outputs = x.shape, out.shape[1]
    if not out.numel():
        return
    chunks, tiles = inputs // STEP, _blocks(images, IMAGES) * (outputs // COLUMNS)
    each = steps_each(height, width, chunks, tiles, multiprocessors(x.device))
    most_parts = _blocks(min(height, 3) * min(width, 3) * chunks, each)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        parts = out
        if most_parts > 1:
            parts = x.new_empty(most_parts, images, height, width, outputs, dtype=torch.float32)
        kernels.convolution_kernel[(tiles * height * width * most_parts,)](
            x, weight, parts, images, each, most_parts,
            height, width, inputs, outputs, flip, IMAGES, COLUMNS, STEP, STAGES, **OPTIONS,
        )  # fmt: skip
        if most_parts > 1:
            added = _blocks(images, ADDED_IMAGES) * height * width * (outputs // ADDED_COLUMNS)
            kernels.add_parts_kernel[(added,)](
                parts, out, images, each, height, width, chunks, outputs, most_parts, ADDED_IMAGES, ADDED_COLUMNS,
                **ADD_OPTIONS,
            )  # fmt: skip


@functools.cache
def steps_each(height: int, width: int, chunks: int, tiles: int, programs: int) -> int:
    """The most steps of a part: the fewest with which all parts run at once, one on a multiprocessor.

    Args:
        chunks: steps of a tap.
        tiles: of a pixel.
        programs: that run at once.
    """
    down, across = ([1 + (i > 0) + (i + 1 < size) for i in range(size)] for size in (height, width))
    steps = [rows * columns * chunks for rows in down for columns in across]
    for each in range(LEAST_STEPS, max(steps)):
        if tiles * sum(_blocks(of_tile, each) for of_tile in steps) <= programs:
            return each
    return max(steps)


def _blocks(total: int, size: int) -> int:
    """Blocks of a size that cover the total. (Calling `triton.cdiv` takes longer than allocating a tensor.)"""
    return -(-total // size)
