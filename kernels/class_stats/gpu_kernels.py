"""The Triton kernels of class statistics; `gpu` launches them and says how they work together."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def labels_kernel(labels_ptr, rows, classes, batch_ptr, LABELS: tl.constexpr, CLASSES: tl.constexpr):
    """Into `batch` [2 K + 2] int32, zeros: counts of the classes, how far from the end their first samples are, and how
    many labels are out of range. The last number is for `gather_kernel`."""
    at = tl.program_id(0) * LABELS + tl.arange(0, LABELS)
    label = tl.load(labels_ptr + at, mask=at < rows, other=0)
    wrong = (at < rows) & ((label < 0) | (label >= classes))
    tl.atomic_add(batch_ptr + 2 * classes, tl.sum(wrong.to(tl.int32)), sem="relaxed")
    for start in range(0, classes, CLASSES):
        k = start + tl.arange(0, CLASSES)
        match = (label[None, :] == k[:, None]) & (at < rows)[None, :]
        count = tl.sum(match.to(tl.int32), 1)
        # Atomics of integers: their order does not change the result.
        seen = (k < classes) & (count > 0)
        tl.atomic_add(batch_ptr + k, count, mask=seen, sem="relaxed")
        from_end = tl.max(tl.where(match, (rows - at)[None, :], 0), 1)
        tl.atomic_max(batch_ptr + classes + k, from_end, mask=seen, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def shifts_kernel(
    features_ptr, stride_run, stride_row, stride_column, rows, dim, classes, counts_ptr, batch_ptr, shifts_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first sample of each class that was not seen before this batch."""
    k, run = tl.program_id(0), tl.program_id(1).to(tl.int64)
    from_end = tl.load(batch_ptr + classes + k)
    if (from_end > 0) & (tl.load(counts_ptr + k) == 0):
        row = (rows - from_end).to(tl.int64)
        for start in range(0, dim, BLOCK):
            i = start + tl.arange(0, BLOCK)
            place = features_ptr + run * stride_run + row * stride_row + i.to(tl.int64) * stride_column
            value = tl.load(place, mask=i < dim)
            tl.store(shifts_ptr + (run * classes + k) * dim + i, value.to(tl.float32), mask=i < dim)


@triton.jit
def _tile(
    features_ptr, stride_row, stride_column, labels_ptr, shifts_ptr, classes, dim, row, column, last,
):  # fmt: skip
    """Labels, centred values and (as they came) values of a tile, 0 outside, for wrong labels too; float32."""
    label = tl.load(labels_ptr + row, mask=row < last, other=-1).to(tl.int32)
    label = tl.where(label < classes, label, -1)
    inside = (label >= 0)[:, None] & (column < dim)[None, :]
    place = features_ptr + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shifts_ptr + label.to(tl.int64)[:, None] * dim + column[None, :], mask=inside, other=0.0)
    return label, value - shift, value


@triton.jit
def _cut(x):
    """The 11 leading bits of float32 numbers, which are all that tf32 has."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def gather_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, shifts_ptr, rows, rows_each, dim, classes, blocks,
    sums_ptr,  # [parts, R, K, d] float32: what each part adds
    squares_ptr,  # [parts, column blocks, R, K] float32
    batch_ptr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    run, first_class = (tl.program_id(2) // blocks).to(tl.int64), (tl.program_id(2) % blocks) * CLASSES
    runs = tl.num_programs(2) // blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    k = first_class + tl.arange(0, CLASSES)
    start = (part * rows_each).to(tl.int32)
    last = tl.minimum(start + rows_each, rows)
    sums, squares = tl.zeros((CLASSES, COLUMNS), tl.float32), tl.zeros((CLASSES,), tl.float32)
    odd = 0
    for top in range(start, last, ROWS):
        row = top + tl.arange(0, ROWS)
        label, centred, value = _tile(
            features_ptr + run * stride_run, stride_row, stride_column, labels_ptr, shifts_ptr + run * classes * dim,
            classes, dim, row, column, last,
        )  # fmt: skip
        square = tl.sum(centred * centred, 1)
        # Only where a square is not finite a value can be so.
        if tl.max((square - square != 0).to(tl.int32), 0) > 0:
            odd += tl.sum(tl.sum((value - value != 0).to(tl.int32), 1), 0)
        match = label[None, :] == k[:, None]
        # Of batches sorted by class a tile has few classes: most blocks of many classes have none of them.
        if tl.max(match.to(tl.int32)) > 0:
            squares += tl.sum(tl.where(match, square[None, :], 0.0), 1)
            # The ones are exact, and two tf32 numbers are 22 bits at the least. Matrix units cut off when they add up:
            # they do so for one tile only.
            high, ones = _cut(centred), match.to(tl.float32)
            tile = tl.dot(ones, centred - high, input_precision="tf32")
            sums += tl.dot(ones, high, tile, input_precision="tf32")
    out = ((part * runs + run) * classes + k)[:, None] * dim + column[None, :]
    tl.store(sums_ptr + out, sums, mask=(k < classes)[:, None] & (column < dim)[None, :])
    out = ((part * tl.num_programs(0) + block) * runs + run) * classes + k
    tl.store(squares_ptr + out, squares, mask=k < classes)
    if (first_class == 0) & (odd > 0):
        tl.atomic_add(batch_ptr + 2 * classes + 1, odd, sem="relaxed")


@triton.jit
def _added(ptr, parts, pitch, i, inside, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Σ over the parts of `[parts, pitch]` float32, of the elements i; so many parts are under way at once."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = ptr + part.to(tl.int64)[:, None] * pitch + i[None, :]
        total += tl.sum(tl.load(place, mask=(part < parts)[:, None] & inside[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["parts", "squared_parts"])
def commit_kernel(
    part_sums_ptr, part_squares_ptr, batch_ptr, parts, squared_parts, dim, classes,
    counts_ptr, sums_ptr, squares_ptr, refused_ptr,
    PROPAGATE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what the parts hold, if the batch is not refused: a run's first programs the sums, the others the rest."""
    program, run, runs = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    wrong, odd = tl.load(batch_ptr + 2 * classes), tl.load(batch_ptr + 2 * classes + 1)
    refused = wrong > 0
    if not PROPAGATE:
        refused = refused | (odd > 0)
    size = classes * dim
    summing = tl.cdiv(size, BLOCK)
    if refused:
        if (program == 0) & (run == 0):
            tl.store(refused_ptr, tl.load(refused_ptr) + 1)
            tl.store(refused_ptr + 1, tl.load(refused_ptr + 1) + wrong)
            if not PROPAGATE:
                tl.store(refused_ptr + 2, tl.load(refused_ptr + 2) + odd)
    elif program < summing:
        i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = _added(part_sums_ptr + run * size, parts, runs.to(tl.int64) * size, i, i < size, PARTS, BLOCK)
        place = sums_ptr + run * size + i
        tl.store(place, tl.load(place, mask=i < size) + total, mask=i < size)
    else:
        k = (program - summing) * BLOCK + tl.arange(0, BLOCK)
        square = _added(
            part_squares_ptr + run * classes, squared_parts, runs.to(tl.int64) * classes, k, k < classes, PARTS, BLOCK
        )  # fmt: skip
        place = squares_ptr + run * classes + k
        tl.store(place, tl.load(place, mask=k < classes) + square, mask=k < classes)
        if run == 0:
            count = tl.load(counts_ptr + k, mask=k < classes) + tl.load(batch_ptr + k, mask=k < classes)
            tl.store(counts_ptr + k, count, mask=k < classes)


@triton.jit(do_not_specialize=["start", "rows"])
def split_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, shifts_ptr, start, rows, dim, classes,
    out_ptr, out_rows,  # [R, out_rows, 2, d] bfloat16: high and low halves of the centred values
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(2).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    _, centred, _ = _tile(
        features_ptr + run * stride_run, stride_row, stride_column, labels_ptr, shifts_ptr + run * classes * dim,
        classes, dim, start + at, column, rows,
    )  # fmt: skip
    high = centred.to(tl.bfloat16)
    low = (centred - high.to(tl.float32)).to(tl.bfloat16)
    place = out_ptr + (run * out_rows + at)[:, None] * 2 * dim + column[None, :]
    mask = (at < out_rows)[:, None] & (column < dim)[None, :]
    tl.store(place, high, mask=mask)
    tl.store(place + dim, low, mask=mask)


@triton.jit(do_not_specialize=["dim"])
def add_moment_kernel(
    highs_ptr,  # [R, products, d, 2 d] float32: high·high, high·low
    lows_ptr,  # [R, products, d, d] float32: low·low
    products, dim, batch_ptr, classes, scatter_ptr,
    PROPAGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scatter += Σ (HᵀH + HᵀL + LᵀH + LᵀL), if the batch is not refused."""
    run = tl.program_id(1).to(tl.int64)
    refused = tl.load(batch_ptr + 2 * classes) > 0
    if not PROPAGATE:
        refused = refused | (tl.load(batch_ptr + 2 * classes + 1) > 0)
    if not refused:
        size = dim.to(tl.int64) * dim
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        i, j, inside = at // dim, at % dim, at < size
        total = tl.zeros((BLOCK,), tl.float32)
        for product in range(0, products):
            high = highs_ptr + (run * products + product) * 2 * size
            mixed = tl.load(high + i * 2 * dim + dim + j, mask=inside, other=0.0)
            mixed += tl.load(high + j * 2 * dim + dim + i, mask=inside, other=0.0)
            low = tl.load(lows_ptr + (run * products + product) * size + at, mask=inside, other=0.0)
            total += tl.load(high + i * 2 * dim + j, mask=inside, other=0.0) + (mixed + low)
        place = scatter_ptr + run * size + at
        tl.store(place, tl.load(place, mask=inside) + total, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, shifts_ptr, rows, dim, classes,
    axes_ptr, many, out_ptr,  # [R, m, d], m, [R, B, m]
    ROWS: tl.constexpr, STEP: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    axis = tl.program_id(1) * AXES + tl.arange(0, AXES)
    total = tl.zeros((ROWS, AXES), tl.float32)
    for start in range(0, dim, STEP):
        column = start + tl.arange(0, STEP)
        _, centred, _ = _tile(
            features_ptr + run * stride_run, stride_row, stride_column, labels_ptr, shifts_ptr + run * classes * dim,
            classes, dim, row, column, rows,
        )  # fmt: skip
        place = axes_ptr + (run * many + axis)[None, :] * dim + column[:, None]
        axes = tl.load(place, mask=(axis < many)[None, :] & (column < dim)[:, None], other=0.0)
        # As tf32x3 would, but each step's sum is added in full precision, of which matrix units cut off.
        high, axes_high = _cut(centred), _cut(axes)
        part = tl.dot(centred - high, axes_high, input_precision="tf32")
        part = tl.dot(high, axes - axes_high, part, input_precision="tf32")
        total += tl.dot(high, axes_high, part, input_precision="tf32")
    out = out_ptr + (run * rows + row)[:, None] * many + axis[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (axis < many)[None, :])
