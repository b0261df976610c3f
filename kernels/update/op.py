"""`torch.ops.ncollapse.update`: the update as an operator that torch.compile puts into its graph.

A table of addresses must not be part of a graph, since a compiler moves tensors. So the operator takes lists of
tensors, declares which of them it changes, and builds or finds the table when it runs. A call costs more than
`Update.step`, which eager code uses.
"""

from collections import OrderedDict
from itertools import islice
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ncollapse.kernels.operators import register_operator
from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.table import Tensors

#: Bits of `parts`: which states and copy a parameter has, and whether it has taken no step yet.
FIRST, SECOND, STEP, COPY, FRESH = 1, 2, 4, 8, 16


def parts(first: Any, second: Any, step: Any, copy: Any, fresh: bool) -> int:
    """A parameter's bits: FIRST, SECOND, STEP, COPY for what is not None, and FRESH."""
    has = (first is not None, second is not None, step is not None, copy is not None, fresh)
    return sum(bit * flag for bit, flag in zip((FIRST, SECOND, STEP, COPY, FRESH), has, strict=True))


# One thread at a time uses the tables below, since a step may fill them again.
_lock = Lock()
# The last tables used.
_updates: OrderedDict[Any, Update] = OrderedDict()
_KEPT = 16
# Memory that CUDA graphs use.
_captured: list[Any] = []


def _update(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], steps: list[Tensor],
    copies: list[Tensor], norms: Tensor | None, values: list[Tensor], live: list[Tensor],
    live_places: list[int], codes: list[int], runs: list[int], sets: list[int], parts: list[int],
    grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    with _lock:
        # `Update.step` compares the tensors themselves: the key tells what a table does not, and whose it likely is.
        key = (params[0].data_ptr(), *map(tuple, (live_places, codes, runs, sets, parts)))
        update = _updates.get(key)
        if update is None:
            left = iter(codes)
            fresh = [bool(p & FRESH) for p in parts]
            codes_of_sets = [list(islice(left, n)) for n in runs]
            update = _updates[key] = Update(sets, codes_of_sets, live_places, fresh, _captured)
            if len(_updates) > _KEPT:
                _updates.popitem(last=False)
        _updates.move_to_end(key)
        spread = (
            _spread(tensors, parts, bit) if tensors else []
            for tensors, bit in ((firsts, FIRST), (seconds, SECOND), (steps, STEP), (copies, COPY))
        )
        update.step(Tensors(params, grads, *spread), values, live, norms, grad_scale, found_inf)


def _spread(tensors: list[Tensor], parts: list[int], bit: int) -> list[Tensor | None]:
    """One entry per parameter: the next tensor where its bit is set, else None."""
    left = iter(tensors)
    return [next(left) if part & bit else None for part in parts]


update_op = register_operator(
    "update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, Tensor(f!)? norms, Tensor[] values, Tensor[] live, int[] live_places, "
    "int[] codes, int[] runs, int[] sets, int[] parts, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _update,
    # Inductor's CUDA graphs would report the tables, which outlive a call, as a memory leak.
    tags=(torch.Tag.cudagraph_unsafe,),
)
