"""Class statistics on a GPU: Triton for sums, which read the features once; cuBLAS for the second moment.

Kernels check a batch and sum it (`labels`, `shifts`, `gather`); another adds the sums to the statistics, unless the
batch is refused (`commit`). The launchers do not synchronise. Sums are taken in parts, which are added in a fixed
order, without floating-point atomics, so that results are reproducible.

The second moment needs tensor cores, which have no float32. Each centred value is split into two bfloat16 numbers,
together at least 16 bits, and their three distinct products are summed in float32 (`split`, cuBLAS, `add_moment`), at
a third of the rate of bfloat16. NC1 is then as close to float64 as with float32 products, to 1e-6; to 1e-4 if the
shifts lay thirty times as far out as the other samples, which `move_shifts` prevents. With a single tf32 product,
which tensor cores may truncate, the errors are 1e-3 and 0.2 (bench/results/moment-accuracy.json).
"""

import torch
import triton
from torch import Tensor

from ncollapse.kernels.class_stats import gpu_kernels as kernels
from ncollapse.kernels.class_stats.reference import FAR, SAMPLES, State
from ncollapse.kernels.operators import multiprocessors

LABELS, CLASSES = 256, 32  # labels per program, classes per iteration
ROWS, COLUMNS, MOST_CLASSES = 32, 64, 128  # samples and features of a tile; the most classes per program
#: For every launch. Fused multiply-add is allowed: the reference does not fix how products and sums are rounded.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
PROGRAMS = 4  # per multiprocessor, for sums
MOST_BLOCKS = 65_535  # programs along the second and third axis of a grid
STEP = 32  # features per iteration of a projection
SIDE = 32  # rows and columns of a block of the second moment that a program adds
#: Parts of a batch loaded at once, and elements per program, when the parts of sums are added, and those of squares, of
#: which there are more: loading part by part would wait for memory hundreds of times.
PARTS, ADDED, SQUARED_PARTS, SQUARED = 128, 16, 1024, 2
#: Tiles of the sums whose loads are under way at once. Unmeasured; 1: no copies ahead, as before.
STAGES = 3
#: Samples per matrix product: with more, tensor cores sum the terms less accurately than needed. Products per call.
PRODUCT, PRODUCTS = 2048, 8
#: A product with too few blocks for the multiprocessors is summed in up to so many pieces, of at least so many samples.
#: Unmeasured; 1 piece: as before.
PIECES, PIECE = 4, 256
#: Rows and columns of the blocks in which cuBLAS computes such products; another size costs time alone.
PRODUCT_BLOCK = 128, 256


def gather_options(classes: int) -> dict[str, int | bool]:
    """Options of `gather_kernel`: the sums of more than 32 classes do not fit the registers of four warps."""
    return OPTIONS | ({"num_warps": 8} if classes > 32 else {})


def add_batch(features: Tensor, labels: Tensor, state: State, propagate: bool) -> None:
    """As `class_stats_reference`, for float32 statistics, without synchronising.

    Raises:
        ValueError: more stacked runs × blocks of `MOST_CLASSES` classes than a launch can have.
    """
    if not labels.numel():
        return
    with torch.cuda.device_of(features):  # Triton launches on the current device
        runs, *strides = _runs_and_strides(features)
        (rows, dim), classes = features.shape[-2:], len(state.counts)
        classes_each = min(MOST_CLASSES, max(16, triton.next_power_of_2(classes)))
        blocks, columns = triton.cdiv(classes, classes_each), triton.cdiv(dim, COLUMNS)
        _check_blocks(runs * blocks, f"{runs:,} stacked runs × {blocks:,} blocks of {classes_each} classes")
        batch = torch.zeros(2 * classes + 2, dtype=torch.int32, device=features.device)
        kernels.labels_kernel[(triton.cdiv(rows, LABELS),)](labels, rows, classes, batch, LABELS, CLASSES, **OPTIONS)
        moves = features.new_empty(runs, classes, 2, dim, dtype=torch.float64)
        flags = torch.empty(runs, classes, dtype=torch.int32, device=features.device)
        kernels.shifts_kernel[(classes, runs)](
            features, *strides, labels, rows, dim, classes, state.counts, batch, state.shifts, state.sums,
            state.squares, moves, flags, SAMPLES, FAR, LABELS, COLUMNS, **OPTIONS,
        )  # fmt: skip
        wanted = PROGRAMS * multiprocessors(features.device)
        parts = max(1, min(wanted // (columns * runs * blocks), triton.cdiv(rows, ROWS)))
        rows_each = triton.cdiv(triton.cdiv(rows, parts), ROWS) * ROWS
        parts = triton.cdiv(rows, rows_each)
        sums = features.new_empty(parts, runs, classes, dim, dtype=torch.float32)
        squares = features.new_empty(parts, columns, runs, classes, dtype=torch.float32)
        kernels.gather_kernel[(columns, parts, runs * blocks)](
            features, *strides, labels, state.shifts, rows, rows_each, dim, classes, blocks, sums, squares, batch,
            ROWS, COLUMNS, classes_each, STAGES, **gather_options(classes_each),
        )  # fmt: skip
        kernels.commit_kernel[(triton.cdiv(classes * dim, ADDED) + triton.cdiv(classes, SQUARED), runs)](
            sums, squares, batch, parts, parts * columns, dim, classes, state.counts, state.sums, state.squares,
            state.refused, propagate, PARTS, ADDED, SQUARED_PARTS, SQUARED, **OPTIONS,
        )  # fmt: skip
        if state.scatter is None:
            return
        if state.axes is None:
            _moment(features, labels, state, batch, moves, flags, propagate)
        else:
            moved = torch.where(
                flags.view(*state.squares.shape, 1, 1) > 0, moves.view(*state.squares.shape, 2, dim), 0.0
            )
            a, delta = (moved @ state.axes.double().unsqueeze(-3).mT).unbind(-2)
            cross = a.mT @ delta
            state.scatter.add_(cross + cross.mT)
            z = project(features, labels, state.shifts, state.axes).double()
            refused = (batch[2 * classes] > 0) if propagate else (batch[2 * classes :] > 0).any()
            # Only m × m values: float64 costs nothing.
            state.scatter.add_(torch.where(refused, 0.0, z.mT @ z))


def project(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """As `project_reference`, in float32; a wrong label gives zeros."""
    runs, *strides = _runs_and_strides(features)
    (rows, dim), (n_axes, classes) = features.shape[-2:], (axes.shape[-2], shifts.shape[-2])
    out = features.new_empty(*features.shape[:-1], n_axes, dtype=torch.float32)
    if out.numel():
        _check_blocks(runs, f"{runs:,} stacked runs")
        axes_each = min(64, max(16, triton.next_power_of_2(n_axes)))
        with torch.cuda.device_of(features):
            kernels.project_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(n_axes, axes_each), runs)](
                features, *strides, labels, shifts, rows, dim, classes, axes, n_axes, out,
                ROWS, STEP, axes_each, **OPTIONS,
            )  # fmt: skip
    return out


def _moment(
    features: Tensor, labels: Tensor, state: State, batch: Tensor, moves: Tensor, flags: Tensor, propagate: bool
) -> None:
    assert state.scatter is not None
    (runs, *strides), (rows, dim), classes = _runs_and_strides(features), features.shape[-2:], len(state.counts)
    product = triton.cdiv(min(rows, PRODUCT), PIECES) * PIECES  # samples after the last are zeros
    side = triton.cdiv(dim, SIDE)
    for start in range(0, rows, PRODUCT * PRODUCTS):
        products = min(PRODUCTS, triton.cdiv(rows - start, product))
        halves = features.new_empty(runs * products, product, 2 * dim, dtype=torch.bfloat16)
        kernels.split_kernel[(triton.cdiv(dim, COLUMNS), triton.cdiv(products * product, ROWS), runs)](
            features, *strides, labels, state.shifts, start, rows, dim, classes, halves, products * product,
            ROWS, COLUMNS, **OPTIONS,
        )  # fmt: skip
        highs, lows = _product(halves, slice(dim), slice(None)), _product(halves, slice(dim, None), slice(dim, None))
        kernels.add_moment_kernel[(side, side, runs)](
            highs, lows, len(highs) // runs, len(lows) // runs, dim, batch, classes, moves, flags, state.scatter,
            start == 0, propagate, CLASSES, SIDE, STAGES, **OPTIONS,
        )  # fmt: skip


def _check_blocks(count: int, what: str) -> None:
    if count > MOST_BLOCKS:
        raise ValueError(f"class statistics on a GPU: {what} are more than the {MOST_BLOCKS:,} that a launch can have")


def pieces(results: int, height: int, width: int, samples: int, multiprocessors: int) -> int:
    """In how many pieces to sum each of so many products, a power of two, for every multiprocessor to have a block."""
    blocks = results * triton.cdiv(height, PRODUCT_BLOCK[0]) * triton.cdiv(width, PRODUCT_BLOCK[1])
    found = 1
    while 2 * found <= PIECES and 2 * found * blocks <= multiprocessors and samples >= 2 * found * PIECE:
        found *= 2
    return found


def _product(halves: Tensor, left: slice, right: slice) -> Tensor:
    """Products of columns of `halves` `[N, samples, 2 d]` bfloat16, in float32; of each its pieces in a row."""
    (results, samples, columns), device = halves.shape, halves.device
    height, width = (len(range(columns)[each]) for each in (left, right))
    count = pieces(results, height, width, samples, multiprocessors(device))
    cut = halves.view(results * count, samples // count, columns)
    a, b = cut[..., left].mT, cut[..., right]
    # Without CUDA, in Triton's interpreter.
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _runs_and_strides(features: Tensor) -> tuple[int, int, int, int]:
    """The number of runs, and the strides of runs, samples and features."""
    runs, run_stride = (features.shape[0], features.stride(0)) if features.dim() == 3 else (1, 0)
    return runs, run_stride, features.stride(-2), features.stride(-1)
