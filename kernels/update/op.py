"""`torch.ops.ncollapse.update`: the update as an operator that torch.compile puts into its graph.

A table of addresses must not be part of a graph, since a compiler moves tensors. So the operator takes lists of
tensors, declares which of them it changes, and builds or finds the table when it runs. A call costs more than
`Update.step`, which eager code uses.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ncollapse.kernels.operators import register_operator
from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.reference import Slot
from ncollapse.kernels.update.table import Extras, HyperTable, Lists

#: Bits of `parts`: which states and copy a parameter has, and whether it has taken no step yet.
FIRST, SECOND, STEP, COPY, FRESH = 1, 2, 4, 8, 16


def parts(slot: Slot, copy: Tensor | None) -> int:
    """A parameter's bits: FIRST, SECOND, STEP, COPY and FRESH."""
    has = (slot.first is not None, slot.second is not None, slot.step is not None, copy is not None, slot.fresh)
    return sum(bit * flag for bit, flag in zip((FIRST, SECOND, STEP, COPY, FRESH), has, strict=True))


# The last tables used, by the addresses and numbers that they contain.
_updates: OrderedDict[Any, Update] = OrderedDict()
_KEPT = 16
# Tables that CUDA graphs use.
_captured: list[Update] = []


def _update(
    params: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], steps: list[Tensor],
    copies: list[Tensor], norms: Tensor | None, row_sum: Tensor | None, values: list[Tensor], live: list[Tensor],
    live_places: list[int], codes: list[int], runs: list[int], sets: list[int], parts: list[int], head: int,
    grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    outputs = [t for t in (norms, row_sum) if t is not None]
    pointers = (t.data_ptr() for ts in (params, firsts, seconds, steps, copies, values, live, outputs) for t in ts)
    # Another model may have had the same addresses before: shapes and dtypes distinguish them.
    kinds = ((p.shape, p.stride(), p.dtype, p.device) for p in params)
    key = (*pointers, head, *map(tuple, (live_places, codes, runs, sets, parts)), *kinds)
    update = _updates.get(key)
    if update is None:
        left = iter(codes)
        by_set = [list(islice(left, n)) for n in runs]
        update = _updates[key] = Update({v.device: _hyper_table(v, live, live_places, by_set) for v in values})
        if len(_updates) > _KEPT:
            _updates.popitem(last=False)
    _updates.move_to_end(key)
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(update)

    def lists() -> Lists:
        spread = (_spread(t, parts, bit) for t, bit in ((firsts, FIRST), (seconds, SECOND), (steps, STEP)))
        slots = [Slot(f, s, t, bool(p & FRESH)) for f, s, t, p in zip(*spread, parts, strict=True)]
        extras = Extras(_spread(copies, parts, COPY) if copies else (), norms, False, head, row_sum)
        return Lists(params, slots, sets, extras)

    update.step(params, grads, lists, grad_scale, found_inf)


def _spread(tensors: list[Tensor], parts: list[int], bit: int) -> list[Tensor | None]:
    """One entry per parameter: the next tensor where its bit is set, else None."""
    left = iter(tensors)
    return [next(left) if part & bit else None for part in parts]


def _hyper_table(values: Tensor, live: Sequence[Tensor], places: Sequence[int], codes: list[list[int]]) -> HyperTable:
    on_device = [(t, place) for t, place in zip(live, places, strict=True) if t.device == values.device]
    return HyperTable(values, [t for t, _ in on_device], [place for _, place in on_device], codes)


update_op = register_operator(
    "update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, Tensor(f!)? norms, Tensor(g!)? row_sum, Tensor[] values, Tensor[] live, int[] live_places, "
    "int[] codes, int[] runs, int[] sets, int[] parts, int head, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _update,
    # Inductor's CUDA graphs would report the tables, which outlive a call, as a memory leak.
    tags=(torch.Tag.cudagraph_unsafe,),
)
