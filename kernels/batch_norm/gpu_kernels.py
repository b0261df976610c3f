"""The Triton kernels of batch norm with ReLU; `gpu` launches them and says how they work together.

Maps are `[M, C]` in memory, M = N·H·W: a row holds all channels of one pixel (channels-last). A program computes
COLUMNS channels, ROWS rows per iteration; programs of adjacent channels are adjacent, so that they read whole rows
together. Rows are counted in int32, elements in int64. All arithmetic is in float32. In all kernels:

- maps (`x`, `residual`, `grad`, `out`) are `[M, C]` in float32, bfloat16 or float16, contiguous; after pooling they
  have M = N·(H // 2)·(W // 2) rows;
- `weight`, `bias`, `mean`, `rstd`, `running_mean`, `running_var` and their gradients are `[C]` float32;
- `parts` holds partial sums, `[…, parts, C]` float32: part p covers rows p·rows_each … (p + 1)·rows_each − 1.

Two kernels sum over the rows in parts. With PARTS > 0 the last program of each block of channels to arrive merges the
block's parts; with PARTS = 0 a kernel of its own does, `finish_…`. Either way the order is fixed, whoever is last.

With DEPENDENT a kernel is launched while the one before it on the stream still runs: before it touches memory it waits
until that has ended (`_wait_for_previous`), and before it writes its results it lets the next one start.
"""

import triton
import triton.language as tl


@triton.jit
def _wait_for_previous(DEPENDENT: tl.constexpr):
    """Wait until the kernel before this one on the stream has ended, and so all before that, and is seen to have."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def _let_next_start(DEPENDENT: tl.constexpr):
    """Allow the next kernel's programs on the multiprocessors, once all of this one's have got here, or have ended."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _program(channels, COLUMNS: tl.constexpr):
    """The index of this program's rows, and its channels `[COLUMNS]`."""
    blocks = tl.cdiv(channels, COLUMNS)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _at(row, column, channels):
    """Offsets `[ROWS, COLUMNS]` of elements in a map."""
    return row.to(tl.int64)[:, None] * channels + column[None, :]


@triton.jit
def _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels):
    """Mean, scale and bias of each channel, `[1, COLUMNS]`."""
    inside = column < channels
    mean, rstd = tl.load(mean_ptr + column, mask=inside), tl.load(rstd_ptr + column, mask=inside)
    weight, bias = tl.load(weight_ptr + column, mask=inside), tl.load(bias_ptr + column, mask=inside)
    return mean[None, :], (rstd * weight)[None, :], bias[None, :]


@triton.jit
def _normalised(x, mean, scale, bias, dtype: tl.constexpr):
    """Batch norm, rounded to the maps' dtype: the values that ReLU and pooling compare.

    Forward and backward must select the same elements, to the last bit. So both use an explicit fused multiply-add and
    leave no choice to the compiler.
    """
    return tl.fma(x - mean, scale, bias).to(dtype).to(tl.float32)


@triton.jit
def _beats(z, best):
    """Whether max pooling prefers z to the best so far, which comes before it: on a tie the first wins, NaN always."""
    return (z > best) | (z != z)


@triton.jit
def _window(x_ptr, corner, width, right, lower, column, channels, mean, scale, bias):
    """The four pixels of each window in row-major order, which of them beat those before, and the maximum.

    Args:
        corner: `[ROWS]` int32, the row of the upper left pixel; negative where there is no window.
        right, lower: `[ROWS]` bool, whether the window has a right column and a lower row.

    Returns:
        Eight tensors `[ROWS, COLUMNS]`: four of float32, three of bool, and the normalised maximum in float32.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    exists, inside = corner >= 0, (column < channels)[None, :]
    x0 = tl.load(x_ptr + _at(corner, column, channels), mask=exists[:, None] & inside, other=0.0).to(tl.float32)
    x1 = tl.load(
        x_ptr + _at(corner + 1, column, channels), mask=(exists & right)[:, None] & inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    x2 = tl.load(
        x_ptr + _at(corner + width, column, channels), mask=(exists & lower)[:, None] & inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    x3 = tl.load(
        x_ptr + _at(corner + width + 1, column, channels), mask=(exists & right & lower)[:, None] & inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    best = _normalised(x0, mean, scale, bias, dtype)
    z1, z2 = _normalised(x1, mean, scale, bias, dtype), _normalised(x2, mean, scale, bias, dtype)
    z3 = _normalised(x3, mean, scale, bias, dtype)
    second = _beats(z1, best)
    best = tl.where(second, z1, best)
    third = _beats(z2, best)
    best = tl.where(third, z2, best)
    fourth = _beats(z3, best)
    best = tl.where(fourth, z3, best)
    return x0, x1, x2, x3, second, third, fourth, best


@triton.jit
def _corners(row, rows, height, width, down, across):
    """Sample, vertical and horizontal index of a window, and the row of its upper left pixel; −1 after the last."""
    sample, i, j = row // (down * across), row // across % down, row % across
    return sample, i, j, tl.where(row < rows, (sample * height + 2 * i) * width + 2 * j, -1)


@triton.jit
def _is_last(arrived_ptr, block, parts):
    """Whether all other programs of this block of channels have stored their parts; counts this program.

    Args:
        arrived_ptr: `[blocks]` int32, the number of programs of each block that have arrived; 0 before and after the
            launch. No other launch may count with it at the same time.
    """
    tl.debug_barrier()  # all threads have stored this program's part
    last = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrived_ptr + block, 0)
    return last


@triton.jit
def _merge_moments(
    parts_ptr, parts, rows, rows_each, channels, column,
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of `moments_kernel` (Chan et al. 1979) for the channels `column`; update running statistics.

    Means are relative to the first part's shift: shifts are close to each other, so their differences are exact.
    PARTS is a power of two, at least `parts`.
    """
    # 1. Sum the squares within the parts, and count the rows of each. Other programs of this launch may have written
    # the parts: the second-level cache has them (.cg), this multiprocessor's own may not.
    part, column_inside = tl.arange(0, PARTS), column < channels
    inside = (part < parts)[:, None] & column_inside[None, :]
    shift_ptr, pitch = parts_ptr + _at(part, column, channels), parts.to(tl.int64) * channels
    square = tl.sum(tl.load(shift_ptr + 2 * pitch, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    count = tl.where(part < parts, tl.minimum(rows - part * rows_each, rows_each), 0).to(tl.float32)[:, None]
    # 2. Compute the mean, and the deviation of each part's mean from it.
    first = tl.load(parts_ptr + column, mask=column_inside, other=0.0, cache_modifier=".cg")
    # Where there is no part, the deviation is zero.
    deviation = tl.load(shift_ptr, mask=inside, other=first[None, :], cache_modifier=".cg") - first[None, :]
    deviation += tl.load(shift_ptr + pitch, mask=inside, other=0.0, cache_modifier=".cg")
    offset = tl.sum(count * deviation, 0) / rows.to(tl.float32)
    # 3. Add the squares between the parts.
    deviation -= offset[None, :]
    square += tl.sum(count * deviation * deviation, 0)
    _store_moments(
        first + offset, square, rows, column, channels, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
        momentum, eps,
    )  # fmt: skip


@triton.jit
def _store_moments(
    mean, square, rows, column, channels, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps
):
    """Store mean and 1/√(variance + eps), and update the running statistics.

    Args:
        mean, square: `[COLUMNS]` float32, of all rows, square = Σ (x − mean)².

    Returns:
        `[COLUMNS]` float32, 1/√(variance + eps).
    """
    inside, total = column < channels, rows.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(square / total + eps)
    tl.store(mean_ptr + column, mean, mask=inside)
    tl.store(rstd_ptr + column, rstd, mask=inside)
    running = tl.load(running_mean_ptr + column, mask=inside)
    tl.store(running_mean_ptr + column, (1 - momentum) * running + momentum * mean, mask=inside)
    running = tl.load(running_var_ptr + column, mask=inside)
    tl.store(running_var_ptr + column, (1 - momentum) * running + momentum * (square / (total - 1)), mask=inside)
    return rstd


@triton.jit(do_not_specialize=["rows", "rows_each"])
def moments_kernel(
    x_ptr, rows, rows_each, channels, parts_ptr, arrived_ptr,
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute each part's mean and sum of squared deviations: a program does COLUMNS channels of one part.

    Sums about the mean of the part's first ROWS rows (the shift) stay accurate where the mean is much larger than the
    standard deviation. If the part has t times as many rows, the shift lies at most √t standard deviations from the
    part's mean, so that at worst the variance loses t units in the last place.

    Args:
        x_ptr: `[rows, C]`.
        parts_ptr: `[3, parts, C]`, written: of each part the shift, the mean minus the shift, Σ (x − mean)².
        arrived_ptr: see `_is_last`; unused with PARTS = 0, as are all after it.
        mean_ptr, rstd_ptr: `[C]`, written: mean and 1/√(variance + eps).
        running_mean_ptr, running_var_ptr: `[C]`, updated with the unbiased variance.
    """
    _wait_for_previous(DEPENDENT)
    # 1. Compute the shift from the first rows, and their deviations from it.
    part, column = _program(channels, COLUMNS)
    blocks = tl.cdiv(channels, COLUMNS)
    parts = tl.num_programs(0) // blocks
    start = part * rows_each
    last = tl.minimum(start + rows_each, rows)
    lane, inside = tl.arange(0, ROWS), (column < channels)[None, :]
    mask = (start + lane < last)[:, None] & inside
    x = tl.load(x_ptr + _at(start + lane, column, channels), mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(x, 0) / tl.minimum(last - start, ROWS).to(tl.float32)
    sums = tl.where(mask, x - shift[None, :], 0.0)
    squares = sums * sums
    # 2. Sum the deviations from the shift, and their squares, over the other rows.
    for top in range(start + ROWS, last, ROWS):
        mask = (top + lane < last)[:, None] & inside
        x = tl.load(x_ptr + _at(top + lane, column, channels), mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, x - shift[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    _let_next_start(DEPENDENT)
    # 3. Store the part's moments.
    total, count = tl.sum(sums, 0), (last - start).to(tl.float32)
    square = tl.sum(squares, 0) - total * (total / count)
    out, pitch = parts_ptr + part.to(tl.int64) * channels + column, parts.to(tl.int64) * channels
    tl.store(out, shift, mask=column < channels)
    tl.store(out + pitch, total / count, mask=column < channels)
    # Rounding may make the sum negative; NaN stays.
    tl.store(out + 2 * pitch, tl.where(square < 0, 0.0, square), mask=column < channels)
    # 4. The last program merges the parts.
    if PARTS > 0:
        block = tl.program_id(0) % blocks
        if _is_last(arrived_ptr, block, parts):
            _merge_moments(
                parts_ptr, parts, rows, rows_each, channels, column,
                mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, PARTS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["parts", "rows", "rows_each"])
def finish_moments_kernel(
    parts_ptr, parts, rows, rows_each, channels,
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of `moments_kernel`, whose arguments these are: a program does COLUMNS channels."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _merge_moments(
        parts_ptr, parts, rows, rows_each, channels, column,
        mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps, PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "height", "width"])
def apply_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, residual_ptr, out_ptr,
    rows, height, width, channels,
    POOL: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """relu(batch_norm(x)), then 2 × 2 max pooling, or plus a residual: a program writes ROWS × COLUMNS elements.

    Args:
        x_ptr: `[N·height·width, C]`.
        residual_ptr, out_ptr: `[rows, C]`: the residual, read with HAS_RESIDUAL, and the result, written.
    """
    _wait_for_previous(DEPENDENT)
    # 1. Load scale and bias of the channels.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, column = _program(channels, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
    at = _at(row, column, channels)
    # 2. Normalise the pixels, or find the maximum of each window.
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if POOL:
        _, _, _, corner = _corners(row, rows, height, width, height // 2, width // 2)
        whole = row < rows
        _, _, _, _, _, _, _, z = _window(x_ptr, corner, width, whole, whole, column, channels, mean, scale, bias)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = _normalised(x, mean, scale, bias, dtype)
    _let_next_start(DEPENDENT)
    # 3. Apply ReLU, which keeps NaN, and add the residual.
    z = tl.where(z <= 0, 0.0, z)
    if HAS_RESIDUAL:
        z += residual
    tl.store(out_ptr + at, z.to(dtype), mask=mask)


@triton.jit
def _merge_sums(parts_ptr, parts, channels, column, rstd_ptr, weight_grad_ptr, bias_grad_ptr, PARTS: tl.constexpr):
    """Add the parts of `sums_kernel`, PARTS at a time, to the gradients of bias and weight of the channels `column`."""
    part, column_inside = tl.arange(0, PARTS), column < channels
    sums, products = tl.zeros_like(column).to(tl.float32), tl.zeros_like(column).to(tl.float32)
    for first in range(0, parts, PARTS):
        inside = (first + part < parts)[:, None] & column_inside[None, :]
        sums_ptr = parts_ptr + _at(first + part, column, channels)
        products_ptr = sums_ptr + parts.to(tl.int64) * channels
        sums += tl.sum(tl.load(sums_ptr, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        products += tl.sum(tl.load(products_ptr, mask=inside, other=0.0, cache_modifier=".cg"), 0)
    rstd = tl.load(rstd_ptr + column, mask=column_inside)
    tl.store(bias_grad_ptr + column, sums, mask=column_inside)
    tl.store(weight_grad_ptr + column, products * rstd, mask=column_inside)


@triton.jit(do_not_specialize=["rows", "rows_each", "height", "width"])
def sums_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    rows, rows_each, height, width, channels, parts_ptr, arrived_ptr, weight_grad_ptr, bias_grad_ptr,
    POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Compute the sums that the gradients need: a program does COLUMNS channels of one part of the gradient's rows.

    g is the gradient of the normalised map: the incoming gradient where ReLU and pooling passed the value, else 0.

    Args:
        grad_ptr, x_ptr: `[rows, C]`, the gradient of the result, and `[N·height·width, C]`.
        parts_ptr: `[2, parts, C]`, written: Σ g and Σ g·(x − mean) of each part.
        arrived_ptr: see `_is_last`; unused with PARTS = 0, as are the next two.
        weight_grad_ptr, bias_grad_ptr: `[C]`, written: rstd·Σ g·(x − mean), and Σ g.
    """
    _wait_for_previous(DEPENDENT)
    # 1. Load scale and bias of the channels.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    part, column = _program(channels, COLUMNS)
    blocks = tl.cdiv(channels, COLUMNS)
    parts = tl.num_programs(0) // blocks
    start = part * rows_each
    last = tl.minimum(start + rows_each, rows)
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
    # 2. Sum over the part's rows.
    sums, products = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(start, last, ROWS):
        row = top + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (column < channels)[None, :]
        at = _at(row, column, channels)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if POOL:
            _, _, _, corner = _corners(row, last, height, width, height // 2, width // 2)
            whole = row < last
            x, x1, x2, x3, second, third, fourth, z = _window(
                x_ptr, corner, width, whole, whole, column, channels, mean, scale, bias
            )
            x = tl.where(fourth, x3, tl.where(third, x2, tl.where(second, x1, x)))
        else:
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            z = _normalised(x, mean, scale, bias, dtype)
        g = tl.where(z <= 0, 0.0, g)  # where z is NaN the gradient passes
        sums += g
        products += g * (x - mean)
    _let_next_start(DEPENDENT)
    # 3. Store the part's sums.
    out = parts_ptr + part.to(tl.int64) * channels + column
    tl.store(out, tl.sum(sums, 0), mask=column < channels)
    tl.store(out + parts.to(tl.int64) * channels, tl.sum(products, 0), mask=column < channels)
    # 4. The last program merges the parts.
    if PARTS > 0:
        block = tl.program_id(0) % blocks
        if _is_last(arrived_ptr, block, parts):
            _merge_sums(parts_ptr, parts, channels, column, rstd_ptr, weight_grad_ptr, bias_grad_ptr, PARTS)


@triton.jit(do_not_specialize=["parts"])
def finish_sums_kernel(
    parts_ptr, parts, channels, rstd_ptr, weight_grad_ptr, bias_grad_ptr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Merge the parts of `sums_kernel`, whose arguments these are: a program does COLUMNS channels."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _merge_sums(parts_ptr, parts, channels, column, rstd_ptr, weight_grad_ptr, bias_grad_ptr, PARTS)


@triton.jit(do_not_specialize=["rows", "height", "width", "samples"])
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_grad_ptr, bias_grad_ptr, out_ptr,
    rows, height, width, channels, samples,
    POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The gradient of x: (g − mean of g − (x − mean)·rstd²·mean of g·(x − mean))·rstd·weight, g as in `sums_kernel`.

    A program writes ROWS pixels of COLUMNS channels, or with POOL the pixels of ROWS windows.

    Args:
        grad_ptr: the gradient of the result: `[samples, C]`, or with POOL `[N·(height // 2)·(width // 2), C]`.
        x_ptr, out_ptr: `[samples, C]`, samples = N·height·width; `out` is written.
        weight_grad_ptr, bias_grad_ptr: `[C]`, from `finish_sums_kernel`.
        rows: pixels, or with POOL windows, including those that an odd height or width cuts off.
    """
    _wait_for_previous(DEPENDENT)
    # 1. Load the channels' vectors.
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, column = _program(channels, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    exists, inside = row < rows, (column < channels)[None, :]
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
    count = samples.to(tl.float32)
    grad_mean = (tl.load(bias_grad_ptr + column, mask=column < channels) / count)[None, :]
    rstd = tl.load(rstd_ptr + column, mask=column < channels)
    coefficient = (rstd * (tl.load(weight_grad_ptr + column, mask=column < channels) / count))[None, :]
    if POOL:
        sample, i, j, corner = _corners(row, rows, height, width, (height + 1) // 2, (width + 1) // 2)
        # 2. Find the pixel of each window that pooling passed, and give it the window's gradient.
        right, lower = exists & (2 * j + 1 < width), exists & (2 * i + 1 < height)
        x0, x1, x2, x3, second, third, fourth, z = _window(
            x_ptr, corner, width, right, lower, column, channels, mean, scale, bias
        )
        pooled = (sample * (height // 2) + i) * (width // 2) + j
        g = tl.load(
            grad_ptr + _at(pooled, column, channels), mask=(right & lower)[:, None] & inside, other=0.0
        ).to(tl.float32)  # fmt: skip
        g = tl.where(z <= 0, 0.0, g)
        g3, g = tl.where(fourth, g, 0.0), tl.where(fourth, 0.0, g)
        g2, g = tl.where(third, g, 0.0), tl.where(third, 0.0, g)
        g1, g = tl.where(second, g, 0.0), tl.where(second, 0.0, g)
        _let_next_start(DEPENDENT)
        # 3. Store the gradients of the window's four pixels.
        out = out_ptr + _at(corner, column, channels)
        tl.store(out, ((g - grad_mean - (x0 - mean) * coefficient) * scale).to(dtype), mask=exists[:, None] & inside)
        out = out_ptr + _at(corner + 1, column, channels)
        tl.store(out, ((g1 - grad_mean - (x1 - mean) * coefficient) * scale).to(dtype), mask=right[:, None] & inside)
        out = out_ptr + _at(corner + width, column, channels)
        tl.store(out, ((g2 - grad_mean - (x2 - mean) * coefficient) * scale).to(dtype), mask=lower[:, None] & inside)
        out = out_ptr + _at(corner + width + 1, column, channels)
        corner_inside = (right & lower)[:, None] & inside
        tl.store(out, ((g3 - grad_mean - (x3 - mean) * coefficient) * scale).to(dtype), mask=corner_inside)
    else:
        # 2. Compute the gradient where ReLU passed the value, and store it.
        at, mask = _at(row, column, channels), exists[:, None] & inside
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(_normalised(x, mean, scale, bias, dtype) <= 0, 0.0, g)
        _let_next_start(DEPENDENT)
        tl.store(out_ptr + at, ((g - grad_mean - (x - mean) * coefficient) * scale).to(dtype), mask=mask)
