"""What a run computes in, and that the same run gives the same numbers.

| precision | weights, states, batch norm's numbers, head | maps and vectors | convolutions and hidden products |
| --- | --- | --- | --- |
| fp32 | float32 | float32 | float32 |
| tf32 | float32 | float32 | factors rounded to 11 bits, sums in float32 (GPUs; a CPU computes as for fp32) |
| bf16 | float32 | bfloat16 | bfloat16, sums in float32 |

The head stays in float32: the row sum of its gradient is zero, and what theory predicts from that (`nc.ufm`) would
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
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]
    product = "tf32" if precision == "tf32" else "ieee"
    _set(False, True, product, product)
    try:
        yield
    finally:
        _set(*before)


def _set(benchmark: bool, deterministic: bool, convolution: str, product: str) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
    cudnn.conv.fp32_precision, matmul.fp32_precision = convolution, product  # type: ignore[attr-defined]


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
