"""The Triton kernels of a step of Muon's matrices; `gpu` has their launchers.

Matrices X `[short, long]` in bfloat16 lie in one buffer, padded with zeros to whole tiles, so that no load of a product
has a mask. Tables in the GPU's memory tell where each lies and which tiles there are: one launch multiplies matrices of
all shapes, as one of a network has too few tiles for all multiprocessors.
"""

import triton
import triton.language as tl


@triton.jit
def _norm_square(parts_ptr, parts, PARTS: tl.constexpr):
    """‖X‖² from its parts, at least the square of LEAST_NORM."""
    part = tl.arange(0, PARTS)
    return tl.maximum(tl.sum(tl.load(parts_ptr + part, mask=part < parts, other=0.0), 0), 1e-14)


@triton.jit
def symmetric_kernel(
    source_ptr, out_ptr, matrices_ptr, tiles_ptr, parts_ptr, squared, itself,
    NORMALISE: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = squared · S Sᵀ (+ itself · S): a program computes a tile on or below the diagonal, and mirrors it.

    Args:
        source_ptr: S, bfloat16; with ADD square and symmetric.
        out_ptr: bfloat16.
        matrices_ptr: `[matrices, 6]` int64: offset of S, elements from row to row, columns (a multiple of STEP); offset
            of the result, elements from row to row; the number of parts of ‖S‖².
        tiles_ptr: `[programs, 3]` int32: matrix, row and column of tiles.
        parts_ptr: `[matrices, PARTS]` float32: parts of ‖S‖²; with NORMALISE the result is divided by their sum.
    """
    # 1. Find the matrix and the tile.
    tile = tiles_ptr + tl.program_id(0) * 3
    matrix, i, j = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    place = matrices_ptr + matrix * 6
    source = source_ptr + tl.multiple_of(tl.load(place), 64)
    pitch = tl.multiple_of(tl.load(place + 1).to(tl.int32), 64)
    columns = tl.load(place + 2).to(tl.int32)
    row, column = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    # 2. Multiply.
    total = tl.zeros((TILE, TILE), tl.float32)
    k = tl.arange(0, STEP)
    for start in tl.range(0, columns, STEP, num_stages=STAGES):
        left = tl.load(source + row[:, None] * pitch + (start + k)[None, :])
        right = tl.load(source + column[:, None] * pitch + (start + k)[None, :])
        total = tl.dot(left, tl.trans(right), total)
    # 3. Scale, add, and round once.
    total *= squared
    if NORMALISE:
        total /= _norm_square(parts_ptr + matrix * PARTS, tl.load(place + 5), PARTS)
    if ADD:
        total += itself * tl.load(source + row[:, None] * pitch + column[None, :]).to(tl.float32)
    result = total.to(tl.bfloat16)
    # 4. Store the tile and its mirror image.
    out = out_ptr + tl.multiple_of(tl.load(place + 3), 64)
    out_pitch = tl.multiple_of(tl.load(place + 4).to(tl.int32), 64)
    tl.store(out + row[:, None] * out_pitch + column[None, :], result)
    if i != j:
        tl.store(out + column[:, None] * out_pitch + row[None, :], tl.trans(result))


@triton.jit
def polynomial_kernel(
    x_ptr, factor_ptr, out_ptr, matrices_ptr, tiles_ptr, parts_ptr, itself,
    NORMALISE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out = itself · X + F X: a program computes a tile `[ROWS, COLUMNS]`.

    Args:
        x_ptr, out_ptr: bfloat16, at the same offsets.
        factor_ptr: F, square, bfloat16.
        matrices_ptr: `[matrices, 8]` int64: offset of X, elements from row to row, rows (a multiple of STEP); offset of
            F, elements from row to row; the number of parts of ‖X‖²; rows and columns without the padding.
        tiles_ptr, parts_ptr: as for `symmetric_kernel`; with NORMALISE the result is divided by ‖X‖.
    """
    # 1. Find the matrix and the tile.
    tile = tiles_ptr + tl.program_id(0) * 3
    matrix, i, j = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    place = matrices_ptr + matrix * 8
    offset = tl.multiple_of(tl.load(place), 64)
    pitch = tl.multiple_of(tl.load(place + 1).to(tl.int32), 64)
    depth = tl.load(place + 2).to(tl.int32)
    factor = factor_ptr + tl.multiple_of(tl.load(place + 3), 64)
    factor_pitch = tl.multiple_of(tl.load(place + 4).to(tl.int32), 64)
    row, column = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    # 2. Multiply.
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    k = tl.arange(0, STEP)
    for start in tl.range(0, depth, STEP, num_stages=STAGES):
        left = tl.load(factor + row[:, None] * factor_pitch + (start + k)[None, :])
        right = tl.load(x_ptr + offset + (start + k)[:, None] * pitch + column[None, :])
        total = tl.dot(left, right, total)
    # 3. Add, scale, and round once.
    place_in = offset + row[:, None] * pitch + column[None, :]
    total += itself * tl.load(x_ptr + place_in).to(tl.float32)
    if NORMALISE:
        total /= tl.sqrt(_norm_square(parts_ptr + matrix * PARTS, tl.load(place + 5), PARTS))
    # NaN in the matrix would get into its padding too, and stay there in later steps. (A mask would narrow the stores.)
    inside = (row < tl.load(place + 6))[:, None] & (column < tl.load(place + 7))[None, :]
    tl.store(out_ptr + place_in, tl.where(inside, total, 0.0).to(tl.bfloat16))


@triton.jit
def _place(i, width, stride_row, stride_column):
    """Where element i of a matrix lies, as an offset in a padded one."""
    return (i // width) * stride_row + (i % width) * stride_column


@triton.jit
def _number(ptr, stride, run):
    return tl.load(ptr + run * stride).to(tl.float64)


@triton.jit(do_not_specialize=["each"])
def momentum_kernel(
    grad_ptr, param_ptr, buffer_ptr, x_ptr, parts_ptr, size, width, each, stride_run, stride_row, stride_column,
    beta_ptr, beta_stride, coupling_ptr, coupling_stride, decay_ptr, decay_stride,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`momentum_reference`, of matrices in float32: program (p, r) takes `each` elements of run r.

    Args:
        grad_ptr, param_ptr, buffer_ptr: ∇L, W (any dtype) and V (float32): `[R, size]`, contiguous; V is updated.
        x_ptr: bfloat16, written; strides `stride_run, stride_row, stride_column`, and rows of `width` elements.
        parts_ptr: `[R, PARTS]` float32, written: each program's part of ‖X‖².
        beta_ptr, coupling_ptr, decay_ptr: β, c and λ, float32 or float64, with a stride from run to run.
    """
    run = tl.program_id(1).to(tl.int64)
    beta = _number(beta_ptr, beta_stride, run)
    coupled = (_number(coupling_ptr, coupling_stride, run) * _number(decay_ptr, decay_stride, run)).to(tl.float32)
    keep, new = beta.to(tl.float32), (1 - beta).to(tl.float32)
    first = tl.program_id(0) * each
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, tl.minimum(first + each, size), BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        g = tl.load(grad_ptr + run * size + i, mask=inside, other=0.0).to(tl.float32)
        g = (-g if MAXIMIZE else g) + coupled * tl.load(param_ptr + run * size + i, mask=inside, other=0.0).to(
            tl.float32
        )
        v = tl.load(buffer_ptr + run * size + i, mask=inside, other=0.0)
        v += new * (g - v)
        tl.store(buffer_ptr + run * size + i, v, mask=inside)
        x = (g + keep * (v - g) if NESTEROV else v).to(tl.bfloat16)
        tl.store(x_ptr + run * stride_run + _place(i, width, stride_row, stride_column), x, mask=inside)
        squares += tl.where(inside, x.to(tl.float32) * x.to(tl.float32), 0.0)
    tl.store(parts_ptr + run * PARTS + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def direction_kernel(
    x_ptr, param_ptr, out_ptr, size, width, stride_run, stride_row, stride_column,
    coupling_ptr, coupling_stride, decay_ptr, decay_stride, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """`direction_reference`: program (b, r) computes BLOCK elements of run r; the arguments as in `momentum_kernel`.

    Args:
        out_ptr: `[R, size]` float32, contiguous, written.
    """
    run = tl.program_id(1).to(tl.int64)
    coupled = (_number(coupling_ptr, coupling_stride, run) * _number(decay_ptr, decay_stride, run)).to(tl.float32)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x = tl.load(x_ptr + run * stride_run + _place(i, width, stride_row, stride_column), mask=inside, other=0.0)
    w = tl.load(param_ptr + run * size + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + run * size + i, scale * x.to(tl.float32) - coupled * w, mask=inside)
