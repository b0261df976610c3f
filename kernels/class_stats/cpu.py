"""Class statistics on the CPU: the launcher of `_cpu.cpp`, and matrix products for second moments."""

import torch
from torch import Tensor

from ncollapse.kernels.class_stats.reference import State
from ncollapse.kernels.operators import DTYPE_CODES, cpu_threads

EXTENSION = "ncollapse.kernels.class_stats._cpu"
# Dtypes of features and sums for which there is a kernel.
_PAIRS = {(x, torch.float32) for x in (torch.float32, torch.bfloat16, torch.float16)}
_PAIRS |= {(x, torch.float64) for x in (torch.float64, torch.float32)}
_ROWS = 2048  # centred features per matrix product: few enough to stay in the caches until the product reads them
_BLOCK = 256  # rows per block of a second moment; narrower blocks are slow
_MOST_AXES = 32  # with more, a matrix product is faster than the loop over the axes


def add_batch(features: Tensor, labels: Tensor, state: State, propagate: bool) -> None:
    """As `class_stats_reference`."""
    from ncollapse.kernels.class_stats import _cpu

    features = _dense(features, state.shifts.dtype)
    memory, bad_labels, bad_values, moves = _cpu.gather(
        *_batch(features, labels, state.shifts), state.counts.data_ptr(), state.sums.data_ptr(),
        state.squares.data_ptr(), propagate, *_settings(features, state.shifts),
    )  # fmt: skip
    if state.scatter is not None:
        for run in {run for run, _ in moves}:
            of_run = b"".join(move for r, move in moves if r == run)
            _move_scatter(
                state,
                run,
                torch.frombuffer(bytearray(of_run), dtype=torch.float64).unflatten(0, (-1, 2, state.shifts.shape[-1])),
            )
    if not memory:
        raise MemoryError(
            f"class statistics: no memory for the sums of a batch, several times {tuple(state.sums.shape)} numbers; "
            "the batch is not added. Smaller batches need fewer of them"
        )
    if bad_labels or (bad_values and not propagate):
        state.refused.add_(torch.tensor([1, bad_labels, bad_values], device="cpu"))
    elif state.scatter is not None and labels.numel():
        for rows, row_labels in zip(features.split(_ROWS, -2), labels.split(_ROWS), strict=True):
            if state.axes is None:
                _add_moment(state.scatter, centre(rows, row_labels, state.shifts))
            else:
                # Only m × m values: float64 costs nothing.
                z = project(rows, row_labels, state.shifts, state.axes).double()
                state.scatter.add_(z.mT @ z)


def _move_scatter(state: State, run: int, moves: Tensor) -> None:
    """Add Σ (a·δᵀ + δ·aᵀ) to a run's scatter, which moves it to the new shifts; `moves` are (a, δ), `[*, 2, d]`."""
    assert state.scatter is not None
    scatter = state.scatter if state.scatter.dim() == 2 else state.scatter[run]
    axes = state.axes if state.axes is None or state.axes.dim() == 2 else state.axes[run]
    a, delta = (moves if axes is None else moves @ axes.double().mT).unbind(1)
    cross = a.mT @ delta
    scatter.add_(cross + cross.mT)


def centre(features: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """As `centre_reference`."""
    return _map(features, labels, shifts, None)


def project(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """As `project_reference`."""
    if axes.shape[-2] <= _MOST_AXES:
        return _map(features, labels, shifts, axes)
    parts = zip(features.split(_ROWS, -2), labels.split(_ROWS), strict=True)
    return torch.cat([centre(rows, row_labels, shifts) @ axes.mT for rows, row_labels in parts], -2)


def _map(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor | None) -> Tensor:
    from ncollapse.kernels.class_stats import _cpu

    features = _dense(features, shifts.dtype)
    width = shifts.shape[-1] if axes is None else axes.shape[-2]
    out = shifts.new_empty(*features.shape[:-1], width)
    address = 0 if axes is None else axes.data_ptr()
    _cpu.map(*_batch(features, labels, shifts), address, width, out.data_ptr(), *_settings(features, shifts))
    return out


def _add_moment(scatter: Tensor, z: Tensor) -> None:
    """scatter += zᵀz on and below the diagonal alone, which is half the work, one block row at a time."""
    d = z.shape[-1]
    step = _BLOCK if d >= 2 * _BLOCK else d
    for s, x in zip(scatter, z, strict=True) if z.dim() == 3 else ((scatter, z),):
        for i in range(0, d, step):
            block = s[i : i + step, : i + step]
            torch.addmm(block, x[:, i : i + step].T, x[:, : i + step], out=block)


def _dense(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Features in a dtype that has a kernel, the values of a sample contiguous."""
    if (features.dtype, dtype) not in _PAIRS:
        features = features.to(dtype)
    return features if features.stride(-1) == 1 or features.shape[-1] == 1 else features.contiguous()


def _batch(features: Tensor, labels: Tensor, shifts: Tensor) -> tuple[int, int, int, int, int, int, int, int, int]:
    runs, run_stride = (features.shape[0], features.stride(0)) if features.dim() == 3 else (1, 0)
    addresses = features.data_ptr(), labels.data_ptr(), shifts.data_ptr()
    return *addresses, runs, *features.shape[-2:], run_stride, features.stride(-2), shifts.shape[-2]


def _settings(features: Tensor, shifts: Tensor) -> tuple[int, int, int]:
    """Dtype codes and number of threads."""
    return DTYPE_CODES[features.dtype], DTYPE_CODES[shifts.dtype], cpu_threads(features.numel())
