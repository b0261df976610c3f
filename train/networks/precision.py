"""The arithmetic of a run: its dtypes, and settings with which the same run gives the same numbers.

| precision | weights, optimizer states, batch norm, head | activations | convolutions, hidden linear layers |
| --- | --- | --- | --- |
| fp32 | float32 | float32 | float32 |
| tf32 | float32 | float32 | inputs rounded to 11 bits, accumulated in float32 (GPU; a CPU computes as for fp32) |
| bf16 | float32 | bfloat16 | bfloat16, accumulated in float32 |

The head stays in float32: the row sum of its gradient is zero, and the theory (`ufm`) rests on that; rounded products
would hide it. On a CPU bf16 rounds as on a GPU, and is no faster.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cuda


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set the matrix-product precision, and deterministic algorithms.

    cuDNN's autotuning (`torch.backends.cudnn.benchmark`) is off, since it chooses algorithms by time and so not always
    the same; `bench/results/cnn-cuda.json` has what that costs.
    """
    product = "tf32" if precision == "tf32" else "ieee"
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction
    with (
        cudnn.flags(
            enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=product == "tf32",
            fp32_precision=product,
        ),
        same_attention(),
    ):  # fmt: skip
        # Partial sums are added in float32 too.
        matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = product, False
        try:
            yield
        finally:
            matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction = before


@contextmanager
def same_attention() -> Iterator[None]:
    """Compute attention in the one form that gives the same bits every time, and can be stacked.

    `sdpa_kernel` does the same, in a longer time. The fast path of transformers in evaluation mode has no form for
    several runs.
    """
    switches: tuple[tuple[Callable[[], bool], Callable[[bool], Any], bool], ...] = (
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, False),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, False),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    )
    before = [is_on() for is_on, _, _ in switches]
    for _, switch, value in switches:
        switch(value)
    try:
        yield
    finally:
        for (_, switch, _), value in zip(switches, before, strict=True):
            switch(value)


def rounds_products(device: torch.device) -> bool:
    """Return whether matrix products of float32 are rounded on a device, as tf32 has them."""
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


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
