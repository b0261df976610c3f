"""A step of an optimizer: what is worked out once, and the launch."""

import operator
from itertools import chain, count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.op import parts, update_op
from ncollapse.kernels.update.reference import Slot, compute_dtype
from ncollapse.kernels.update.table import Extras, Lists, code
from ncollapse.optim.core.checks import check_grad
from ncollapse.optim.core.groups import Group
from ncollapse.optim.core.numbers import Numbers
from ncollapse.optim.core.observe import Observed

if TYPE_CHECKING:
    from ncollapse.optim.core.optimizer import Optimizer


_numbers = count()
_traced: "WeakValueDictionary[str, Optimizer]" = WeakValueDictionary()


class Plan:
    """States, tables and lists for the steps of one optimizer, made anew when more than a number or an address changed.

    An object of its own, not attributes of the optimizer: torch.compile drops what a traced step writes into those.
    """

    def __init__(self, optimizer: "Optimizer") -> None:
        #: The optimizer's, for `_prepare_for_trace`. A number would be made symbolic when a second optimizer comes.
        self.name = str(next(_numbers))
        _traced[self.name] = optimizer
        #: Whether the next step must work it out again.
        self.stale = True
        #: Whether the next step is a first one, unlike the second: dampening does not apply to it.
        self.fresh = False
        #: Whether a CUDA graph or compiled code reads the numbers on the device, so that nobody calls `step`.
        self.live = False
        self.observed: Observed | None = None
        self.numbers = Numbers()
        self._params: list[Tensor] = []  # of all groups
        self._present: list[bool] = []  # which of them are in the lists
        self._lists = Lists([], [], [])
        self._active: list[Tensor] = []  # the parameters in the lists
        self._sharded = False
        self._update = Update({})
        self._held: list[Any] = []  # what was in the states
        self._graphs: list[Any] = []  # what CUDA graphs have the addresses of

    def _holds(self, optimizer: "Optimizer", params: list[Tensor], present: list[bool]) -> bool:
        # Somebody may have put other tensors into the groups or the states.
        return (
            not self.stale
            and present == self._present
            and _same(params, self._params)
            and _same(_held(optimizer), self._held)
        )

    def prepare(self, optimizer: "Optimizer", params: list[Tensor], present: list[bool]) -> None:
        """Work it out, for those of all parameters that are present."""
        if _capturing(params):
            raise RuntimeError(
                f"{type(optimizer).__name__} must take a step with the same parameters and settings before one is "
                "captured in a CUDA graph: what is made in a capture is made anew at every replay"
            )
        self._params, self._present = params, present
        groups = optimizer.param_groups
        for row, group in enumerate(groups):
            if isinstance(group, Group):
                group.row = row
            else:  # the user's own dict
                groups[row] = Group(group, optimizer, row)
        sets = [row for row, group in enumerate(groups) for _ in group["params"]]
        active = [(p, row) for p, row, here in zip(params, sets, present, strict=True) if here]
        if len({id(p) for p, _ in active}) < len(active):
            raise ValueError(f"{type(optimizer).__name__}: a parameter stands twice in the param groups; give it once")
        for param, _ in active:
            if param.grad is not None:
                check_grad(optimizer, param, param.grad)
        slots = [_slot(optimizer, param, groups[row]) for param, row in active]
        extras = self.observed.extras([p for p, _ in active]) if self.observed else Extras()
        self._sharded = any(map(is_sharded, params))
        if self._sharded and self.observed:
            raise RuntimeError(f"{type(optimizer).__name__}: a step of DTensor parameters cannot be observed")
        self._active = [p for p, _ in active]
        self._lists = Lists([shard(p) for p in self._active], slots, [row for _, row in active], extras)
        self._held = _held(optimizer)
        codes = [
            [code(rule, maximize=g["maximize"], nesterov=g.get("nesterov", False)) for rule in optimizer._rules(g)]
            for g in groups
        ]
        devices = list(dict.fromkeys(p.device for p, _ in active))
        self._update = Update(self.numbers.fill([optimizer._numbers(g) for g in groups], codes, devices))
        self.fresh = any(slot.fresh for slot in slots)
        self.stale = False

    def prepare_again(self, optimizer: "Optimizer") -> None:
        """Work it out for the parameters of the last step."""
        self.prepare(optimizer, self._params, self._present)

    def step(self, optimizer: "Optimizer") -> None:
        """Take a step with the gradients that there are."""
        if any(type(group) is not Group for group in optimizer.param_groups):
            self.stale = True
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        present = [g is not None for g in grads]
        if not self._holds(optimizer, params, present):
            self.prepare(optimizer, params, present)
        if not self._lists.params:
            return
        if _capturing(self._lists.params):
            self.live = True
            self._graphs.append((self._update, self.numbers.values, self.numbers.read, self._lists))
        self.numbers.refresh()
        here = [g for g in grads if g is not None]
        if self._sharded:
            self._lists.params = [shard(p) for p in self._active]
            here = [shard(g, like=p) for g, p in zip(here, self._active, strict=True)]
        scale, inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if self.fresh and inf is not None and inf.item() != 0:
            # Left out: those first steps are still to come. Only a first step with dampening waits for the device.
            for param, slot in zip(self._active, self._lists.slots, strict=True):
                if slot.fresh:
                    del optimizer.state[param]
            self.stale = True
            return
        try:
            self._update.step(self._lists.params, here, lambda: self._lists, scale, inf)
        except (RuntimeError, NotImplementedError):
            for param, grad in zip(self._lists.params, here, strict=True):
                check_grad(optimizer, param, grad)
            raise
        self.stale = self.fresh

    def traced_step(self, optimizer: "Optimizer") -> None:
        """The same for torch.compile, which puts `update_op` into its graph."""
        _prepare_for_trace(self.name)
        if self._sharded:
            raise RuntimeError("a step of DTensor parameters cannot be compiled; call it outside of torch.compile")
        assert not self.stale  # and a guard: what makes it stale later has the step traced anew
        lists, extras, numbers = self._lists, self._lists.extras, self.numbers
        params: list[Tensor] = []
        grads, slots, sets, copies, head = [], [], [], [], -1
        for i, param in enumerate(lists.params):
            if param.grad is None:
                continue
            head = len(params) if i == extras.head else head
            params.append(param)
            grads.append(param.grad)
            slots.append(lists.slots[i])
            sets.append(lists.sets[i])
            copies.append(extras.copies[i] if extras.copies else None)
        if not params:
            return
        for values in numbers.values:
            for place, number in zip(numbers.copied_places, numbers.copied, strict=True):
                values.view(-1)[place].copy_(number)
        update_op(
            params,
            grads,
            [s.first for s in slots if s.first is not None],
            [s.second for s in slots if s.second is not None],
            [s.step for s in slots if s.step is not None],
            [c for c in copies if c is not None],
            extras.norms,
            extras.row_sum if head >= 0 else None,
            numbers.values,
            numbers.read,
            numbers.read_places,
            [c for row in numbers.codes for c in row],
            [len(row) for row in numbers.codes],
            sets,
            [parts(s, c) for s, c in zip(slots, copies, strict=True)],
            head,
            getattr(optimizer, "grad_scale", None),
            getattr(optimizer, "found_inf", None),
        )
        if self.fresh:
            self.stale = True


# Runs when a compiler traces a step, not when the compiled step runs. It takes a name, since the Dynamo of torch 2.11
# can give it constants only.
def _prepare_for_trace(name: str) -> None:
    optimizer = _traced[name]
    plan = optimizer._plan
    params = [p for group in optimizer.param_groups for p in group["params"]]
    # A gradient may only come to be inside of what is traced.
    present = [p.requires_grad or p.grad is not None for p in params]
    if not plan._holds(optimizer, params, present):
        plan.prepare(optimizer, params, present)
    plan.live = True
    for held in (*plan._held, *plan.numbers.values, *plan.numbers.read):
        if isinstance(held, Tensor):
            torch._dynamo.mark_static_address(held)


# What `torch.compiler.assume_constant_result` does, without loading the compiler: that takes as long as torch itself.
_prepare_for_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _slot(optimizer: "Optimizer", param: Tensor, group: dict[str, Any]) -> Slot:
    """A parameter's state, made where there is none yet."""
    if not optimizer._has_state(group):
        return Slot()
    state, names = optimizer.state[param], optimizer.names
    fresh = state.get(names[0]) is None and group.get("dampening", 0) != 0
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(param, dtype=compute_dtype(param), memory_format=torch.preserve_format)
    if optimizer.counts:
        step = torch.as_tensor(state.get("step", 0), dtype=torch.float32)  # a number in old state dicts
        state["step"] = step if step.device == param.device else placed(step, "step", param)
    first, second = (*(shard(state[name]) for name in names), None)[:2]
    return Slot(first, second, state["step"] if optimizer.counts else None, fresh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process has a part (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "to_local")


def shard(tensor: Any, like: Any = None) -> Tensor:
    """This process's part of a DTensor, placed as `like` is, since updates work by element; else the tensor itself."""
    if not is_sharded(tensor):
        return tensor
    return (tensor if like is None else tensor.redistribute(placements=like.placements)).to_local()


def placed(value: Tensor, name: str, param: Tensor) -> Tensor:
    """A state tensor of its own on the parameter's device, in its layout and the dtype of the computation."""
    if name == "step":
        return value.detach().to(param.device, torch.float32, copy=True)
    like = torch.empty_like(param, dtype=compute_dtype(param), memory_format=torch.preserve_format)
    return like.detach().copy_(value)


def _held(optimizer: "Optimizer") -> list[Any]:
    return list(chain.from_iterable(map(dict.values, optimizer.state.values())))


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _capturing(params: list[Tensor]) -> bool:
    return bool(params) and params[0].is_cuda and torch.cuda.is_current_stream_capturing()
