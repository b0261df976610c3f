"""The base class of the optimizers, from param groups to one launch of the update kernel; and their names."""

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import code
from ncollapse.optim.core.checks import check_group, check_param, check_state
from ncollapse.optim.core.groups import Group
from ncollapse.optim.core.numbers import HyperSet
from ncollapse.optim.core.observe import Observed, observed
from ncollapse.optim.core.rule import Rule
from ncollapse.optim.core.stepper import Stepper, placed

_NUMBERS = {"lr", "weight_decay", "coupling", "momentum", "betas", "eps", "dampening"}
_STRUCTURE = {"params", "nesterov", "maximize", "rules"}
# A write into a param group is copied to the GPU at once, so that a graph captured next finds it there. With more
# groups than this, the next step copies all of them together.
_EAGER_GROUPS = 32
#: Name in lower case -> class.
_classes: dict[str, type["Optimizer"]] = {}


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers: `torch.optim.Optimizer` with coupled and decoupled decay, one kernel launch a step.

    A hyperparameter may be a float, a 0-d tensor, or a tensor `[R]` for parameters `[R, …]` of R stacked runs. Tensors
    on the parameters' device are read at every step, also in a CUDA graph.

    A subclass defines `rule`, and `default_coupling` if it is not 1. `by_name` then finds it; it may have `aliases`.

    Args:
        params: parameters or param groups, as in `torch.optim`.
        defaults: the settings of a group: lr, and those that the rule has of momentum, dampening, nesterov, betas, eps,
            weight_decay and maximize.
        coupling: c in [0, 1]; None for `default_coupling`.
        unsupported: settings of torch.optim's class that must not be true.

    Raises:
        ValueError: a setting is out of its range or unsupported.
        TypeError: a parameter cannot be updated.
    """

    rule: ClassVar[Rule]
    default_coupling: ClassVar[float] = 1.0
    _derived: ClassVar[bool] = False  # whether `_numbers` makes tensors of plain numbers
    # torch.amp.GradScaler then leaves the scale, and a step that is to be skipped, to the kernel.
    _step_supports_amp_scaling = True

    def __init_subclass__(cls, aliases: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "rule"):
            return
        for name in (cls.__name__.lower(), *aliases):
            known = _classes.get(name)
            # The first class of a name keeps it; the same class defined again, as in a notebook, replaces itself.
            if known is None or (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
                _classes[name] = cls

    def __init__(self, params: ParamsT, defaults: dict[str, Any], coupling: Hyper | None, **unsupported: bool) -> None:
        if name := next((name for name, wanted in unsupported.items() if wanted), None):
            raise ValueError(f"{type(self).__name__} does not support {name}; use torch.optim's class for that")
        self._stepper = self._new_stepper()
        defaults["coupling"] = self.default_coupling if coupling is None else coupling
        super().__init__(params, defaults)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states that parameters may have, `step` included."""
        return self.rule.states + ("step",) * self.rule.counts_steps

    # Hooks for subclasses.

    def _numbers(self, group: dict[str, Any]) -> dict[str, Hyper]:
        """A value for each name in `HYPERS`."""
        beta1, beta2 = group.get("betas", (group.get("momentum", 0.0), group.get("dampening", 0.0)))
        numbers: dict[str, Hyper] = {name: group.get(name, 0.0) for name in ("lr", "weight_decay", "coupling", "eps")}
        return {**numbers, "beta1": beta1, "beta2": beta2}

    def _sets(self, group: dict[str, Any]) -> list[HyperSet]:
        """The sets of hyperparameters of a group: one, or one for each kind of parameter."""
        numbers, momentum = self._numbers(group), group.get("momentum", 1.0)
        runs = max(n.numel() if isinstance(n, Tensor) else 1 for n in numbers.values())
        flags = {name: bool(group.get(name, False)) for name in ("maximize", "nesterov")}
        # Tensors may change without notice, so with them the parameters have state even if all are 0.
        has_state = isinstance(momentum, Tensor) or momentum != 0
        states = self.rule.states if has_state else ()
        return [HyperSet(numbers, [code(self.rule.name, **flags)] * runs, states, self.rule.counts_steps)]

    def _set_of(self, param: Tensor, group: dict[str, Any]) -> int:
        """Which of the group's sets a parameter belongs to."""
        return 0

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting that is not allowed."""
        check_group(type(self).__name__, group)

    def _states_of(self, param: Tensor, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that a parameter may have, `step` included."""
        return self.state_names

    def _new_stepper(self) -> Stepper:
        return Stepper(self)

    # Param groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`; raises ValueError or TypeError before anything is changed."""
        if isinstance(param_group, dict) and not isinstance(params := param_group["params"], set):
            param_group["params"] = [params] if isinstance(params, Tensor) else list(params)  # may be a generator
            # A named parameter comes as (name, tensor). torch.optim reports what is no tensor.
            tensors = [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]
            group = {**self.defaults, **param_group, "params": [p for p in tensors if isinstance(p, Tensor)]}
            self._check_group(group)
            for hypers in self._sets(group):
                for param in group["params"]:
                    check_param(type(self).__name__, param, hypers.numbers)
        super().add_param_group(param_group)
        self.param_groups[-1] = Group(self.param_groups[-1], self)
        self._stepper.stale = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, also one of torch.optim's class; half-precision parameters keep their float32 states.

        Raises:
            ValueError: the state dict is of other parameters or of another optimizer; nothing has changed then.
        """
        final: list[dict[str, Any]] = []
        before = {param: dict(state) for param, state in self.state.items()}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:  # runs after the user's hooks
            final.append(state_dict)
            saved = state_dict["param_groups"]
            if [len(g["params"]) for g in self.param_groups] != [len(g["params"]) for g in saved]:
                return  # torch.optim reports that
            for group, old in zip(self.param_groups, saved, strict=True):
                for param, i in zip(group["params"], old["params"], strict=True):
                    state = state_dict["state"].get(i, {})
                    check_state(type(self).__name__, param, state, self._states_of(param, group))
                self._check_group({**group, **old, "params": group["params"]})

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch.optim has cast the states to the parameters' dtype: take them from the state dict again, and copy them
        # into the existing tensors, which a CUDA graph may use.
        flat = [p for g in self.param_groups for p in g["params"]]
        saved = [i for g in final[0]["param_groups"] for i in g["params"]]
        for param, i in zip(flat, saved, strict=True):
            for name, value in final[0]["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    new, old = placed(value, name, param), before.get(param, {}).get(name)
                    if isinstance(old, Tensor) and (old.device, old.dtype) == (new.device, new.dtype):
                        new = old.copy_(new)
                    self.state[param][name] = new
        if self._stepper.live:
            self._stepper.prepare_again(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy or a pickle has no stepper; load_state_dict keeps the existing one.
        if "_stepper" not in self.__dict__:
            self._stepper = self._new_stepper()
        self._stepper.stale = True
        groups, self.param_groups = self.param_groups, []
        for group in groups:
            # A state dict of torch.optim has no coupling; one of an older version may lack other keys.
            decoupled = group.get("decoupled_weight_decay")
            implied = {} if decoupled is None else {"coupling": 0.0 if decoupled else 1.0}
            self.param_groups.append(Group({**self.defaults, **implied, **group}, self))

    def _written(self, group: Group, key: str, before: Any) -> None:
        """After a write into a param group: send a number to the device; for anything else, mark the stepper stale."""
        stepper, after = self._stepper, group.get(key)
        if stepper.stale or key not in _NUMBERS:
            stepper.stale |= key in _STRUCTURE
            return
        switched = key == "momentum" and _plain(before) and (before == 0) != (after == 0)
        if self._derived or switched or not (_plain(before) and _plain(after)):
            stepper.stale = True
            return
        sets = self._sets(group)
        for i, hypers in enumerate(sets):
            stepper.numbers.write(group.row * len(sets) + i, hypers.numbers)
        if stepper.live or len(self.param_groups) <= _EAGER_GROUPS:
            stepper.numbers.flush()

    # Steps.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; `closure`, if given, is called first with gradients enabled and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._stepper.traced_step(self)
        else:
            self._stepper.step(self)
        return loss

    def observe(self, *, head: Tensor | None = None, norms: bool = False, bf16: bool = False) -> Observed:
        """Have every later step also compute what is asked for, in the same pass over the parameters.

        Args:
            head: the classifier's weight `[K, d]`, one of the parameters: its row sum Wᵀ1 and NC0.
            norms: the global norms of the gradient and of the update.
            bf16: a bfloat16 copy of each parameter, for the next forward pass.

        Raises:
            ValueError: the head is no parameter of this optimizer, or norms are asked for on several devices.

        Example:
            >>> model = torch.nn.Linear(5, 3)
            >>> seen = (opt := SGD(model.parameters(), lr=0.1)).observe(head=model.weight, norms=True)
            >>> model(torch.ones(2, 5)).sum().backward(); opt.step()
            >>> seen.nc0, seen.grad_norm
        """
        params = [p for group in self.param_groups for p in group["params"]]
        runs = {len(hypers.codes) for group in self.param_groups for hypers in self._sets(group)}
        if len(runs) > 1:
            raise ValueError(f"{type(self).__name__}: all groups must have the same number of stacked runs; got {runs}")
        self._stepper.observed = observed(type(self).__name__, params, runs.pop(), head, norms, bf16)
        self._stepper.stale = True
        return self._stepper.observed


def _plain(value: Any) -> bool:
    """Whether a hyperparameter is a number or a pair of numbers."""
    return all(isinstance(v, (int, float)) for v in (value if isinstance(value, (tuple, list)) else (value,)))


def by_name(name: str) -> type[Optimizer]:
    """The optimizer class, the package's or the user's, of a name in lower case ("adamw"); ValueError if unknown."""
    if name not in _classes:
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(sorted(_classes))}")
    return _classes[name]
