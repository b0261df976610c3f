"""Counters of the programs of a launch that have arrived, by which the last one knows that it is the last.

A launch's counters must be zero when it begins, and no other launch may count with them at the same time, on whatever
stream. Outside of a CUDA graph each launch gets counters of its own, zeroed: what a failed launch leaves behind harms
no other. Within a graph the zeroing would be a node that every replay waits for. There each captured launch gets
counters of a reserve that was zeroed before, and no other launch gets them again: graphs and their branches may run
side by side. The launch's last program sets them to zero for the next replay.
"""

import threading

import torch
from torch import Tensor

#: Counters of a reserve, 4 bytes each. A graph of ResNet9 takes about fifty, one of 24 stacked runs a thousand.
RESERVED = 2**14

_lock = threading.Lock()
_reserves: dict[torch.device, Tensor] = {}
_allocated: list[Tensor] = []  # all of them: a graph holds addresses, not tensors


def zero_counters(count: int, device: torch.device) -> Tensor:
    """`[count]` int32, zero, for one launch on the current stream, or for every replay of the one that is captured."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        with _lock:
            return _from_reserve(count, device)
    with _lock:
        # A capture begins by waiting for the device, so that these are zero before any graph runs.
        if len(_reserves.get(device, ())) < RESERVED // 2:
            _reserves[device] = torch.zeros(RESERVED, dtype=torch.int32, device=device)
            _allocated.append(_reserves[device])
    return torch.zeros(count, dtype=torch.int32, device=device)


def _from_reserve(count: int, device: torch.device) -> Tensor:
    """Take counters from the device's reserve; if it has too few, the graph zeroes its own in every replay."""
    reserve = _reserves.get(device)
    if reserve is None or len(reserve) < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _reserves[device] = reserve[-(-count // 4) * 4 :]  # 16 bytes: Triton compiles another kernel for other addresses
    return reserve[:count]
