"""Class statistics on the CPU: the launcher of `_cpu.cpp`, and the matrix library for second moments."""

import torch
from torch import Tensor

from ncollapse.kernels.class_stats.reference import State

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_PAIRS = {(x, torch.float32) for x in (torch.float32, torch.bfloat16, torch.float16)}
_PAIRS |= {(x, torch.float64) for x in (torch.float64, torch.float32)}
# Below so many elements a second thread costs more to wake than it saves.
_SERIAL = 65536
# Rows of centred features at a time, few enough to stay in the caches until the matrix product has read them.
_ROWS = 2048
# On and below the diagonal a second moment is half the work, but narrow blocks are slow.
_BLOCK = 256
# With more axes the matrix library is faster than the loop over them.
_FEW = 32


def add_batch(features: Tensor, labels: Tensor, state: State, propagate: bool) -> None:
    """As `class_stats_reference`."""
    from ncollapse.kernels.class_stats import _cpu

    features = _dense(features, state.shifts.dtype)
    bad_labels, bad_values = _cpu.gather(
        *_batch(features, labels, state.shifts),
        state.counts.data_ptr(),
        state.sums.data_ptr(),
        state.squares.data_ptr(),
        propagate,
        *_how(features, state.shifts),
    )
    if bad_labels or (bad_values and not propagate):
        state.refused.add_(torch.tensor([1, bad_labels, bad_values]))
    elif state.scatter is not None and labels.numel():
        for start in range(0, len(labels), _ROWS):
            rows, of = features[..., start : start + _ROWS, :], labels[start : start + _ROWS]
            if state.axes is None:
                _add_moment(state.scatter, centre(rows, of, state.shifts))
            else:
                # m × m values: float64 costs nothing.
                z = project(rows, of, state.shifts, state.axes).double()
                state.scatter.add_(z.mT @ z)


def centre(features: Tensor, labels: Tensor, shifts: Tensor) -> Tensor:
    """As `centre_reference`."""
    return _map(features, labels, shifts, None)


def project(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor) -> Tensor:
    """As `project_reference`."""
    if axes.shape[-2] <= _FEW:
        return _map(features, labels, shifts, axes)
    parts = zip(features.split(_ROWS, -2), labels.split(_ROWS), strict=True)
    return torch.cat([centre(rows, of, shifts) @ axes.mT for rows, of in parts], -2)


def _map(features: Tensor, labels: Tensor, shifts: Tensor, axes: Tensor | None) -> Tensor:
    from ncollapse.kernels.class_stats import _cpu

    features = _dense(features, shifts.dtype)
    width = shifts.shape[-1] if axes is None else axes.shape[-2]
    out = shifts.new_empty(*features.shape[:-1], width)
    address = 0 if axes is None else axes.data_ptr()
    _cpu.map(*_batch(features, labels, shifts), address, width, out.data_ptr(), *_how(features, shifts))
    return out


def _add_moment(scatter: Tensor, z: Tensor) -> None:
    """scatter += zᵀz on and below the diagonal, block row by block row."""
    d = z.shape[-1]
    step = _BLOCK if d >= 2 * _BLOCK else d
    for s, x in zip(scatter, z, strict=True) if z.dim() == 3 else ((scatter, z),):
        for i in range(0, d, step):
            block = s[i : i + step, : i + step]
            torch.addmm(block, x[:, i : i + step].T, x[:, : i + step], out=block)


def _dense(features: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype that there is a kernel for, with the values of a sample one after the other."""
    if (features.dtype, dtype) not in _PAIRS:
        features = features.to(dtype)
    return features if features.stride(-1) == 1 or features.shape[-1] == 1 else features.contiguous()


def _batch(features: Tensor, labels: Tensor, shifts: Tensor) -> tuple[int, int, int, int, int, int, int, int, int]:
    runs = features.shape[0] if features.dim() == 3 else 1
    of_run = features.stride(0) if features.dim() == 3 else 0
    rows, dim = features.shape[-2:]
    addresses = features.data_ptr(), labels.data_ptr(), shifts.data_ptr()
    return *addresses, runs, rows, dim, of_run, features.stride(-2), shifts.shape[-2]


def _how(features: Tensor, shifts: Tensor) -> tuple[int, int, int]:
    threads = 1 if features.numel() < _SERIAL else torch.get_num_threads()
    return _TYPES[features.dtype], _TYPES[shifts.dtype], threads
