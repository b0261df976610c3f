def update(
    tensors: int, rows: int, chunks: int, n_chunks: int, chunk: int, hypers: int, scale: int, extra: bool,
    norms: int, add: bool, runs: int, param: int, grad: int, threads: int,
) -> None: ...  # fmt: skip
def layout() -> dict[str, int]: ...

has_openmp: int
