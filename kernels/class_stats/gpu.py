"""Class statistics on a GPU: Triton for what is one read of the features, cuBLAS for the second moment.

A batch goes through kernels that find out whether it is to be refused and gather what it adds (`labels`, `shifts`,
`gather`), and one that adds it if it is not (`commit`): nobody waits for the answer. Sums are taken in parts that
are added in an order that is always the same, without floating-point atomics: the same bits every time.

The second moment wants matrix units, which have no float32. Each centred value is cut into two bfloat16 numbers,
together 16 bits of it and more, and all three different products of these are summed in float32 (`split`, cuBLAS,
`add_moment`), at a third of the rate of bfloat16. NC1 is then as near to float64 as with products in float32, to 1e-6;
to 1e-4 where the first samples of the classes, about which we sum, lie thirty times as far out as the others. One tf32
product, which matrix units may cut off, is wrong by 1e-3, there by 0.2 (bench/results/moment-accuracy.json).
"""

import torch
import triton
from torch import Tensor

from ncollapse.kernels.class_stats.gpu_kernels import (
    add_moment_kernel,
    commit_kernel,
    gather_kernel,
    labels_kernel,
    project_kernel,
    shifts_kernel,
    split_kernel,
)
from ncollapse.kernels.class_stats.reference import State
from ncollapse.kernels.operators import multiprocessors

#: Labels that a program looks at, and how many classes at a time.
LABELS, CLASSES = 256, 32
#: Of a tile of features that a program takes at a time: samples, features; classes at most.
ROWS, COLUMNS, MOST_CLASSES = 32, 64, 128
#: Of every launch. A product and a sum in one rounding are as good as in two.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
#: Programs to a multiprocessor that sums are cut for.
PROGRAMS = 4
#: Features in a step of a projection, and elements at a time of an addition.
STEP, BLOCK = 32, 1024
#: Parts of a batch that are added at once, of so many elements: loads of one part after the other would each wait for
#: memory, hundreds of times.
PARTS, ADDED = 64, 32
#: Samples in one matrix product, of which the matrix units sum the terms less exactly than we want for more; products
#: in one call.
PRODUCT, PRODUCTS = 2048, 8


def gather_options(classes: int) -> dict[str, int | bool]:
    """Of gathering so many classes at a time: the sums of more than 32 do not go into the registers of four warps."""
    return OPTIONS | ({"num_warps": 8} if classes > 32 else {})


def add_batch(features: Tensor, labels: Tensor, state: State, propagate: bool) -> None:
    """As `class_stats_reference`, for float32 statistics; nobody waits for the GPU."""
    if not labels.numel():
        return
    with torch.cuda.device_of(features):  # Triton launches on the current device
        where = _strides(features)
        runs, rows, dim = where[0], *features.shape[-2:]
        classes = len(state.counts)
        batch = torch.zeros(2 * classes + 2, dtype=torch.int32, device=features.device)
        labels_kernel[(triton.cdiv(rows, LABELS),)](labels, rows, classes, batch, LABELS, CLASSES, **OPTIONS)
        shifts_kernel[(classes, runs)](
            features, *where[1:], rows, dim, classes, state.counts, batch, state.shifts, BLOCK, **OPTIONS
        )  # fmt: skip
        at_once = min(MOST_CLASSES, max(16, triton.next_power_of_2(classes)))
        blocks, columns = triton.cdiv(classes, at_once), triton.cdiv(dim, COLUMNS)
        wanted = PROGRAMS * multiprocessors(features.device)
        parts = max(1, min(wanted // (columns * runs * blocks), triton.cdiv(rows, ROWS)))
        rows_each = triton.cdiv(triton.cdiv(rows, parts), ROWS) * ROWS
        parts = triton.cdiv(rows, rows_each)
        sums = features.new_empty(parts, runs, classes, dim, dtype=torch.float32)
        squares = features.new_empty(parts, columns, runs, classes, dtype=torch.float32)
        gather_kernel[(columns, parts, runs * blocks)](
            features, *where[1:], labels, state.shifts, rows, rows_each, dim, classes, blocks, sums, squares, batch,
            ROWS, COLUMNS, at_once, **gather_options(at_once),
        )  # fmt: skip
        commit_kernel[(triton.cdiv(classes * dim, ADDED) + triton.cdiv(classes, ADDED), runs)](
            sums, squares, batch, parts, parts * columns, dim, classes,
            state.counts, state.sums, state.squares, state.refused, propagate, PARTS, ADDED, **OPTIONS,
        )  # fmt: skip
        if state.scatter is None:
            return
        if state.axes is None:
            _moment(features, labels, state, batch, propagate)
        else:
            z = project(features, labels, state.shifts, state.axes).double()
            refused = (batch[2 * classes] > 0) if propagate else (batch[2 * classes :] > 0).any()
            # m × m values: float64 costs nothing.
            state.scatter.add_(torch.where(refused, 0.0, z.mT @ z))


def project(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """As `project_reference`, in float32; a wrong label gives zeros."""
    where = _strides(features)
    (rows, dim), (many, classes) = features.shape[-2:], (axes.shape[-2], shifts.shape[-2])
    out = features.new_empty(*features.shape[:-1], many, dtype=torch.float32)
    if out.numel():
        at_once = min(64, max(16, triton.next_power_of_2(many)))
        with torch.cuda.device_of(features):
            project_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(many, at_once), where[0])](
                features, *where[1:], labels, shifts, rows, dim, classes, axes, many, out,
                ROWS, STEP, at_once, **OPTIONS,
            )  # fmt: skip
    return out


def _moment(features: Tensor, labels: Tensor, state: State, batch: Tensor, propagate: bool) -> None:
    assert state.scatter is not None
    where, (rows, dim), classes = _strides(features), features.shape[-2:], len(state.counts)
    runs = where[0]
    product = min(rows, PRODUCT)
    for start in range(0, rows, PRODUCT * PRODUCTS):
        products = min(PRODUCTS, triton.cdiv(rows - start, product))
        halves = features.new_empty(runs * products, product, 2 * dim, dtype=torch.bfloat16)
        split_kernel[(triton.cdiv(dim, COLUMNS), triton.cdiv(products * product, ROWS), runs)](
            features, *where[1:], labels, state.shifts, start, rows, dim, classes, halves, products * product,
            ROWS, COLUMNS, **OPTIONS,
        )  # fmt: skip
        high, low = halves[..., :dim].mT, halves[..., dim:]
        highs, lows = _product(high, halves), _product(low.mT, low)
        add_moment_kernel[(triton.cdiv(dim * dim, BLOCK), runs)](
            highs, lows, products, dim, batch, classes, state.scatter, propagate, BLOCK, **OPTIONS
        )  # fmt: skip


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of bfloat16 matrices, in float32."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # in Triton's interpreter


def _strides(features: Tensor) -> tuple[int, int, int, int]:
    """Runs, and the strides of runs, samples and features."""
    of_run = features.stride(0) if features.dim() == 3 else 0
    return features.shape[0] if features.dim() == 3 else 1, of_run, features.stride(-2), features.stride(-1)
