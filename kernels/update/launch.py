"""Steps over lists of tensors: one launch per device and dtype; the reference where no kernel fits."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ncollapse.kernels import operators
from ncollapse.kernels.update import cpu
from ncollapse.kernels.update.reference import declared, update_reference
from ncollapse.kernels.update.table import HyperTable, Lists, Table

# The dtype that gradients may have other than the parameter's own.
_GRADS = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


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
    """Steps over the same parameters with the same hyperparameters.

    Tables are built once, and filled again when the address of a tensor has changed. Holds no parameter, gradient or
    state.

    Args:
        hypers: for each device of the parameters, its table of hyperparameters.

    Warns:
        UserWarning: (once for each reason) the slower reference updates some parameters, and why.
    """

    def __init__(self, hypers: dict[torch.device, HyperTable]) -> None:
        self._hypers = hypers
        self._buckets: list[_Bucket] = []
        self._layout: Any = None
        self._seen: Any = None
        self._mixed = True
        self._captured: list[Any] = []  # tensors whose addresses CUDA graphs hold, kept alive after the buckets go

    @property
    def launches(self) -> int:
        """The number of kernels that a step launches."""
        return sum(bucket.table is not None for bucket in self._buckets)

    def step(
        self, params: list[Tensor], grads: list[Tensor], lists: Callable[[], Lists],
        grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take one step, in place.

        Args:
            params: the same parameters at every step.
            grads: their gradients, of the same shapes.
            lists: returns the parameters with their states and extras; called when the layout has changed.
            grad_scale, found_inf: as in `update_reference`.
        """
        # This runs at every step: map is faster than a comprehension.
        pointers, grad_pointers = list(map(Tensor.data_ptr, params)), list(map(Tensor.data_ptr, grads))
        seen = pointers, grad_pointers, list(map(Tensor.stride, grads))
        # Where dtypes of gradients and parameters differ, a gradient may change its dtype alone: check at every step.
        if seen != self._seen or self._mixed:
            self._point(lists, params, grads, pointers, grad_pointers)
            self._seen = seen
        for bucket in self._buckets:
            scale = None if grad_scale is None else grad_scale.to(bucket.device, non_blocking=True)
            inf = None if found_inf is None else found_inf.to(bucket.device, non_blocking=True)
            if bucket.table is None:
                add = bucket is not self._buckets[0]
                self._reference(lists().part(bucket.indices, add), [grads[i] for i in bucket.indices], scale, inf)
            elif bucket.device.type == "cpu":
                cpu.launch_update(bucket.table, scale, inf)
            else:
                from ncollapse.kernels.update import gpu

                gpu.launch_update(bucket.table, bucket.scratch, scale, inf)
                if torch.cuda.is_current_stream_capturing():
                    self._captured.append((bucket.table, bucket.table.tensors, bucket.scratch))
                    self._seen = None  # the replay fills the table, not the capture: the next step fills it again

    def _point(
        self, lists: Callable[[], Lists], params: list[Tensor], grads: list[Tensor],
        pointers: list[int], grad_pointers: list[int],
    ) -> None:  # fmt: skip
        layout = [(p.dtype, p.stride(), g.dtype, g.stride()) for p, g in zip(params, grads, strict=True)]
        if layout != self._layout:
            self._plan(lists(), grads)
            self._layout = layout
        self._mixed = any(p.dtype != g.dtype for p, g in zip(params, grads, strict=True))
        for bucket in self._buckets:
            if bucket.table is not None:
                bucket.table.point([pointers[i] for i in bucket.indices], [grad_pointers[i] for i in bucket.indices])

    def _plan(self, lists: Lists, grads: list[Tensor]) -> None:
        kinds: defaultdict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[int]] = defaultdict(list)
        for i, (param, grad) in enumerate(zip(lists.params, grads, strict=True)):
            kinds[param.device, param.dtype, grad.dtype, self._fits(lists, i, grad)].append(i)
        self._buckets = []
        for (device, dtype, grad_dtype, fits), indices in kinds.items():
            bucket, part = _Bucket(indices, device), lists.part(indices, add=bool(self._buckets))
            if fits and device.type == "cpu":
                bucket.table = Table(part, grad_dtype, self._hypers[device], cpu.CHUNK, cpu.CHUNK)
            elif fits:
                from ncollapse.kernels.update import gpu

                bucket.table = Table(part, grad_dtype, self._hypers[device], gpu.block_size(dtype), gpu.CHUNK)
                bucket.scratch = gpu.Scratch(bucket.table)
            self._buckets.append(bucket)

    def _fits(self, lists: Lists, i: int, grad: Tensor) -> bool:
        param = lists.params[i]
        reason = why_no_kernel(param.device)
        names, slot = self._hypers[param.device].names[lists.sets[i]], lists.slots[i]
        for name in dict.fromkeys(names):
            rule = declared(name)
            no_second = slot.second is None or slot.step is None
            if (rule.needs_first and slot.first is None) or (rule.needs_second and no_second):
                raise ValueError(f"a parameter lacks the states that the rule {name} needs")
            if reason is None and rule.kernel is None:
                reason = f"there is no kernel for the rule {name}"
        allowed = param.dtype, _GRADS.get(param.dtype)
        if reason is None and (param.dtype not in operators.DTYPE_CODES or grad.dtype not in allowed):
            reason = f"there is no kernel for {param.dtype} parameters with {grad.dtype} gradients"
        if reason is None and not lists.fits(i, grad, len(names)):
            reason = "a parameter, its gradient or its state is not dense in memory, or their layouts differ"
        if reason is not None:
            operators.warn_once("updates some parameters", reason)
        return reason is None

    def _reference(self, lists: Lists, grads: list[Tensor], scale: Tensor | None, inf: Tensor | None) -> None:
        """Update parameters one by one, since each may have other hyperparameters; then compute the extras."""
        extras = lists.extras
        if inf is not None and inf.item() != 0:
            return
        if extras.norms is not None and not extras.add:
            extras.norms.zero_()
        for i, (param, grad, slot, group) in enumerate(zip(lists.params, grads, lists.slots, lists.sets, strict=True)):
            hypers = self._hypers[param.device]
            before = param.detach().clone() if extras.norms is not None else param
            update_reference(hypers.rules(group), [param], [grad], [slot], hypers.settings(group), grad_scale=scale)
            if extras.norms is not None:
                raw = grad.double() if scale is None else grad.double() / scale
                for k, change in enumerate((raw, param.double() - before.double())):
                    extras.norms[:, k] += change.square().reshape(len(extras.norms), -1).sum(1)
            if extras.copies and (copy := extras.copies[i]) is not None:
                copy.copy_(param)
            if i == extras.head and extras.row_sum is not None:
                extras.row_sum.copy_(param.double().sum(-2))
