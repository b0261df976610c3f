"""`torch.ops.ncollapse.update`: the update as an operator that torch.compile puts into its graph.

A table of addresses must not be part of a graph: a compiler moves tensors. So the operator takes lists of tensors,
says which of them it changes, and makes (or finds) the table when it runs. Calling it costs more than `Update.step`,
which is what eager code uses.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.reference import Slot
from ncollapse.kernels.update.table import Extras, HyperTable, Lists

#: Bits of `parts`: what a parameter has beside itself, and whether its first step is still to come.
FIRST, SECOND, STEP, COPY, FRESH = 1, 2, 4, 8, 16

# Defined with Library, not custom_op, whose Python wrapper takes longer than the update of a small model.
_library = torch.library.Library("ncollapse", "DEF")
_library.define(
    "update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, Tensor(f!)? norms, Tensor(g!)? row_sum, Tensor[] values, Tensor[] live, int[] live_places, "
    "int[] codes, int[] runs, int[] sets, int[] parts, int head, Tensor? grad_scale, Tensor? found_inf) -> ()",
    # Inductor's CUDA graphs would take the tables, which outlive a call, for a leak of theirs.
    tags=(torch.Tag.cudagraph_unsafe,),
)


def parts(slot: Slot, copy: Tensor | None) -> int:
    """The bits of a parameter."""
    has = (slot.first is not None, slot.second is not None, slot.step is not None, copy is not None, slot.fresh)
    return sum(bit * flag for bit, flag in zip((FIRST, SECOND, STEP, COPY, FRESH), has, strict=True))


# The newest tables, by all addresses and numbers that they are made of.
_updates: OrderedDict[Any, Update] = OrderedDict()
_KEPT = 16
# Those that CUDA graphs use.
_captured: list[Update] = []


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    norms: Tensor | None,
    row_sum: Tensor | None,
    values: list[Tensor],
    live: list[Tensor],
    live_places: list[int],
    codes: list[int],
    runs: list[int],
    sets: list[int],
    parts: list[int],
    head: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    outputs = [t for t in (norms, row_sum) if t is not None]
    pointers = (t.data_ptr() for ts in (params, firsts, seconds, steps, copies, values, live, outputs) for t in ts)
    # Two models may have lived at the same address, one after the other: shapes and dtypes tell them apart.
    kinds = ((p.shape, p.stride(), p.dtype, p.device) for p in params)
    key = (*pointers, head, *map(tuple, (live_places, codes, runs, sets, parts)), *kinds)
    update = _updates.get(key)
    if update is None:
        each, rest = [], iter(codes)
        for n in runs:
            each.append([next(rest) for _ in range(n)])
        update = _updates[key] = Update({v.device: _hyper_table(v, live, live_places, each) for v in values})
        if len(_updates) > _KEPT:
            _updates.popitem(last=False)
    _updates.move_to_end(key)
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(update)

    def lists() -> Lists:
        return _lists(params, firsts, seconds, steps, copies, sets, parts, Extras((), norms, False, head, row_sum))

    update.step(params, grads, lists, grad_scale, found_inf)


def _lists(
    params: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    sets: list[int],
    parts: list[int],
    extras: Extras,
) -> Lists:
    def take(tensors: Iterator[Tensor], part: int, bit: int) -> Tensor | None:
        return next(tensors) if part & bit else None

    f, s, t, c = iter(firsts), iter(seconds), iter(steps), iter(copies)
    slots = [Slot(take(f, p, FIRST), take(s, p, SECOND), take(t, p, STEP), bool(p & FRESH)) for p in parts]
    extras.copies = [take(c, p, COPY) for p in parts] if copies else ()
    return Lists(params, slots, sets, extras)


def _hyper_table(values: Tensor, live: Sequence[Tensor], places: Sequence[int], codes: list[list[int]]) -> HyperTable:
    here = [(t, place) for t, place in zip(live, places, strict=True) if t.device == values.device]
    return HyperTable(values, [t for t, _ in here], [place for _, place in here], codes)


_library.impl("update", _update, "CompositeExplicitAutograd")


@torch.library.register_fake("ncollapse::update")
def _(*_: Any) -> None:
    """Nothing comes out, and nothing changes its shape."""


update_op = torch.ops.ncollapse.update.default
