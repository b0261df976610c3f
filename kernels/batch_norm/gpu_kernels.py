"""The Triton kernels of batch norm with ReLU; `gpu` launches them and says how they work together.

Maps are `[M, C]` in memory, M = N·H·W: a row holds all channels of one pixel (channels-last). A program takes COLUMNS
channels, and of these ROWS rows at a time; programs of neighbouring channels are neighbours, so that whole rows are
read together. Rows count in int32, elements in int64. Everything is worked out in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _program(channels, COLUMNS: tl.constexpr):
    """Which rows and which channels are this program's."""
    blocks = tl.cdiv(channels, COLUMNS)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _at(row, column, channels):
    """Offsets `[ROWS, COLUMNS]`."""
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
    """Batch norm as it is written, rounded to the maps' dtype: what ReLU and pooling choose by.

    Forward and backward must choose alike, to the last bit: so the product and the sum are one operation in both, and
    not left to the compiler.
    """
    return tl.fma(x - mean, scale, bias).to(dtype).to(tl.float32)


@triton.jit
def _beats(z, best):
    """Whether max pooling takes z, which comes after the best so far: the first of equal values wins, NaN always."""
    return (z > best) | (z != z)


@triton.jit
def _window(
    x_ptr, corner, width, right, lower, column, channels, mean, scale, bias,
):  # fmt: skip
    """The four pixels of each window, in row-major order, which of the last three beat those before it, and the best.

    Args:
        corner: `[ROWS]`, the row of the upper left pixel; negative where there is no window.
        right, lower: `[ROWS]`, whether the window has a right column and a lower row.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    here, inside = corner >= 0, (column < channels)[None, :]
    x0 = tl.load(x_ptr + _at(corner, column, channels), mask=here[:, None] & inside, other=0.0).to(tl.float32)
    x1 = tl.load(
        x_ptr + _at(corner + 1, column, channels), mask=(here & right)[:, None] & inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    x2 = tl.load(
        x_ptr + _at(corner + width, column, channels), mask=(here & lower)[:, None] & inside, other=0.0
    ).to(tl.float32)  # fmt: skip
    x3 = tl.load(
        x_ptr + _at(corner + width + 1, column, channels), mask=(here & right & lower)[:, None] & inside, other=0.0
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
    """Sample, vertical and horizontal place of a window, and the row of its upper left pixel, −1 beyond the last."""
    sample, i, j = row // (down * across), row // across % down, row % across
    return sample, i, j, tl.where(row < rows, (sample * height + 2 * i) * width + 2 * j, -1)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def moments_kernel(
    x_ptr, rows, rows_each, channels,
    parts_ptr,  # [3, parts, C] float32: of each part of the rows a shift, the mean less it, and Σ (x − mean)²
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums about the mean of a part's first rows, which keep their digits where the mean is large beside the spread.

    With t times as many rows in the part as in the first tile, that mean lies at most √t standard deviations from the
    part's own: what is lost of the variance is t units in the last place at the worst.
    """
    part, column = _program(channels, COLUMNS)
    parts = tl.num_programs(0) // tl.cdiv(channels, COLUMNS)
    start = part * rows_each
    last = tl.minimum(start + rows_each, rows)
    lane, inside = tl.arange(0, ROWS), (column < channels)[None, :]
    mask = (start + lane < last)[:, None] & inside
    x = tl.load(x_ptr + _at(start + lane, column, channels), mask=mask, other=0.0).to(tl.float32)
    shift = tl.sum(x, 0) / tl.minimum(last - start, ROWS).to(tl.float32)
    sums, squares = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(start, last, ROWS):
        mask = (top + lane < last)[:, None] & inside
        x = tl.load(x_ptr + _at(top + lane, column, channels), mask=mask, other=0.0).to(tl.float32)
        apart = tl.where(mask, x - shift[None, :], 0.0)
        sums += apart
        squares += apart * apart
    total, count = tl.sum(sums, 0), (last - start).to(tl.float32)
    square = tl.sum(squares, 0) - total * (total / count)
    out, pitch = parts_ptr + part.to(tl.int64) * channels + column, parts.to(tl.int64) * channels
    tl.store(out, shift, mask=column < channels)
    tl.store(out + pitch, total / count, mask=column < channels)
    # Rounding may leave less than nothing; NaN stays.
    tl.store(out + 2 * pitch, tl.where(square < 0, 0.0, square), mask=column < channels)


@triton.jit(do_not_specialize=["parts", "rows", "rows_each"])
def finish_moments_kernel(
    parts_ptr, parts, rows, rows_each, channels,
    mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, momentum, eps,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The parts merged (Chan et al. 1979); running statistics in place.

    About the first one's shift: the shifts are near to each other, so that their differences are exact.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (column < channels)[None, :]
    count = tl.where(part < parts, tl.minimum(rows - part * rows_each, rows_each), 0).to(tl.float32)[:, None]
    place, pitch = parts_ptr + _at(part, column, channels), parts.to(tl.int64) * channels
    column_inside, many = column < channels, rows.to(tl.float32)
    first = tl.load(parts_ptr + column, mask=column_inside, other=0.0)
    apart = tl.load(place, mask=inside, other=0.0) - first[None, :] + tl.load(place + pitch, mask=inside, other=0.0)
    apart = tl.where(inside, apart, 0.0)
    beyond = tl.sum(count * apart, 0) / many
    apart -= beyond[None, :]
    square = tl.sum(tl.load(place + 2 * pitch, mask=inside, other=0.0) + count * apart * apart, 0)
    mean = first + beyond
    tl.store(mean_ptr + column, mean, mask=column_inside)
    tl.store(rstd_ptr + column, 1.0 / tl.sqrt_rn(square / many + eps), mask=column_inside)
    running = tl.load(running_mean_ptr + column, mask=column_inside)
    tl.store(running_mean_ptr + column, (1 - momentum) * running + momentum * mean, mask=column_inside)
    running = tl.load(running_var_ptr + column, mask=column_inside)
    tl.store(running_var_ptr + column, (1 - momentum) * running + momentum * (square / (many - 1)), mask=column_inside)


@triton.jit(do_not_specialize=["rows", "height", "width"])
def apply_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, residual_ptr, out_ptr,
    rows, height, width, channels,  # rows of out; height and width of x
    POOL: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, column = _program(channels, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
    at = _at(row, column, channels)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if POOL:
        _, _, _, corner = _corners(row, rows, height, width, height // 2, width // 2)
        whole = row < rows
        _, _, _, _, _, _, _, z = _window(x_ptr, corner, width, whole, whole, column, channels, mean, scale, bias)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = _normalised(x, mean, scale, bias, dtype)
    z = tl.where(z <= 0, 0.0, z)  # NaN stays
    if HAS_RESIDUAL:
        z += residual
    tl.store(out_ptr + at, z.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_each", "height", "width"])
def sums_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    rows, rows_each, height, width, channels,  # rows of grad; height and width of x
    parts_ptr,  # [2, parts, C] float32: Σ g and Σ g (x − mean) of each part of the rows
    POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g is the gradient of the normalised maps: that which came in where ReLU and pooling let it through."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    part, column = _program(channels, COLUMNS)
    parts = tl.num_programs(0) // tl.cdiv(channels, COLUMNS)
    start = part * rows_each
    last = tl.minimum(start + rows_each, rows)
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
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
        g = tl.where(z <= 0, 0.0, g)  # NaN lets it through
        sums += g
        products += g * (x - mean)
    out = parts_ptr + part.to(tl.int64) * channels + column
    tl.store(out, tl.sum(sums, 0), mask=column < channels)
    tl.store(out + parts.to(tl.int64) * channels, tl.sum(products, 0), mask=column < channels)


@triton.jit(do_not_specialize=["parts"])
def finish_sums_kernel(
    parts_ptr, parts, channels, rstd_ptr, weight_grad_ptr, bias_grad_ptr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (column < channels)[None, :]
    place = parts_ptr + _at(part, column, channels)
    sums = tl.sum(tl.load(place, mask=inside, other=0.0), 0)
    products = tl.sum(tl.load(place + parts.to(tl.int64) * channels, mask=inside, other=0.0), 0)
    rstd = tl.load(rstd_ptr + column, mask=column < channels)
    tl.store(bias_grad_ptr + column, sums, mask=column < channels)
    tl.store(weight_grad_ptr + column, products * rstd, mask=column < channels)


@triton.jit(do_not_specialize=["rows", "height", "width", "samples"])
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, weight_grad_ptr, bias_grad_ptr, out_ptr,
    rows, height, width, channels, samples,  # of x; with POOL the rows are windows, those that stick out too
    POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of x: (g − mean of g − (x − mean) · rstd² · mean of g (x − mean)) · rstd · weight."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile, column = _program(channels, COLUMNS)
    row = tile * ROWS + tl.arange(0, ROWS)
    here, inside = row < rows, (column < channels)[None, :]
    mean, scale, bias = _affine(weight_ptr, bias_ptr, mean_ptr, rstd_ptr, column, channels)
    many = samples.to(tl.float32)
    away = (tl.load(bias_grad_ptr + column, mask=column < channels) / many)[None, :]
    rstd = tl.load(rstd_ptr + column, mask=column < channels)
    along = (rstd * (tl.load(weight_grad_ptr + column, mask=column < channels) / many))[None, :]
    if POOL:
        sample, i, j, corner = _corners(row, rows, height, width, (height + 1) // 2, (width + 1) // 2)
        right, lower = here & (2 * j + 1 < width), here & (2 * i + 1 < height)
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
        out = out_ptr + _at(corner, column, channels)
        tl.store(out, ((g - away - (x0 - mean) * along) * scale).to(dtype), mask=here[:, None] & inside)
        out = out_ptr + _at(corner + 1, column, channels)
        tl.store(out, ((g1 - away - (x1 - mean) * along) * scale).to(dtype), mask=right[:, None] & inside)
        out = out_ptr + _at(corner + width, column, channels)
        tl.store(out, ((g2 - away - (x2 - mean) * along) * scale).to(dtype), mask=lower[:, None] & inside)
        out = out_ptr + _at(corner + width + 1, column, channels)
        tl.store(out, ((g3 - away - (x3 - mean) * along) * scale).to(dtype), mask=(right & lower)[:, None] & inside)
    else:
        at, mask = _at(row, column, channels), here[:, None] & inside
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(_normalised(x, mean, scale, bias, dtype) <= 0, 0.0, g)
        tl.store(out_ptr + at, ((g - away - (x - mean) * along) * scale).to(dtype), mask=mask)
