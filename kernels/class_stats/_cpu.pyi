def gather(
    features: int, labels: int, shifts: int, runs: int, rows: int, dim: int, run_stride: int, row_stride: int,
    classes: int, counts: int, sums: int, squares: int, propagate: bool, features_type: int, sums_type: int,
    threads: int,
) -> tuple[int, int, int, list[tuple[int, bytes]]]: ...  # fmt: skip
def map(
    features: int, labels: int, shifts: int, runs: int, rows: int, dim: int, run_stride: int, row_stride: int,
    classes: int, axes: int, n_axes: int, out: int, features_type: int, sums_type: int, threads: int,
) -> None: ...  # fmt: skip

has_openmp: int
