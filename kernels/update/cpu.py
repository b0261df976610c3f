"""The update of a whole model on the CPU: the launcher of `_cpu.cpp`, compiled when the package is installed."""

import torch
from torch import Tensor

from ncollapse.kernels.update.table import Table

#: The threads share a table's chunks evenly: large tensors are cut as small as makes their shares alike.
CHUNK = 4096

_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Below so many elements a second thread costs more to wake than it saves.
_SERIAL = 65536


def launch(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """One step of every parameter in the table."""
    from ncollapse.kernels.update import _cpu

    if found_inf is not None and found_inf.item() != 0:
        return
    scale = None if grad_scale is None else grad_scale.float()
    norms = table.norms
    _cpu.update(
        table.tensors.data_ptr(),
        table.chunks.data_ptr(),
        table.programs,
        CHUNK,
        table.hypers.table.data_ptr(),
        table.steps.data_ptr(),
        table.counts,
        0 if scale is None else scale.data_ptr(),
        scale is not None or norms is not None or table.row_sum is not None or table.has_copies,
        0 if norms is None else norms.data_ptr(),
        table.add,
        0 if norms is None else len(norms),
        _TYPES[table.param],
        _TYPES[table.grad],
        1 if table.elements < _SERIAL else torch.get_num_threads(),
    )
