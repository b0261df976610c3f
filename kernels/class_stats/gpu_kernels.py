"""The Triton kernels of class statistics; `gpu` launches them and says how they work together.

In all kernels, for R runs of B samples with d features and K classes:

- `features` is `[R, B, d]` in float32, bfloat16 or float16, with the strides given;
- `labels` is `[B]` int64 and `counts` `[K]` int64; `shifts` is `[R, K, d]` float32, `sums` `[R, K, d]` and `squares`
  `[R, K]` are float64;
- `batch` is `[2 K + 2]` int32, zero before `labels_kernel`: the batch's samples of each class; B minus the index of the
  first sample of each class, 0 for a class without samples; labels out of range; values that are not finite;
- `moves` is `[R, K, 2, d]` float64 and `flags` `[R, K]` int32: the flag is 1 if the shift of the class has moved; then
  a·δᵀ + δ·aᵀ is to be added to the scatter, for a and δ in `moves`.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def labels_kernel(labels_ptr, rows, classes, batch_ptr, LABELS: tl.constexpr, CLASSES: tl.constexpr):
    """Count classes and wrong labels: a program does LABELS labels, CLASSES classes per iteration.

    `labels` is `[rows]`; all but the last number of `batch` are updated.
    """
    # 1. Count the labels that are out of range.
    index = tl.program_id(0) * LABELS + tl.arange(0, LABELS)
    label = tl.load(labels_ptr + index, mask=index < rows, other=0)
    wrong = (index < rows) & ((label < 0) | (label >= classes))
    tl.atomic_add(batch_ptr + 2 * classes, tl.sum(wrong.to(tl.int32)), sem="relaxed")
    # 2. Count the samples of each class, and find the first.
    for start in range(0, classes, CLASSES):
        k = start + tl.arange(0, CLASSES)
        match = (label[None, :] == k[:, None]) & (index < rows)[None, :]
        count = tl.sum(match.to(tl.int32), 1)
        # The order of integer atomics does not change the result.
        seen = (k < classes) & (count > 0)
        tl.atomic_add(batch_ptr + k, count, mask=seen, sem="relaxed")
        from_end = tl.max(tl.where(match, (rows - index)[None, :], 0), 1)
        tl.atomic_max(batch_ptr + classes + k, from_end, mask=seen, sem="relaxed")


@triton.jit
def _median(features_ptr, stride_row, stride_column, row_0, row_1, row_2, i, dim):
    """The median of three rows in the columns i, float32; 0 outside."""
    value_ptr = features_ptr + i.to(tl.int64) * stride_column
    x = tl.load(value_ptr + row_0.to(tl.int64) * stride_row, mask=i < dim, other=0.0).to(tl.float32)
    y = tl.load(value_ptr + row_1.to(tl.int64) * stride_row, mask=i < dim, other=0.0).to(tl.float32)
    z = tl.load(value_ptr + row_2.to(tl.int64) * stride_row, mask=i < dim, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(x, y), tl.minimum(tl.maximum(x, y), z))


@triton.jit(do_not_specialize=["rows"])
def shifts_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, rows, dim, classes, counts_ptr, batch_ptr,
    shifts_ptr, sums_ptr, squares_ptr, moves_ptr, flags_ptr,
    SAMPLES: tl.constexpr, FAR: tl.constexpr, LABELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Set or move the shifts as `move_shifts` of `reference`: a program does one class of one run.

    `batch` comes from `labels_kernel`. Writes `flags`, and for classes that are moved `moves`.
    """
    # 1. Find out whether the number of the class's samples reaches a new power of two.
    k, run = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = run * classes + k
    before, in_batch = tl.load(counts_ptr + k), tl.load(batch_ptr + k)
    after = before + in_batch
    look = (tl.load(batch_ptr + 2 * classes) == 0) & (before < (before ^ after))
    flag = 0
    if look:
        # 2. Find the class's first samples in the batch.
        sample = tl.arange(0, SAMPLES)
        row = tl.zeros((SAMPLES,), tl.int32)
        found = 0
        wanted = tl.minimum(in_batch, SAMPLES)
        start = rows - tl.load(batch_ptr + classes + k)
        while found < wanted:
            index = start + tl.arange(0, LABELS)
            match = tl.load(labels_ptr + index, mask=index < rows, other=-1) == k
            nth = found + tl.cumsum(match.to(tl.int32), 0) - 1
            row += tl.sum(tl.where(match[None, :] & (nth[None, :] == sample[:, None]), index[None, :], 0), 1)
            found += tl.sum(match.to(tl.int32), 0)
            start += LABELS
        features_ptr += run * stride_run
        shifts_ptr += place * dim
        sums_ptr += place * dim
        # 3. Of an old class, find out whether the shift is far from the samples. NaN is not.
        far = False
        if before > 0:
            used = wanted if before < SAMPLES else 0
            n = (before + used).to(tl.float64)
            total, distance = tl.load(squares_ptr + place), tl.zeros((), tl.float64)
            for left in range(0, dim, COLUMNS):
                i = left + tl.arange(0, COLUMNS)
                inside = (sample < used)[:, None] & (i < dim)[None, :]
                value_ptr = (
                    features_ptr + row.to(tl.int64)[:, None] * stride_row + i.to(tl.int64)[None, :] * stride_column
                )
                shift = tl.load(shifts_ptr + i, mask=i < dim, other=0.0).to(tl.float64)
                value = tl.load(value_ptr, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
                z = tl.where(inside, value - shift[None, :], 0.0)
                offset = (tl.load(sums_ptr + i, mask=i < dim, other=0.0) + tl.sum(z, 0)) / n
                total += tl.sum(tl.sum(z * z, 1), 0)
                distance += tl.sum(offset * offset, 0)
            far = after.to(tl.float64) * distance > FAR * (total - n * distance)
        # 4. A new shift: the median of three samples, or the first.
        if (before == 0) | far:
            three = in_batch >= 3
            row_0 = tl.sum(tl.where(sample == 0, row, 0), 0)
            row_1 = tl.where(three, tl.sum(tl.where(sample == 1, row, 0), 0), row_0)
            row_2 = tl.where(three, tl.sum(tl.where(sample == 2, row, 0), 0), row_0)
            # An old class keeps its shift for one that is not finite: the batch may be refused, its sums must not be.
            usable = True
            if before > 0:
                for left in range(0, dim, COLUMNS):
                    i = left + tl.arange(0, COLUMNS)
                    median = _median(features_ptr, stride_row, stride_column, row_0, row_1, row_2, i, dim)
                    usable = usable & (tl.max((median - median != 0).to(tl.int32), 0) == 0)
            old, change = before.to(tl.float64), tl.zeros((), tl.float64)
            for left in range(0, tl.where(usable, dim, 0), COLUMNS):
                i = left + tl.arange(0, COLUMNS)
                median = _median(features_ptr, stride_row, stride_column, row_0, row_1, row_2, i, dim)
                if before > 0:
                    shift = tl.load(shifts_ptr + i, mask=i < dim, other=0.0).to(tl.float64)
                    sums = tl.load(sums_ptr + i, mask=i < dim, other=0.0)
                    delta = tl.where(i < dim, median.to(tl.float64) - shift, 0.0)
                    change += tl.sum(old * delta * delta - 2 * delta * sums, 0)
                    a_ptr = moves_ptr + place * 2 * dim + i
                    tl.store(a_ptr, old * delta / 2 - sums, mask=i < dim)
                    tl.store(a_ptr + dim, delta, mask=i < dim)
                    tl.store(sums_ptr + i, sums - old * delta, mask=i < dim)
                tl.store(shifts_ptr + i, median, mask=i < dim)
            if (before > 0) & usable:
                tl.store(squares_ptr + place, tl.load(squares_ptr + place) + change)
                flag = 1
    tl.store(flags_ptr + place, flag)


@triton.jit
def _values(features_ptr, stride_row, stride_column, dim, row, column, last):
    """Load a tile of one run, `[ROWS, COLUMNS]` float32, 0 outside of the batch, without waiting for its labels."""
    inside = (row < last)[:, None] & (column < dim)[None, :]
    value_ptr = features_ptr + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return tl.load(value_ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _labels(labels_ptr, classes, row, last):
    """Load the labels `[ROWS]` int32 of a tile; −1 outside of the batch and where they are wrong."""
    label = tl.load(labels_ptr + row, mask=row < last, other=-1).to(tl.int32)
    return tl.where((label >= 0) & (label < classes), label, -1)


@triton.jit
def _centred(value, label, shifts_ptr, dim, column):
    """h − s_y of a tile, `[ROWS, COLUMNS]` float32; 0 where there is no label."""
    inside = (label >= 0)[:, None] & (column < dim)[None, :]
    shift = tl.load(shifts_ptr + label.to(tl.int64)[:, None] * dim + column[None, :], mask=inside, other=0.0)
    return tl.where(inside, value - shift, 0.0)


@triton.jit
def _cut(x):
    """Truncate float32 numbers to the 11 significant bits of tf32."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def gather_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, shifts_ptr, rows, rows_each, dim, classes, blocks,
    sums_ptr, squares_ptr, batch_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum centred features and their squares by class, over parts of the batch.

    Program (c, p, r) computes COLUMNS features of the rows p·rows_each … (p + 1)·rows_each − 1, for one run and CLASSES
    classes; r = run · blocks + block of classes.

    Args:
        blocks: the number of blocks of classes.
        sums_ptr: `[parts, R, K, d]` float32, written: Σ (h − s_k).
        squares_ptr: `[parts, column blocks, R, K]` float32, written: Σ of the squares over the block's features.
        batch_ptr: `[2 K + 2]` int32; values that are not finite, of samples with a class, are added to the last number.
        STAGES: tiles whose loads are under way at once.
    """
    # 1. Find the program's features, classes and rows.
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    run, first_class = (tl.program_id(2) // blocks).to(tl.int64), (tl.program_id(2) % blocks) * CLASSES
    runs = tl.num_programs(2) // blocks
    features_ptr += run * stride_run
    shifts_ptr += run * classes * dim
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    k = first_class + tl.arange(0, CLASSES)
    start = (part * rows_each).to(tl.int32)
    last = tl.minimum(start + rows_each, rows)
    sums, of_rows = tl.zeros((CLASSES, COLUMNS), tl.float32), tl.zeros((CLASSES, ROWS), tl.float32)
    # 2. Sum tile by tile. Shifts are loaded where needed, from the first-level cache, not copied ahead as values are.
    for top in tl.range(start, last, ROWS, num_stages=STAGES):
        row = top + tl.arange(0, ROWS)
        value = _values(features_ptr, stride_row, stride_column, dim, row, column, last)
        label = _labels(labels_ptr, classes, row, last)
        match = label[None, :] == k[:, None]
        # In a batch sorted by class a tile has few classes, so most blocks of classes have nothing to add.
        if tl.max(match.to(tl.int32)) > 0:
            centred = _centred(value, label, shifts_ptr, dim, column)
            of_rows += tl.where(match, tl.sum(centred * centred, 1)[None, :], 0.0)
            sums += _summed(match, centred)
    squares = tl.sum(of_rows, 1)
    # 3. Store the part's sums.
    out = ((part * runs + run) * classes + k)[:, None] * dim + column[None, :]
    tl.store(sums_ptr + out, sums, mask=(k < classes)[:, None] & (column < dim)[None, :])
    out = ((part * tl.num_programs(0) + block) * runs + run) * classes + k
    tl.store(squares_ptr + out, squares, mask=k < classes)
    # 4. A value that is not finite makes its square, and so a sum, not finite: only then count them.
    if tl.max((squares - squares != 0).to(tl.int32), 0) > 0:
        not_finite = 0
        for top in range(start, last, ROWS):
            row = top + tl.arange(0, ROWS)
            value = _values(features_ptr, stride_row, stride_column, dim, row, column, last)
            label = _labels(labels_ptr, classes, row, last)
            ours = (label >= first_class) & (label < first_class + CLASSES)
            not_finite += tl.sum(tl.sum((ours[:, None] & (value - value != 0)).to(tl.int32), 1), 0)
        tl.atomic_add(batch_ptr + 2 * classes + 1, not_finite, sem="relaxed")


@triton.jit
def _summed(match, centred):
    """The sums of a tile by class, `[CLASSES, COLUMNS]` float32.

    Two tf32 numbers hold at least 22 bits, and the ones are exact. Tensor cores truncate when they accumulate, so they
    do within one tile only.
    """
    high, ones = _cut(centred), match.to(tl.float32)
    low = tl.dot(ones, centred - high, input_precision="tf32")
    return tl.dot(ones, high, low, input_precision="tf32")


@triton.jit
def _added(ptr, parts, pitch, i, inside, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum elements i of `[parts, pitch]` float32 over the parts, PARTS per iteration; `[BLOCK]` float32."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        part_ptr = ptr + part.to(tl.int64)[:, None] * pitch + i[None, :]
        total += tl.sum(tl.load(part_ptr, mask=(part < parts)[:, None] & inside[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["parts", "squared_parts"])
def commit_kernel(
    part_sums_ptr, part_squares_ptr, batch_ptr, parts, squared_parts, dim, classes,
    counts_ptr, sums_ptr, squares_ptr, refused_ptr,
    PROPAGATE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    SQUARED_PARTS: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """Add the parts to the statistics, or count the batch as refused.

    Program (i, r) is of run r: the first ⌈K·d / BLOCK⌉ programs add BLOCK elements of the sums each, PARTS parts at a
    time; the others squares and counts of SQUARED classes, SQUARED_PARTS parts at a time.

    Args:
        part_sums_ptr, part_squares_ptr: `[parts, R, K, d]` and `[squared_parts, R, K]` float32.
        counts_ptr, sums_ptr, squares_ptr: the statistics, updated.
        refused_ptr: `[3]` int64, updated: refused batches, their wrong labels, their values that are not finite.
        PROPAGATE: whether to accept values that are not finite.
    """
    # 1. Decide whether the batch is refused. What is added below does not wait for it.
    program, run, runs = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    wrong, not_finite = tl.load(batch_ptr + 2 * classes), tl.load(batch_ptr + 2 * classes + 1)
    refused = wrong > 0
    if not PROPAGATE:
        refused = refused | (not_finite > 0)
    if refused & (program == 0) & (run == 0):
        tl.store(refused_ptr, tl.load(refused_ptr) + 1)
        tl.store(refused_ptr + 1, tl.load(refused_ptr + 1) + wrong)
        if not PROPAGATE:
            tl.store(refused_ptr + 2, tl.load(refused_ptr + 2) + not_finite)
    size = classes * dim
    summing = tl.cdiv(size, BLOCK)
    # 2. Add sums, or squares and counts.
    if program < summing:
        i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        sum_ptr = sums_ptr + run * size + i
        total = tl.load(sum_ptr, mask=i < size)
        total += _added(part_sums_ptr + run * size, parts, runs.to(tl.int64) * size, i, i < size, PARTS, BLOCK)
        if not refused:
            tl.store(sum_ptr, total, mask=i < size)
    else:
        k = (program - summing) * SQUARED + tl.arange(0, SQUARED)
        square_ptr = squares_ptr + run * classes + k
        square = tl.load(square_ptr, mask=k < classes)
        count = tl.load(counts_ptr + k, mask=k < classes) + tl.load(batch_ptr + k, mask=k < classes)
        square += _added(
            part_squares_ptr + run * classes, squared_parts, runs.to(tl.int64) * classes, k, k < classes,
            SQUARED_PARTS, SQUARED,
        )  # fmt: skip
        if not refused:
            tl.store(square_ptr, square, mask=k < classes)
            if run == 0:
                tl.store(counts_ptr + k, count, mask=k < classes)


@triton.jit(do_not_specialize=["start", "rows"])
def split_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, shifts_ptr, start, rows, dim, classes,
    out_ptr, out_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Split centred values into two bfloat16 numbers, high + low; 0 after the last sample.

    Program (c, b, r) does COLUMNS features of ROWS samples of run r, counted from sample `start`. `out` is
    `[R, out_rows, 2, d]` bfloat16.
    """
    run = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    value = _values(features_ptr + run * stride_run, stride_row, stride_column, dim, start + row, column, rows)
    label = _labels(labels_ptr, classes, start + row, rows)
    centred = _centred(value, label, shifts_ptr + run * classes * dim, dim, column)
    high = centred.to(tl.bfloat16)
    low = (centred - high.to(tl.float32)).to(tl.bfloat16)
    high_ptr = out_ptr + (run * out_rows + row)[:, None] * 2 * dim + column[None, :]
    mask = (row < out_rows)[:, None] & (column < dim)[None, :]
    tl.store(high_ptr, high, mask=mask)
    tl.store(high_ptr + dim, low, mask=mask)


@triton.jit(do_not_specialize=["high_parts", "low_parts"])
def add_moment_kernel(
    highs_ptr, lows_ptr, high_parts, low_parts, dim, batch_ptr, classes, moves_ptr, flags_ptr, scatter_ptr,
    MOVES: tl.constexpr, PROPAGATE: tl.constexpr, CLASSES: tl.constexpr, SIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """scatter += Σ (HᵀH + HᵀL + LᵀH + LᵀL) over the parts, if the batch is not refused; with MOVES, `moves` before.

    Program (i, j, r) does SIDE × SIDE elements of run r, in block row i and block column j; none above the diagonal,
    where the scatter is not valid. All in float32: `highs` `[R, high_parts, d, 2 d]` holds HᵀH and HᵀL side by side,
    `lows` `[R, low_parts, d, d]` LᵀL; `scatter` is `[R, d, d]`.
    """
    if tl.program_id(1) > tl.program_id(0):
        return
    run = tl.program_id(2).to(tl.int64)
    size = tl.cast(dim, tl.int64) * dim  # as a constant it has no `to`
    i, j = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    row, column = i.to(tl.int64)[:, None], j.to(tl.int64)[:, None]
    inside = (i < dim)[:, None] & (j < dim)[None, :]
    mirrored = (j < dim)[:, None] & (i < dim)[None, :]
    element_ptr = scatter_ptr + run * size + row * dim + j[None, :]
    scatter = tl.load(element_ptr, mask=inside, other=0.0)
    # 1. Move the samples of earlier batches to the new shifts.
    if MOVES:
        for start in range(0, classes, CLASSES):
            k = start + tl.arange(0, CLASSES)
            if tl.max(tl.load(flags_ptr + run * classes + k, mask=k < classes, other=0), 0) > 0:
                change = tl.zeros((SIDE, SIDE), tl.float64)
                for one in range(start, tl.minimum(start + CLASSES, classes)):
                    if tl.load(flags_ptr + run * classes + one) > 0:
                        a_ptr = moves_ptr + (run * classes + one) * 2 * dim
                        a_i, a_j = tl.load(a_ptr + i, mask=i < dim), tl.load(a_ptr + j, mask=j < dim)
                        delta_i = tl.load(a_ptr + dim + i, mask=i < dim)
                        delta_j = tl.load(a_ptr + dim + j, mask=j < dim)
                        change += a_i[:, None] * delta_j[None, :] + delta_i[:, None] * a_j[None, :]
                scatter = (scatter.to(tl.float64) + change).to(tl.float32)
    # 2. Add the products. LᵀH is HᵀL mirrored: its rows are loaded as they lie, and transposed here.
    refused = tl.load(batch_ptr + 2 * classes) > 0
    if not PROPAGATE:
        refused = refused | (tl.load(batch_ptr + 2 * classes + 1) > 0)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for part in tl.range(0, high_parts, num_stages=STAGES):
        high_ptr = highs_ptr + (run * high_parts + part) * 2 * size
        high = tl.load(high_ptr + row * 2 * dim + j[None, :], mask=inside, other=0.0)
        mixed = tl.load(high_ptr + row * 2 * dim + dim + j[None, :], mask=inside, other=0.0)
        other = tl.load(high_ptr + column * 2 * dim + dim + i[None, :], mask=mirrored, other=0.0)
        total += high + (mixed + tl.trans(other))
    for part in tl.range(0, low_parts, num_stages=STAGES):
        low_ptr = lows_ptr + (run * low_parts + part) * size
        total += tl.load(low_ptr + row * dim + j[None, :], mask=inside, other=0.0)
    if not refused:
        scatter += total
    tl.store(element_ptr, scatter, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def project_kernel(
    features_ptr, stride_run, stride_row, stride_column, labels_ptr, shifts_ptr, rows, dim, classes,
    axes_ptr, n_axes, out_ptr, ROWS: tl.constexpr, STEP: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """axes · (h − s_y): program (b, a, r) computes AXES axes of ROWS samples of run r, STEP features per iteration.

    `axes` is `[R, n_axes, d]`, `out` `[R, B, n_axes]`, both float32; 0 for a wrong label.
    """
    run = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    axis = tl.program_id(1) * AXES + tl.arange(0, AXES)
    features_ptr += run * stride_run
    shifts_ptr += run * classes * dim
    label = _labels(labels_ptr, classes, row, rows)
    total = tl.zeros((ROWS, AXES), tl.float32)
    for start in range(0, dim, STEP):
        column = start + tl.arange(0, STEP)
        value = _values(features_ptr, stride_row, stride_column, dim, row, column, rows)
        centred = _centred(value, label, shifts_ptr, dim, column)
        axis_ptr = axes_ptr + (run * n_axes + axis)[None, :] * dim + column[:, None]
        axes = tl.load(axis_ptr, mask=(axis < n_axes)[None, :] & (column < dim)[:, None], other=0.0)
        # As tf32x3, but each step's sum is added in float32: tensor cores truncate when accumulating.
        high, axes_high = _cut(centred), _cut(axes)
        part = tl.dot(centred - high, axes_high, input_precision="tf32")
        part = tl.dot(high, axes - axes_high, part, input_precision="tf32")
        total += tl.dot(high, axes_high, part, input_precision="tf32")
    out = out_ptr + (run * rows + row)[:, None] * n_axes + axis[None, :]
    tl.store(out, total, mask=(row < rows)[:, None] & (axis < n_axes)[None, :])
