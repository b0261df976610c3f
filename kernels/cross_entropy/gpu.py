"""The gradient of a mean cross-entropy as one Triton kernel.

A program takes whole rows of logits, about a thousand of them together: eight a thread. They are few beside everything
else in a step: what is saved is launches. Not yet measured on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Logits of a program: the classes of one row at the most.
BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["rows", "batch"])
def _slope_kernel(
    logits_ptr, stride_run, stride_sample, stride_class, labels_ptr, label_stride_run, label_stride_sample,
    rows, batch, classes,
    out_ptr,  # [R, B, K], dense
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CLASSES)
    run, sample = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    inside = (row < rows)[:, None] & (k < classes)[None, :]
    label = tl.load(labels_ptr + run * label_stride_run + sample * label_stride_sample, mask=row < rows, other=0)
    place = (run * stride_run + sample * stride_sample)[:, None] + k.to(tl.int64)[None, :] * stride_class
    x = tl.load(logits_ptr + place, mask=inside, other=-float("inf"))
    # max passes NaN over, exp and the sum do not: one makes the whole row NaN, as does an infinite logit.
    e = tl.exp(x - tl.max(x, 1)[:, None])
    mine = k[None, :] == label[:, None]
    others = tl.where(mine, 0.0, e / tl.sum(e, 1)[:, None])
    # Minus the sum of the others, not p − 1: once p is nearly 1 that is rounding, and a row sum that is not zero.
    slope = tl.where(mine, -tl.sum(others, 1)[:, None], others)
    out = out_ptr + row.to(tl.int64)[:, None] * classes + k[None, :]
    tl.store(out, slope / batch.to(tl.float32), mask=inside)


def classes_at_once(classes: int) -> int:
    """The power of two that holds them."""
    return 1 << (classes - 1).bit_length()


def slope(logits: Tensor, labels: Tensor, out: Tensor) -> None:
    """The gradient into `out` `[R, B, K]`, dense; labels `[R, B]`."""
    runs, batch, classes = logits.shape
    if not logits.numel():
        return
    at_once = classes_at_once(classes)
    rows = BLOCK // at_once
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _slope_kernel[(-(-runs * batch // rows),)](
            logits, *logits.stride(), labels, *labels.stride(), runs * batch, batch, classes, out,
            rows, at_once, **OPTIONS,
        )  # fmt: skip
