"""The Triton kernels of batch norm with ReLU for maps of few pixels: a program holds all rows of COLUMNS channels.

So one launch does all of forward, and one all of backward, and each map is read once. `gpu_kernels` describes the
arguments. ROWS is a power of two, at least the number of rows.
"""

import triton
import triton.language as tl

from ncollapse.kernels.batch_norm.gpu_kernels import (
    _affine,
    _at,
    _let_next_start,
    _normalised,
    _store_moments,
    _wait_for_previous,
)


@triton.jit(do_not_specialize=["rows"])
def small_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps,
    residual_ptr, out_ptr, rows, channels, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """relu(batch_norm(x)), plus a residual: what `moments_kernel` and `apply_kernel` write."""
    _wait_for_previous(DEPENDENT)
    # 1. Load all rows.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    at, total = _at(row, column, channels), rows.to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:  # before the sums, so that both loads wait together
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # 2. Sum the deviations from a first mean, which rounding leaves off, and their squares (Chan et al. 1979).
    shift = tl.sum(x, 0) / total
    deviation = tl.where(mask, x - shift[None, :], 0.0)
    offset = tl.sum(deviation, 0) / total
    square = tl.sum(deviation * deviation, 0) - total * offset * offset
    square = tl.where(square < 0, 0.0, square)  # rounding may make it negative; NaN stays
    mean = shift + offset
    rstd = _store_moments(
        mean, square, rows, column, channels, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps
    )
    _let_next_start(DEPENDENT)
    # 3. Normalise, apply ReLU, which keeps NaN, and add the residual.
    inside = column < channels
    scale, bias = rstd * tl.load(weight_ptr + column, mask=inside), tl.load(bias_ptr + column, mask=inside)
    z = _normalised(x, mean[None, :], scale[None, :], bias[None, :], dtype)
    z = tl.where(z <= 0, 0.0, z)
    if HAS_RESIDUAL:
        z += residual
    tl.store(out_ptr + at, z.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def small_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_grad_ptr, bias_grad_ptr, out_ptr,
    rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The gradients of x, weight and bias: what `sums_kernel` and `backward_kernel` write."""
    _wait_for_previous(DEPENDENT)
    # 1. Load all rows; the gradient is zero where ReLU did not pass the value.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, column = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    mask = (row < rows)[:, None] & inside[None, :]
    at, total = _at(row, column, channels), rows.to(tl.float32)
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.where(_normalised(x, mean, scale, bias, dtype) <= 0, 0.0, g)  # where z is NaN the gradient passes
    # 2. Sum it, alone and times the deviation from the mean.
    sums, products = tl.sum(g, 0), tl.sum(tl.where(mask, g * (x - mean), 0.0), 0)
    rstd = tl.load(rstd_ptr + column, mask=inside)
    weight_grad = products * rstd
    tl.store(bias_grad_ptr + column, sums, mask=inside)
    tl.store(weight_grad_ptr + column, weight_grad, mask=inside)
    _let_next_start(DEPENDENT)
    # 3. Compute the gradient of x.
    grad_mean, coefficient = (sums / total)[None, :], (rstd * (weight_grad / total))[None, :]
    tl.store(out_ptr + at, ((g - grad_mean - (x - mean) * coefficient) * scale).to(dtype), mask=mask)
