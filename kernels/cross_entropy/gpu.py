"""The gradient of a mean cross-entropy as one Triton kernel.

The logits are small compared with everything else in a training step: the kernel saves launches, not memory traffic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Logits per program, eight per thread; so also the most classes that a row may have.
BLOCK = 1024
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["rows", "batch"])
def _cross_entropy_grad_kernel(
    logits_ptr, stride_run, stride_sample, stride_class, labels_ptr, label_stride_run, label_stride_sample,
    rows, batch, classes, smoothing, out_ptr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """(softmax(logits) − targets) / batch: a program computes ROWS rows, a row being one sample of one run.

    Args:
        logits_ptr, labels_ptr: `[R, B, K]` float32 and `[R, B]` int64, with the strides given.
        rows, batch, classes: R·B, B, K; CLASSES is the power of two that holds K.
        smoothing: ε/K, the target of the classes that are not the label.
        out_ptr: `[R, B, K]` float32, contiguous.
    """
    # 1. Load the logits and the labels.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CLASSES)
    run, sample = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    inside = (row < rows)[:, None] & (k < classes)[None, :]
    label = tl.load(labels_ptr + run * label_stride_run + sample * label_stride_sample, mask=row < rows, other=0)
    offset = (run * stride_run + sample * stride_sample)[:, None] + k.to(tl.int64)[None, :] * stride_class
    x = tl.load(logits_ptr + offset, mask=inside, other=-float("inf"))
    # 2. Compute the softmax. max ignores NaN, exp and the sum do not: a NaN or an infinity makes the whole row NaN.
    e = tl.exp(x - tl.max(x, 1)[:, None])
    is_label = k[None, :] == label[:, None]
    others = tl.where(is_label | (k >= classes)[None, :], 0.0, e / tl.sum(e, 1)[:, None] - smoothing)
    # 3. Set the label's entry to minus the sum of the others, not p − 1: for p near 1 that is only rounding error, and
    # the row sum is not zero.
    grad = tl.where(is_label, -tl.sum(others, 1)[:, None], others)
    # 4. Store the mean's gradient.
    out = out_ptr + row.to(tl.int64)[:, None] * classes + k[None, :]
    tl.store(out, grad / batch.to(tl.float32), mask=inside)


def launch_cross_entropy_grad(logits: Tensor, labels: Tensor, label_smoothing: float, out: Tensor) -> None:
    """Write the gradient into `out`, contiguous, like the logits `[R, B, K]` float32; labels `[R, B]` int64."""
    runs, batch, classes = logits.shape
    if not logits.numel():
        return
    padded = 1 << (classes - 1).bit_length()  # the next power of two
    rows = BLOCK // padded
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _cross_entropy_grad_kernel[(-(-runs * batch // rows),)](
            logits, *logits.stride(), labels, *labels.stride(), runs * batch, batch, classes,
            label_smoothing / classes, out, rows, padded, **OPTIONS,
        )  # fmt: skip
