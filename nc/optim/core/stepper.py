"""A step of an optimizer: the tables that are prepared once, and the launch."""

from collections import defaultdict
from itertools import chain, count
from threading import Lock
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ncollapse.kernels.operators import compile_time_constant
from ncollapse.kernels.tensors import gradients_of, has_no_memory, same_objects, values_of
from ncollapse.kernels.update.graph_memory import keep_for_graph
from ncollapse.kernels.update.launch import Update
from ncollapse.kernels.update.op import parts, update_op
from ncollapse.kernels.update.reference import compute_dtype
from ncollapse.kernels.update.table import Extras, Tensors
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
        self._states: list[Any] = []  # the states of all parameters, as dicts
        self._active: list[Tensor] = []  # the parameters that have had gradients
        self._chosen: list[int] | None = None  # their indices in `_params`; None: all
        self._rows: list[int] = []  # for each of them, its group
        self._names: list[tuple[str | None, ...]] = []  # for each of them, the names of its first, second and step
        self._columns: list[str | None] = []  # the names, if all have the same
        self._dicts: list[Any] = []  # for each of them, its states
        self._places: list[int] = []  # for each of them, the index of its set of hyperparameters
        self._sets: list[HyperSet] = []
        self._extras = Extras()
        self._sharded = False
        self._update = Update([], [])
        self._traced: Tensors | None = None  # what a compiled step contains
        self._lock = Lock()
        self._graphs: list[Any] = []  # what CUDA graphs hold addresses of, where torch cannot keep it alive

    def prepare(self, optimizer: Stepped, params: list[Tensor], present: list[bool]) -> None:
        """Make states and lists for the parameters that are `present`, a flag for each of `params`, or were before."""
        owner = type(optimizer).__name__
        if capturing(params):
            raise RuntimeError(
                f"{owner} must take a step with the same parameters and settings before one is captured in a CUDA "
                "graph: a replay would initialise again what the captured step initialises"
            )
        self.stale = True  # until all of it has succeeded
        groups = optimizer.param_groups
        for row, group in enumerate(groups):
            if not isinstance(group, Group):  # the user's own dict
                groups[row] = group = Group(group, optimizer)
            group.row = row
        rows = [row for row, group in enumerate(groups) for _ in group["params"]]
        if len(set(map(id, params))) < len(params):
            raise ValueError(f"{owner}: a parameter occurs twice in the param groups; give it once")
        sets = [hypers for group in groups for hypers in optimizer._sets(group)]
        per_group = len(sets) // max(len(groups), 1)
        # A parameter whose gradient comes and goes stays in the lists, unless its state was taken away.
        known = {id(p) for p in self._active}
        chosen, places = [], []
        for i, (param, row) in enumerate(zip(params, rows, strict=True)):
            place = row * per_group + optimizer._set_of(param, groups[row])
            if present[i] or (id(param) in known and self._has_states(optimizer, param, sets[place])):
                chosen.append(i)
                places.append(place)
        self._active, self._rows = [params[i] for i in chosen], [rows[i] for i in chosen]
        check_grads(owner, self._active, [p.grad for p in self._active], optimizer.state)
        self._sets, self._places, self._chosen = sets, places, chosen if len(chosen) < len(params) else None
        self._extras = self.observed.extras(self._active) if self.observed else Extras()
        self._sharded = any(map(is_sharded, params))
        if self._sharded and self.observed:
            raise RuntimeError(f"{owner}: a step of DTensor parameters cannot be observed")
        fresh = self._complete(optimizer)
        self._params, self._states = params, list(optimizer.state.values())
        devices = list(dict.fromkeys(p.device for p in self._active if not has_no_memory(p)))
        self.numbers.fill(sets, devices)
        self._update = Update(places, self.numbers.codes, list(self.numbers.read), fresh, self._graphs)
        self.fresh = any(fresh)
        self.stale = False

    def prepare_again(self, optimizer: Stepped) -> None:
        """Prepare for the parameters of the last step."""
        active = set(map(id, self._active))
        self.prepare(optimizer, self._params, [id(p) in active for p in self._params])

    def _has_states(self, optimizer: Stepped, param: Tensor, hypers: HyperSet) -> bool:
        names = (*hypers.states, *("step",) * hypers.counts_steps)
        return not names or (param in optimizer.state and all(name in optimizer.state[param] for name in names))

    def _complete(self, optimizer: Stepped) -> list[bool]:
        """Make the states that are missing; for each active parameter, whether it takes its first step."""
        groups = optimizer.param_groups
        trios = list(zip(self._active, self._rows, self._places, strict=True))
        fresh = [_complete_state(optimizer, p, groups[row], self._sets[place]) for p, row, place in trios]
        kinds = [(*(*hypers.states, None, None)[:2], "step" if hypers.counts_steps else None) for hypers in self._sets]
        self._names = [kinds[place] for place in self._places]
        alike = len(set(self._names)) == 1
        self._columns = list(self._names[0]) if alike else []
        stateless: dict[str, Any] = {}
        self._dicts = [
            optimizer.state[p] if any(n) else stateless for p, n in zip(self._active, self._names, strict=True)
        ]
        return fresh

    def _tensors(self, grads: list[Any]) -> Tensors:
        """The tensors of the active parameters, read from where the user keeps them; KeyError if a state is missing."""
        states: list[list[Any]]
        if self._columns:
            found = iter(values_of(self._dicts, tuple(name for name in self._columns if name is not None)))
            states = [[] if name is None else next(found) for name in self._columns]
        else:
            pairs = zip(self._dicts, self._names, strict=True)
            rows = [tuple(None if name is None else each[name] for name in names) for each, names in pairs]
            states = [list(column) for column in zip(*rows, strict=True)]
        params = self._active
        if self._sharded:
            params = [shard(p) for p in params]
            grads = [g if g is None else shard(g, like=p) for g, p in zip(grads, self._active, strict=True)]
            states = [[shard(t) for t in column] for column in states]
        firsts, seconds, steps = states
        return Tensors(params, grads, firsts, seconds, steps, list(self._extras.copies))

    def directions(self, optimizer: Stepped, grads: list[Any]) -> list[Any]:
        """What the update kernel takes as the gradients of the active parameters; a subclass may transform them.

        A gradient may be missing (None).
        """
        return grads

    def step(self, optimizer: Stepped) -> None:
        """Take a step for the parameters that have gradients; one thread at a time, since the table is filled again."""
        with self._lock:
            self._step(optimizer)

    def _step(self, optimizer: Stepped) -> None:
        params = params_of(optimizer)
        grads = gradients_of(params)
        prepared = (
            self.stale
            or not same_objects(params, self._params)
            or not same_objects(list(optimizer.state.values()), self._states)
            or (self._chosen is not None and sum(g is not None for g in grads) > self._present(grads))
        )
        if prepared:
            self.prepare(optimizer, params, [g is not None for g in grads])
        if self._chosen is not None:
            grads = [grads[i] for i in self._chosen]
        if not any(g is not None for g in grads):
            if self.observed is not None:
                self.observed.forget()
            return
        if self.fresh and self._skipped_first(optimizer, grads):
            return
        self.numbers.refresh()
        taken = self.directions(optimizer, grads)

        def changed() -> Tensors:
            check_grads(type(optimizer).__name__, self._active, grads, optimizer.state)
            self._complete(optimizer)
            return self._tensors(taken)

        try:
            tensors = self._tensors(taken)
        except KeyError:  # a state was taken away
            self.prepare(optimizer, params, [p.grad is not None for p in params])
            tensors = self._tensors(taken)
        numbers, extras = self.numbers, self._extras
        scale, inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        live = list(numbers.read.values())
        self._update.step(tensors, numbers.values, live, extras.norms, scale, inf, None if prepared else changed)
        if self._sharded:  # of the shards the update has counted the versions
            torch.autograd.graph.increment_version(self._active)
        if capturing(params):
            self.live = True
            keep_for_graph(chain(*tensors), self._graphs)
        self.stale = self.fresh

    def check_finished(self, optimizer: Stepped) -> None:
        """Raise RuntimeError, once, if the update kernel has not finished a step; synchronises."""
        if not capturing(self._params) and self._update.unfinished():
            raise RuntimeError(
                f"{type(optimizer).__name__}: the update kernel was interrupted within a step, so that some parameters "
                "and states are updated and others are not; load an earlier state dict, or ask again to get this one"
            )

    def _present(self, grads: list[Any]) -> int:
        """How many of the active parameters have gradients."""
        return sum(grads[i] is not None for i in self._chosen or ())

    def _skipped_first(self, optimizer: Stepped, grads: list[Any]) -> bool:
        """Whether GradScaler skips this first step with dampening, so that it is still to come; synchronises."""
        inf = getattr(optimizer, "found_inf", None)
        if inf is None or inf.item() == 0:
            return False
        for param, fresh in zip(self._active, self._update.fresh, strict=True):
            if fresh:
                del optimizer.state[param]
        if self.observed is not None:
            self.observed.forget()
        self.stale = True
        return True

    def traced_step(self, optimizer: Stepped) -> None:
        """Take a step while torch.compile traces: put `update_op` into its graph."""
        _prepare_for_trace(self.name)
        if self._sharded:
            raise RuntimeError("a step of DTensor parameters cannot be compiled; call it outside of torch.compile")
        assert not self.stale  # also a guard for Dynamo: when the stepper becomes stale, the step is traced again
        tensors, numbers, extras = self._traced, self.numbers, self._extras
        assert tensors is not None
        kept = [i for i, param in enumerate(tensors.params) if param.grad is not None]
        if not kept:
            return
        firsts, seconds, steps, copies = (
            [column[i] if column else None for i in kept]
            for column in (tensors.firsts, tensors.seconds, tensors.steps, tensors.copies)
        )
        fresh = [self._update.fresh[i] for i in kept]
        for values in numbers.values:
            for place, number in numbers.copied.items():
                values.view(-1)[place].copy_(number)
        update_op(
            [tensors.params[i] for i in kept],
            [tensors.params[i].grad for i in kept],
            [t for t in firsts if t is not None],
            [t for t in seconds if t is not None],
            [t for t in steps if t is not None],
            [t for t in copies if t is not None],
            extras.norms, numbers.values, list(numbers.read.values()), list(numbers.read),
            [c for row in numbers.codes for c in row], [len(row) for row in numbers.codes],
            [self._places[i] for i in kept],
            [parts(*each) for each in zip(firsts, seconds, steps, copies, fresh, strict=True)],
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
    params = params_of(optimizer)
    # The traced code itself may create a gradient.
    present = [p.requires_grad or p.grad is not None for p in params]
    active = set(map(id, stepper._active))
    if (
        stepper.stale
        or not same_objects(params, stepper._params)
        or not same_objects(list(optimizer.state.values()), stepper._states)
        or not all(id(p) in active for p, has_grad in zip(params, present, strict=True) if has_grad)
    ):
        stepper.prepare(optimizer, params, present)
    stepper._traced = stepper._tensors([None] * len(stepper._active))
    stepper.live = True
    states = (t for column in stepper._traced[2:5] for t in column if t is not None)
    for tensor in (*states, *stepper.numbers.values, *stepper.numbers.read.values()):
        torch._dynamo.mark_static_address(tensor)


def _complete_state(optimizer: Stepped, param: Tensor, group: dict[str, Any], hypers: HyperSet) -> bool:
    """Make the states of a parameter that are missing; whether its first step is still to come, if that matters."""
    if not hypers.states and not hypers.counts_steps:
        return False
    state, names = optimizer.state[param], hypers.states
    fresh = group.get("dampening", 0) != 0 and any(state.get(name) is None for name in names)
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(param, dtype=compute_dtype(param), memory_format=torch.preserve_format)
    if hypers.counts_steps:
        # A number in old state dicts, or a tensor on another device.
        state["step"] = torch.as_tensor(state.get("step", 0), dtype=torch.float32, device=param.device)
    return fresh


def params_of(optimizer: Stepped) -> list[Tensor]:
    """The parameters of all groups."""
    groups: list[Any] = optimizer.param_groups
    lists = [group.data["params"] if type(group) is Group else group["params"] for group in groups]
    return list(lists[0]) if len(lists) == 1 else list(chain.from_iterable(lists))


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


def capturing(params: list[Tensor]) -> bool:
    """Whether a CUDA graph is being captured on the device of the parameters."""
    # Fake tensors of a GPU may exist where there is none.
    on_gpu = bool(params) and params[0].is_cuda and torch.cuda.is_initialized()
    return on_gpu and torch.cuda.is_current_stream_capturing()
