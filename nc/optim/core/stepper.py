"""A step of an optimizer: the tables that are prepared once, and the launch."""

import operator
from collections import defaultdict
from itertools import chain, count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ncollapse.kernels.operators import compile_time_constant
from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.op import parts, update_op
from ncollapse.kernels.update.reference import Slot, compute_dtype
from ncollapse.kernels.update.table import Extras, Lists
from ncollapse.optim.core.checks import check_grads
from ncollapse.optim.core.groups import Group, Listener
from ncollapse.optim.core.numbers import HyperSet, Numbers
from ncollapse.optim.core.observe import Observed


class Stepped(Listener, Protocol):
    """What a stepper needs of its optimizer."""

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, Any]
    _stepper: "Stepper"

    def _sets(self, group: dict[str, Any]) -> list[HyperSet]: ...
    def _set_of(self, param: Tensor, group: dict[str, Any]) -> int: ...


_names = count()
_traced: WeakValueDictionary[str, Stepped] = WeakValueDictionary()


class Stepper:
    """States, tables and lists for the steps of one optimizer, prepared again if more than values or addresses change.

    A separate object, not attributes of the optimizer: torch.compile drops what a traced step writes into those.
    """

    def __init__(self, optimizer: Stepped) -> None:
        #: Key in `_traced`. A string: Dynamo would make a number symbolic when a second optimizer comes.
        self.name = str(next(_names))
        _traced[self.name] = optimizer
        self.stale = True  # the next step must call `prepare`
        self.fresh = False  # the next step is a first one with dampening, which applies only from the second on
        self.live = False  # a CUDA graph or compiled code reads the numbers on the device: `step` may not be called
        self.observed: Observed | None = None
        self.numbers = Numbers()
        self._params: list[Tensor] = []  # of all groups
        self._present: list[bool] = []  # which of them have gradients
        self._lists = Lists([], [], [])
        self._active: list[Tensor] = []  # the parameters in the lists
        self._sharded = False
        self._update = Update({})
        self._held: list[Any] = []  # all values in the optimizer's state
        self._graphs: list[Any] = []  # keeps alive what CUDA graphs hold addresses of

    def _holds(self, optimizer: Stepped, params: list[Tensor], present: list[bool]) -> bool:
        # The user may have put other tensors into the groups or the states.
        return (
            not self.stale
            and present == self._present
            and _same(params, self._params)
            and _same(state_values(optimizer), self._held)
        )

    def prepare(self, optimizer: Stepped, params: list[Tensor], present: list[bool]) -> None:
        """Make states, tables and lists for the parameters that are `present`, a flag for each of `params`."""
        owner = type(optimizer).__name__
        if capturing(params):
            raise RuntimeError(
                f"{owner} must take a step with the same parameters and settings before one is captured in a CUDA "
                "graph: a replay would initialise again what the captured step initialises"
            )
        self._params, self._present, self.stale = params, present, True  # until all of it has succeeded
        groups = optimizer.param_groups
        for row, group in enumerate(groups):
            if not isinstance(group, Group):  # the user's own dict
                groups[row] = group = Group(group, optimizer)
            group.row = row
        rows = [row for row, group in enumerate(groups) for _ in group["params"]]
        active = [(p, row) for p, row, has_grad in zip(params, rows, present, strict=True) if has_grad]
        self._active = [p for p, _ in active]
        if len(set(map(id, self._active))) < len(active):
            raise ValueError(f"{owner}: a parameter occurs twice in the param groups; give it once")
        check_grads(owner, self._active, [p.grad for p in self._active], optimizer.state)
        sets = [hypers for group in groups for hypers in optimizer._sets(group)]
        per_group = len(sets) // max(len(groups), 1)
        places = [row * per_group + optimizer._set_of(p, groups[row]) for p, row in active]
        slots = [_slot(optimizer, p, groups[row], sets[i]) for (p, row), i in zip(active, places, strict=True)]
        extras = self.observed.extras(self._active) if self.observed else Extras()
        self._sharded = any(map(is_sharded, params))
        if self._sharded and self.observed:
            raise RuntimeError(f"{owner}: a step of DTensor parameters cannot be observed")
        self._lists = Lists([shard(p) for p in self._active], slots, places, extras)
        self._held = state_values(optimizer)
        devices = list(dict.fromkeys(p.device for p in self._active))
        self._update = Update(self.numbers.fill(sets, devices))
        self.fresh = any(slot.fresh for slot in slots)
        self.stale = False

    def prepare_again(self, optimizer: Stepped) -> None:
        """Prepare for the parameters of the last step."""
        self.prepare(optimizer, self._params, self._present)

    def directions(self, optimizer: Stepped, grads: list[Tensor]) -> list[Tensor]:
        """What the update kernel takes as the gradients of the active parameters; a subclass may transform them."""
        return grads

    def step(self, optimizer: Stepped) -> None:
        """Take a step for the parameters that have gradients."""
        if any(type(group) is not Group for group in optimizer.param_groups):
            self.stale = True
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        present = [g is not None for g in grads]
        if not self._holds(optimizer, params, present):
            self.prepare(optimizer, params, present)
        if not self._lists.params:
            return
        if capturing(self._lists.params):
            self.live = True
            self._graphs.append((self._update, self.numbers.values, self.numbers.read, self._lists, self._held))
        self.numbers.refresh()
        taken = self.directions(optimizer, [g for g in grads if g is not None])
        if self._sharded:
            self._lists.params = [shard(p) for p in self._active]
            taken = [shard(g, like=p) for g, p in zip(taken, self._active, strict=True)]
        scale, inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if self.fresh and inf is not None and inf.item() != 0:
            # The step is skipped, so the first one is still to come. Only a first step with dampening synchronises.
            for param, slot in zip(self._active, self._lists.slots, strict=True):
                if slot.fresh:
                    del optimizer.state[param]
            self.stale = True
            return
        try:
            self._update.step(self._lists.params, taken, lambda: self._lists, scale, inf)
        except (RuntimeError, NotImplementedError):
            check_grads(type(optimizer).__name__, self._lists.params, taken, optimizer.state)
            raise
        self.stale = self.fresh

    def traced_step(self, optimizer: Stepped) -> None:
        """Take a step while torch.compile traces: put `update_op` into its graph."""
        _prepare_for_trace(self.name)
        if self._sharded:
            raise RuntimeError("a step of DTensor parameters cannot be compiled; call it outside of torch.compile")
        assert not self.stale  # also a guard for Dynamo: when the stepper becomes stale, the step is traced again
        lists, extras, numbers = self._lists, self._lists.extras, self.numbers
        kept = [i for i, param in enumerate(lists.params) if param.grad is not None]
        if not kept:
            return
        slots = [lists.slots[i] for i in kept]
        copies = [extras.copies[i] if extras.copies else None for i in kept]
        head = kept.index(extras.head) if extras.head in kept else -1
        for values in numbers.values:
            for place, number in numbers.copied.items():
                values.view(-1)[place].copy_(number)
        update_op(
            [lists.params[i] for i in kept],
            [lists.params[i].grad for i in kept],
            [s.first for s in slots if s.first is not None],
            [s.second for s in slots if s.second is not None],
            [s.step for s in slots if s.step is not None],
            [c for c in copies if c is not None],
            extras.norms, extras.row_sum if head >= 0 else None,
            numbers.values, list(numbers.read.values()), list(numbers.read),
            [c for row in numbers.codes for c in row], [len(row) for row in numbers.codes],
            [lists.sets[i] for i in kept], [parts(s, c) for s, c in zip(slots, copies, strict=True)], head,
            getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None),
        )  # fmt: skip
        if self.fresh:
            self.stale = True


# Runs when a step is traced, not when the compiled step runs. Takes a name, since Dynamo of torch 2.11 passes constants
# only.
@compile_time_constant
def _prepare_for_trace(name: str) -> None:
    optimizer = _traced[name]
    stepper = optimizer._stepper
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # The traced code itself may create a gradient.
    present = [p.requires_grad or p.grad is not None for p in params]
    if not stepper._holds(optimizer, params, present):
        stepper.prepare(optimizer, params, present)
    stepper.live = True
    for value in (*stepper._held, *stepper.numbers.values, *stepper.numbers.read.values()):
        if isinstance(value, Tensor):
            torch._dynamo.mark_static_address(value)


def _slot(optimizer: Stepped, param: Tensor, group: dict[str, Any], hypers: HyperSet) -> Slot:
    """A parameter's state tensors, created if they are missing."""
    if not hypers.states and not hypers.counts_steps:
        return Slot()
    state, names = optimizer.state[param], hypers.states
    fresh = group.get("dampening", 0) != 0 and any(state.get(name) is None for name in names)
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(param, dtype=compute_dtype(param), memory_format=torch.preserve_format)
    if hypers.counts_steps:
        step = torch.as_tensor(state.get("step", 0), dtype=torch.float32)  # a number in old state dicts
        state["step"] = step if step.device == param.device else placed(step, "step", param)
    first, second = (*(shard(state[name]) for name in names), None, None)[:2]
    return Slot(first, second, state["step"] if hypers.counts_steps else None, fresh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a shard (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "to_local")


def shard(tensor: Any, like: Any = None) -> Tensor:
    """This process's shard of a DTensor, with the placements of `like` if given; other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    return (tensor if like is None else tensor.redistribute(placements=like.placements)).to_local()


def placed(value: Tensor, name: str, param: Tensor) -> Tensor:
    """A copy of a state tensor on the parameter's device, in its layout and in the dtype of the computation."""
    if name == "step":
        return value.detach().to(param.device, torch.float32, copy=True)
    like = torch.empty_like(param, dtype=compute_dtype(param), memory_format=torch.preserve_format)
    return like.detach().copy_(value)


def state_values(optimizer: Stepped) -> list[Any]:
    """All values in the states of all parameters."""
    return list(chain.from_iterable(map(dict.values, optimizer.state.values())))


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def capturing(params: list[Tensor]) -> bool:
    """Whether a CUDA graph is being captured on the device of the parameters."""
    return bool(params) and params[0].is_cuda and torch.cuda.is_current_stream_capturing()
