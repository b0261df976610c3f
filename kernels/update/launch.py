"""Steps over lists of tensors: one launch per device and dtype; the reference where no kernel fits."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncollapse.kernels import operators
from ncollapse.kernels.tensors import CHANGED, FOREIGN, Fingerprint, has_no_memory, storage_needed
from ncollapse.kernels.update import cpu
from ncollapse.kernels.update.graph_memory import keep_for_graph
from ncollapse.kernels.update.reference import Slot, declared, in_float64, update_reference
from ncollapse.kernels.update.table import (
    Col,
    Extras,
    HyperTable,
    Lists,
    Rows,
    Table,
    Tensors,
    numbers_device,
    same_layout,
)

# The dtype that gradients may have other than the parameter's own.
_GRADS = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}
_WRITTEN = [Col.PARAM, Col.FIRST, Col.SECOND, Col.STEP, Col.COPY]


def why_no_kernel(device: torch.device) -> str | None:
    """The reason why updates on this device use the reference; None if they use a kernel."""
    return operators.why_no_kernel(device, cpu.EXTENSION)


@dataclass
class _Bucket:
    """The parameters of one launch."""

    indices: list[int]
    device: torch.device
    table: Table | None = None  # None: the reference
    scratch: Any = None


class Update:
    """Steps over the same parameters with the same sets of hyperparameters.

    Every step looks at the address, shape, strides and dtype of every tensor that it hands to a kernel: other code may
    have changed them since the last step. Tables are filled again when an address has changed, built again when more
    has. Holds no parameter, gradient or state.

    Args:
        sets: for each parameter, the index of its set of hyperparameters.
        codes: for each set, the `code` of each stacked run.
        places: of the tensors `live` of `step`: each replaces the number of this place in the flattened `values`.
        fresh: for each parameter, whether no step was taken yet (`Slot.fresh`); none by default.
        captured: a list for what CUDA graphs hold addresses of, where torch cannot keep it alive (`keep_for_graph`): it
            must live as long as the graphs.

    Warns:
        UserWarning: (once for each reason) the slower reference updates some parameters, and why.
    """

    def __init__(
        self, sets: list[int], codes: list[list[int]], places: Sequence[int] = (), fresh: Sequence[bool] = (),
        captured: list[Any] | None = None,
    ) -> None:  # fmt: skip
        self._sets, self._codes, self._places = sets, codes, list(places)
        self.fresh = list(fresh) or [False] * len(sets)
        self._seen = Fingerprint(optional=Col.GRAD, written=sum(1 << column for column in _WRITTEN))
        self._seen_numbers = Fingerprint()
        self._buckets: list[_Bucket] = []
        self._hypers: dict[torch.device, HyperTable] = {}
        self._filled = False  # the tables hold the addresses of `_seen`
        self._bytes: Rows = np.zeros((len(_WRITTEN), 0), dtype=np.int64)
        self._turns: list[int] | None = None  # None: make new tables
        # Of each parameter's last gradient: the kinds of both, its dtype, whether it lay in memory as the parameter.
        self._grads: dict[int, tuple[list[bytes], torch.dtype, bool]] = {}
        self._captured = [] if captured is None else captured

    @property
    def launches(self) -> int:
        """The number of kernels that a step launches."""
        return sum(bucket.table is not None for bucket in self._buckets)

    def step(
        self, tensors: Tensors, values: list[Tensor], live: list[Tensor] | None = None, norms: Tensor | None = None,
        grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
        changed: Callable[[], Tensors] | None = None,
    ) -> None:  # fmt: skip
        """Take one step, in place. Parameters without a gradient stay as they are.

        Args:
            tensors: the same parameters at every step, with their gradients, states and copies.
            values: for each `numbers_device` of the parameters, `[sets, len(HYPERS)]` float64, as in `HyperTable`.
            live: tensors that replace numbers of `values`, as in `HyperTable`; each on the device of parameters.
            norms: a result, as in `Extras`.
            grad_scale, found_inf: as in `update_reference`.
            changed: called when a tensor has another dtype, device, shape or layout than before; returns the tensors.

        Raises:
            RuntimeError: shapes that do not fit the parameter's, or a storage that is smaller than its tensor; nothing
                has changed then. During the capture of a CUDA graph: tensors have changed since the last step.
        """
        numbers = ([*values, *(live or ()), *(() if norms is None else (norms,))],)
        extras = Extras(tensors.copies, norms)
        if self._seen_numbers.look(numbers) != 0:
            self._seen_numbers.renew(numbers)
            self._hypers, self._turns = {}, None
        moved = self._seen.look(tensors)
        if moved == CHANGED:
            tensors = tensors if changed is None else changed()
            extras.copies = tensors.copies
            self._seen.renew(tensors)
            self._bytes, self._turns = _bytes(tensors), None
        if self._turns is None or moved & ~(1 << Col.GRAD):
            turns, tangled = _turns(self._matrix()[_WRITTEN], self._bytes)
            if turns != self._turns:
                self._turns = None  # until all of it has succeeded
                self._plan(tensors, extras, values, live or [], turns, tangled)
                self._turns = turns
                self._filled = False
        if moved or not self._filled:
            addresses = self._matrix()
            for bucket in self._buckets:
                if bucket.table is not None:
                    every = len(bucket.indices) == len(self._sets)
                    bucket.table.point(addresses if every else addresses[:, bucket.indices])
            self._filled = True
        for bucket in self._buckets:
            self._launch(bucket, tensors, extras, grad_scale, found_inf)

    def unfinished(self) -> bool:
        """Whether a launch has ended before all of its programs did; waits for the device. Not during a capture.

        Such a launch has left its counter behind, with which no later one would count steps: it is reset.
        """
        scratches = [bucket.scratch for bucket in self._buckets if bucket.scratch is not None]
        for device in {scratch.arrived.device for scratch in scratches if scratch.arrived.is_cuda}:
            torch.cuda.synchronize(device)  # a step may run on another stream
        left = [scratch for scratch in scratches if scratch.arrived.item() != 0]
        for scratch in left:
            scratch.arrived.zero_()
        return bool(left)

    def _launch(
        self, bucket: _Bucket, tensors: Tensors, extras: Extras, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        scale = None if grad_scale is None else grad_scale.to(bucket.device, non_blocking=True)
        inf = None if found_inf is None else found_inf.to(bucket.device, non_blocking=True)
        if bucket.table is None:
            lists = Lists(tensors.params, self._slots(tensors), self._sets, extras)
            part = lists.part(bucket.indices, add=bucket is not self._buckets[0])
            self._reference(part, [tensors.grads[i] for i in bucket.indices], scale, inf)
        elif bucket.device.type == "cpu":
            cpu.launch_update(bucket.table, scale, inf)
        else:
            from ncollapse.kernels.update import gpu

            gpu.launch_update(bucket.table, bucket.scratch, scale, inf)
            if torch.cuda.is_current_stream_capturing():
                table, scratch = bucket.table, bucket.scratch
                launched = table.tensors, table.source, table.chunks, table.norms, scratch.arrived, scratch.partial
                hypers = table.hypers.table, table.hypers.values, *table.hypers.live.values()
                keep_for_graph([*launched, *hypers, scale, inf], self._captured, until_idle=True)
                self._filled = False  # the replay fills the table, not the capture: the next step fills it again

    def _matrix(self) -> Rows:
        """The addresses of the parameters' tensors: `[NUMEL, parameters]`, 0 for those that there are not."""
        matrix = np.zeros((int(Col.NUMEL), len(self._sets)), dtype=np.int64)
        at = 0
        for column, kinds in enumerate(self._seen.kinds):
            matrix[column, : len(kinds)] = self._seen.addresses[at : at + len(kinds)]
            at += len(kinds)
        return matrix

    def _slots(self, tensors: Tensors) -> list[Slot]:
        columns = [c or [None] * len(tensors.params) for c in (tensors.firsts, tensors.seconds, tensors.steps)]
        return [Slot(f, s, t, fresh) for f, s, t, fresh in zip(*columns, self.fresh, strict=True)]

    def _plan(
        self, tensors: Tensors, extras: Extras, values: list[Tensor], live: list[Tensor], turns: list[int],
        tangled: set[int],
    ) -> None:  # fmt: skip
        lists = Lists(tensors.params, self._slots(tensors), self._sets, extras)
        if any(t.is_cuda for t in values) and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "tensors of the optimizer have changed since its last step; take a step before one is captured in a "
                "CUDA graph"
            )
        if not self._hypers:
            tables = (_hyper_table(t, live, self._places, self._codes) for t in values if not has_no_memory(t))
            self._hypers = {table.values.device: table for table in tables}
        kinds: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, (param, grad) in enumerate(zip(lists.params, tensors.grads, strict=True)):
            foreign = any(column[i] == FOREIGN for column in self._seen.kinds if column)
            if fault := _fault(lists, i, grad, foreign):
                if grad is not None:
                    raise RuntimeError(fault)
                self._seen.expect_none(i)  # torch.optim, too, minds only when a gradient comes
                continue
            if grad is not None:
                alike = self._seen.kinds[Col.GRAD][i] != FOREIGN and same_layout(param, grad)
                self._grads[i] = [self._seen.kinds[column][i] for column in (Col.PARAM, Col.GRAD)], grad.dtype, alike
            if foreign and has_no_memory(param):  # a meta or fake tensor: there is nothing to compute
                continue
            if numbers_device(param.device) not in self._hypers:
                raise RuntimeError(f"there are no hyperparameters on {param.device}, where a parameter is")
            both, dtype, alike = self._grads.get(i, ([], param.dtype, True))
            if both != [self._seen.kinds[column][i] for column in (Col.PARAM, Col.GRAD)]:
                dtype, alike = param.dtype, True  # what is expected is a gradient like the parameter
            fits = self._fits(lists, i, dtype, alike and not foreign and i not in tangled)
            kinds[param.device, param.dtype, dtype, fits, turns[i]].append(i)
        self._buckets = []
        for (device, _, grad_dtype, fits, _), indices in sorted(kinds.items(), key=lambda item: item[0][-1]):
            bucket, part = _Bucket(indices, device), lists.part(indices, add=bool(self._buckets))
            if fits and device.type == "cpu":
                bucket.table = Table(part, grad_dtype, self._hypers[device], cpu.CHUNK)
            elif fits:
                from ncollapse.kernels.update import gpu

                bucket.table = Table(part, grad_dtype, self._hypers[numbers_device(device)], gpu.CHUNK)
                bucket.scratch = gpu.Scratch(bucket.table)
            self._buckets.append(bucket)

    def _fits(self, lists: Lists, i: int, grad: torch.dtype, alike: bool) -> bool:
        """Whether a kernel can update a parameter; warns where it cannot."""
        param = lists.params[i]
        reason = why_no_kernel(param.device)
        names, slot = self._hypers[numbers_device(param.device)].names[lists.sets[i]], lists.slots[i]
        for name in dict.fromkeys(names):
            rule = declared(name)
            no_second = slot.second is None or slot.step is None
            if (rule.needs_first and slot.first is None) or (rule.needs_second and no_second):
                raise ValueError(f"a parameter lacks the states that the rule {name} needs")
            if reason is None and rule.kernel is None:
                reason = f"there is no kernel for the rule {name}"
        allowed = param.dtype, _GRADS.get(param.dtype)
        if reason is None and (param.dtype not in operators.DTYPE_CODES or grad not in allowed):
            reason = f"there is no kernel for {param.dtype} parameters with {grad} gradients"
        if reason is None and (not alike or not lists.fits(i, len(names))):
            reason = "a parameter, its gradient or its state is not dense in memory, or their layouts differ"
        if reason is not None:
            operators.warn_once("updates some parameters", reason)
        return reason is None

    def _reference(self, lists: Lists, grads: list[Any], scale: Tensor | None, inf: Tensor | None) -> None:
        """Update parameters one by one, since each may have other hyperparameters; then compute the extras."""
        extras = lists.extras
        if inf is not None and inf.item() != 0:
            if extras.norms is not None:
                extras.norms.fill_(float("nan"))
            return
        if extras.norms is not None and not extras.add:
            extras.norms.zero_()
        for i, (param, grad, slot, group) in enumerate(zip(lists.params, grads, lists.slots, lists.sets, strict=True)):
            if grad is None:
                continue
            hypers = self._hypers[numbers_device(param.device)]
            before = param.detach().clone() if extras.norms is not None else param
            update_reference(hypers.rules(group), [param], [grad], [slot], hypers.settings(group), grad_scale=scale)
            if extras.norms is not None:
                raw = in_float64(grad) if scale is None else in_float64(grad) / scale.item()
                for k, change in enumerate((raw, in_float64(param) - in_float64(before))):
                    extras.norms[:, k] += change.square().reshape(len(extras.norms), -1).sum(1)
            if extras.copies and (copy := extras.copies[i]) is not None:
                copy.copy_(param)


def _hyper_table(values: Tensor, live: Sequence[Tensor], places: Sequence[int], codes: list[list[int]]) -> HyperTable:
    pairs = zip(live, places, strict=True)
    on_device = [(t, place) for t, place in pairs if numbers_device(t.device) == values.device]
    return HyperTable(values, [t for t, _ in on_device], [place for _, place in on_device], codes)


def _fault(lists: Lists, i: int, grad: Tensor | None, foreign: bool) -> str | None:
    """What is wrong with a parameter's gradient, state or copy: another shape than its own, or memory that is gone.

    `foreign`: whether one of them has no memory that a kernel may touch.
    """
    param, slot = lists.params[i], lists.slots[i]
    copy = lists.extras.copies[i] if lists.extras.copies else None
    alike = {"gradient": grad, "first state": slot.first, "second state": slot.second, "bfloat16 copy": copy}
    for name, tensor in alike.items():
        if tensor is not None and tensor.shape != param.shape:
            return (
                f"a parameter has shape {tuple(param.shape)}, its {name} {tuple(tensor.shape)}; where the parameter "
                "was given other data, set its gradient to None and remove its entry from the optimizer's state"
            )
    for name, tensor in {"parameter": param, **alike, "count of steps": slot.step}.items() if foreign else ():
        if tensor is None or tensor.layout != torch.strided or has_no_memory(tensor):
            continue
        needed = storage_needed(tensor)
        if not tensor._is_zerotensor() and (has := tensor.untyped_storage().nbytes()) < needed:
            return (
                f"the storage of a {name} of shape {tuple(tensor.shape)} was resized to {has} bytes, it needs {needed}"
            )
    return None


def _bytes(tensors: Tensors) -> Rows:
    """How many bytes each tensor that is written has: `[len(_WRITTEN), parameters]`."""
    columns = [tensors[column] or [None] * len(tensors.params) for column in _WRITTEN]
    return np.array(
        [[0 if t is None else t.numel() * t.itemsize for t in column] for column in columns], dtype=np.int64
    )


def _turns(addresses: Rows, sizes: Rows) -> tuple[list[int], set[int]]:
    """For each parameter, in which turn it is updated: 0, or later and alone where it shares memory with others.

    Threads update the parameters of a launch side by side, so two that share memory, or whose states do, must not be in
    one. Also returns the parameters whose own tensors overlap. Addresses and sizes (bytes) are `[tensors, parameters]`.
    """
    count = sizes.shape[1]
    owner = np.tile(np.arange(count), len(sizes))
    there = (sizes.ravel() > 0) & (addresses.ravel() != 0)
    start, size, owner = addresses.ravel()[there], sizes.ravel()[there], owner[there]
    order = np.argsort(start, kind="stable")
    start, owner, reach = start[order], owner[order], np.maximum.accumulate((start + size)[order])
    overlaps = start[1:] < reach[:-1]
    turns, tangled = [0] * count, set()
    if overlaps.any():
        clusters = np.concatenate([[0], np.cumsum(~overlaps)])
        for cluster in np.unique(clusters[1:][overlaps]):
            owners = owner[clusters == cluster].tolist()
            if len(set(owners)) > 1:
                for i in owners:
                    turns[i] = 1 + i
            if len(set(owners)) < len(owners):
                tangled |= set(owners)
    return turns, tangled
