"""The arithmetic of a run: its dtypes, and settings with which the same run gives the same numbers.

| precision | weights, optimizer states, batch norm, head | activations | convolutions, hidden linear layers |
| --- | --- | --- | --- |
| fp32 | float32 | float32 | float32 |
| tf32 | float32 | float32 | inputs rounded to 11 bits, accumulated in float32 (GPU; a CPU computes as for fp32) |
| bf16 | float32 | bfloat16 | bfloat16, accumulated in float32 |

The head stays in float32: the row sum of its gradient is zero, and the theory (`ufm`) rests on that; rounded products
would hide it. On a CPU bf16 rounds as on a GPU, and is no faster.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set the matrix-product precision, and deterministic algorithms.

    cuDNN's autotuning (`torch.backends.cudnn.benchmark`) is off, since it chooses algorithms by time and so not always
    the same; `bench/bench_cnn.py` measures what that costs.
    """
    product = "tf32" if precision == "tf32" else "ieee"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=product == "tf32", fp32_precision=product
    ):
        # Partial sums are added in float32 too.
        matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = product, False
        try:
            yield
        finally:
            matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = before


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute matrix products of float32 in full float32, whatever the precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
