"""What a run computes in, and that the same run gives the same numbers.

| precision | weights, states, batch norm's numbers, head | maps and vectors | convolutions and hidden products |
| --- | --- | --- | --- |
| fp32 | float32 | float32 | float32 |
| tf32 | float32 | float32 | factors rounded to 11 bits, sums in float32 (GPUs; a CPU computes as for fp32) |
| bf16 | float32 | bfloat16 | bfloat16, sums in float32 |

The head stays in float32: the row sum of its gradient is zero, and what theory predicts from that (`ufm`) would
drown in rounded products. On a CPU bf16 rounds as on a GPU, and is no faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def compute_dtype(precision: str) -> torch.dtype | None:
    """The dtype of maps, vectors and the weights that meet them; None: that of the parameters."""
    return torch.bfloat16 if precision == "bf16" else None


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Products as the precision says, and algorithms that give the same bits every time.

    cuDNN's own trials (`torch.backends.cudnn.benchmark`) are off, since they choose by the clock: what that costs is
    measured by `bench/bench_cnn.py`.
    """
    product = "tf32" if precision == "tf32" else "ieee"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=product == "tf32", fp32_precision=product
    ):
        # Parts of a sum are added in float32 too.
        matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = product, False
        try:
            yield
        finally:
            matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = before


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of float32 in full, whatever the precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
