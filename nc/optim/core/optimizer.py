"""The base class of the optimizers, from param groups to one launch of the update kernel; and their names."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import code
from ncollapse.optim.core.checks import check_nesterov, check_param, check_setting, check_state
from ncollapse.optim.core.groups import Group, not_alone, report_to
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
    on the parameters' device are read at every step; a CUDA graph goes on reading those that it was captured with.

    A subclass defines `rule`, and `default_coupling` if it is not 1. `by_name` then finds it; it may have `aliases`.
    The settings that it takes are those of `defaults` and `coupling`; they are checked in the constructor, in a new
    group, in a state dict and when they are written. A group may have other keys, which are without effect.

    Args:
        params: parameters or param groups, as in `torch.optim`.
        defaults: the settings of a group: lr, and those that the rule has of momentum, dampening, nesterov, betas, eps
            and weight_decay.
        coupling: c in [0, 1]; None for `default_coupling`.
        flags: `maximize`, and settings of torch.optim that are without effect (`ignores`) or must be false (`refuses`).

    Raises:
        ValueError: a setting is out of its range or refused.
        TypeError: a parameter cannot be updated, or a flag is unknown.
    """

    rule: ClassVar[Rule]
    default_coupling: ClassVar[float] = 1.0
    #: Settings of torch.optim without effect here, and the values that stand in every group, where others read them.
    ignores: ClassVar[Mapping[str, Any]] = {"foreach": None, "fused": None, "capturable": False}
    #: Settings that ask for another algorithm: they must be false.
    refuses: ClassVar[tuple[str, ...]] = ("differentiable",)
    _derived: ClassVar[bool] = False  # whether `_numbers` makes tensors of plain numbers

    def __init_subclass__(cls, aliases: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "rule"):
            return
        for name in (cls.__name__.lower(), *aliases):
            known = _classes.get(name)
            # The first class of a name keeps it; the same class defined again, as in a notebook, replaces itself.
            if known is None or (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
                _classes[name] = cls

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], coupling: Hyper | None = None, **flags: bool | None
    ) -> None:
        if unknown := sorted(flags.keys() - self._flags().keys()):
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}")
        self._stepper = self._new_stepper()
        # What is ignored keeps its neutral value: torch.optim's class may load the state dict elsewhere.
        defaults = {**self._flags(), **flags, **self.ignores, **defaults}
        defaults["coupling"] = self.default_coupling if coupling is None else coupling
        super().__init__(params, defaults)

    @classmethod
    def _flags(cls) -> dict[str, Any]:
        return {"maximize": False, **cls.ignores, **dict.fromkeys(cls.refuses, False)}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves the scale, and a step that is to be skipped, to the kernel.

        Not where Accelerate has replaced `step` to see whether the scaler calls it (`step_was_skipped`).
        """
        return getattr(self.__dict__.get("step"), "__module__", None) != "accelerate.optimizer"

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the states that parameters may have, `step` included."""
        return self.rule.states + ("step",) * self.rule.counts_steps

    # Hooks for subclasses.

    def _numbers(self, group: Mapping[str, Any]) -> dict[str, Hyper]:
        """A value for each name in `HYPERS`, from the settings that the class takes."""

        def setting(name: str) -> Any:
            return self._setting(group, name) if name in self.defaults else 0.0

        beta1, beta2 = setting("betas") if self.rule.takes_betas else (setting("momentum"), setting("dampening"))
        numbers: dict[str, Hyper] = {name: setting(name) for name in ("lr", "weight_decay", "coupling", "eps")}
        return {**numbers, "beta1": beta1, "beta2": beta2}

    def _setting(self, group: Mapping[str, Any], name: str) -> Any:
        if name not in group:
            raise KeyError(f"{type(self).__name__}: a param group has no {name!r}; set it again")
        return group[name]

    def _sets(self, group: Mapping[str, Any]) -> list[HyperSet]:
        """The sets of hyperparameters of a group: one, or one for each kind of parameter."""
        numbers = self._numbers(group)
        runs = max(n.numel() if isinstance(n, Tensor) else 1 for n in numbers.values())
        flags = {name: bool(self._setting(group, name)) for name in ("maximize", "nesterov") if name in self.defaults}
        # Tensors may change without notice, so with them the parameters have state even if all are 0.
        momentum = 1.0 if self.rule.takes_betas or "momentum" not in self.defaults else numbers["beta1"]
        has_state = isinstance(momentum, Tensor) or momentum != 0
        states = self.rule.states if has_state else ()
        return [HyperSet(numbers, [code(self.rule.name, **flags)] * runs, states, self.rule.counts_steps)]

    def _set_of(self, param: Tensor, group: Mapping[str, Any]) -> int:
        """Which of the group's sets a parameter belongs to."""
        return 0

    def _check_setting(self, name: str, value: Any) -> None:
        """Raise ValueError for a value that a setting of the class may not have."""
        if name in self.refuses and value:
            raise ValueError(f"{type(self).__name__} does not support {name}; use torch.optim's class for that")
        check_setting(type(self).__name__, name, value)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for settings that are not allowed, by themselves or together."""
        for name in self.defaults:
            self._check_setting(name, group[name])
        if "dampening" in self.defaults and group["nesterov"]:
            check_nesterov(type(self).__name__, group)

    def _implied(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that follow from those that a group was given, or from one that was written."""
        return {}

    def _completed(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """A saved group with the settings that it lacks, as that of another class or an older version: ours of `now`.

        The coupling stays, as torch.optim's classes do not have it; the rest gets its defaults, as there.
        """
        kept = {name: now[name] for name in ("coupling",) if name in now}
        merged = {**self.defaults, **kept, **saved, **self._implied(saved)}
        return {**merged, **self._implied({"coupling": merged["coupling"]})}

    def _states_of(self, param: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the states that a parameter may have, `step` included."""
        return self.state_names

    def _new_stepper(self) -> Stepper:
        return Stepper(self)

    # Param groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`; raises ValueError or TypeError before anything is changed."""
        given = param_group.data if isinstance(param_group, Group) else param_group  # another optimizer's
        tensors: list[Tensor] = []
        observed = self._stepper.observed
        if isinstance(given, dict) and not isinstance(params := given["params"], set):
            given["params"] = [params] if isinstance(params, Tensor) else list(params)  # may be a generator
            # A named parameter comes as (name, tensor). torch.optim reports what is no tensor.
            named = [p[1] if isinstance(p, tuple) else p for p in given["params"]]
            tensors = [p for p in named if isinstance(p, Tensor)]
            implied = self._implied(given)
            group = {**self.defaults, **given, **implied, "params": tensors}
            self._check_group(group)
            self._check_params(group)
            if observed is not None:
                observed.check(type(self).__name__, tensors)
            given |= implied
        super().add_param_group(given)
        self.param_groups[-1] = Group(self.param_groups[-1], self)
        if observed is not None:
            observed.follow(tensors)
        self._stepper.stale = True

    def _check_params(self, group: Mapping[str, Any]) -> None:
        for hypers in self._sets(group):
            for param in group["params"]:
                check_param(type(self).__name__, param, hypers.numbers)

    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups as in `torch.optim`; waits for the GPU.

        Raises:
            RuntimeError: the update kernel was interrupted within a step; only once.
        """
        self._stepper.check_finished(self)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, also one of torch.optim's class; half-precision parameters keep their float32 states.

        Entries of a parameter's state that no optimizer is known to keep are the user's; they are loaded as in
        torch.optim. States are new tensors, except where a CUDA graph or compiled code has the address of the old ones.

        Raises:
            ValueError: the state dict is of other parameters or of another optimizer, or has a setting that is not
                allowed; nothing has changed then.
        """
        final: list[dict[str, Any]] = []
        before = {param: dict(state) for param, state in self.state.items()}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:  # runs after the user's hooks
            final.append(state_dict)
            saved = state_dict["param_groups"]
            if [len(g["params"]) for g in self.param_groups] != [len(g["params"]) for g in saved]:
                return  # torch.optim reports that
            others = {name for cls in _classes.values() for name in cls.rule.states}
            for group, old in zip(self.param_groups, saved, strict=True):
                for param, i in zip(group["params"], old["params"], strict=True):
                    state = state_dict["state"].get(i, {})
                    check_state(type(self).__name__, param, state, self._states_of(param, group), others)
                new = {**self._completed(old, group), "params": group["params"]}
                self._check_group(new)
                self._check_params(new)

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch.optim has cast our states to the parameters' dtype: take them from the state dict again.
        flat = [p for g in self.param_groups for p in g["params"]]
        saved = [i for g in final[0]["param_groups"] for i in g["params"]]
        live = self._stepper.live
        for param, i in zip(flat, saved, strict=True):
            for name in self.state_names:
                if isinstance(value := final[0]["state"].get(i, {}).get(name), Tensor):
                    new, old = placed(value, name, param), before.get(param, {}).get(name)
                    if live and isinstance(old, Tensor) and (old.device, old.dtype) == (new.device, new.dtype):
                        new = old.copy_(new)
                    self.state[param][name] = new
        if live:
            self._stepper.prepare_again(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        now = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        # A copy or a pickle has no stepper; load_state_dict keeps the existing one.
        if "_stepper" not in self.__dict__:
            self._stepper = self._new_stepper()
        self._stepper.stale = True
        self.defaults = {**self._flags(), **self.defaults}  # an older version's may lack some
        pairs = enumerate(self.param_groups)
        self.param_groups = [Group(self._completed(g, now[i] if i < len(now) else {}), self) for i, g in pairs]

    # Writes into param groups.

    def _writing(self, group: Group, key: str, value: Any) -> None:
        """Before a write into a param group: raise ValueError for a value that is not allowed."""
        if key in self.defaults:
            self._check_setting(key, value)
            if not _plain(value) and key in _NUMBERS:
                self._check_params({**group.data, key: value})

    def _written(self, group: Group, key: str) -> None:
        """After a write into a param group: take the setting over, and what follows from it if it is another."""
        keys = [key]
        if group.loose:  # keys may have been taken out
            if not self.defaults.keys() <= group.data.keys():
                return  # the others are to come; a step without them fails
            keys = group.changes()
        for each in keys:
            value, before = group.data[each], group.taken.get(each)
            self._take_over(group, each)
            for name, follows in self._implied({each: value}).items() if value is not before else ():
                group.data[name] = follows
                self._take_over(group, name)

    def _take_over(self, group: Group, key: str) -> None:
        """Send a number that was written to the device, exchange a tensor; for else, mark the stepper stale."""
        before, after, stepper = group.taken.get(key), group.data[key], self._stepper
        group.take(key)
        if stepper.stale or key not in _NUMBERS or key not in self.defaults:
            stepper.stale |= key in _STRUCTURE
            return
        alike = _kinds(before) == _kinds(after)
        switched = key == "momentum" and alike and _plain(before) and (before == 0) != (after == 0)
        if self._derived or switched or not alike:
            stepper.stale = True
            return
        sets = self._sets(group)
        for i, hypers in enumerate(sets):
            stepper.numbers.write(group.row * len(sets) + i, hypers.numbers)
        if stepper.live or len(self.param_groups) <= _EAGER_GROUPS:
            stepper.numbers.flush()

    def _catch_up(self) -> None:
        """Take over what was written into the users' own dicts and lists, which report nothing."""
        if not report_to(self.param_groups, self):  # the list has dicts of the user's, or another optimizer's groups
            for group in self.param_groups:
                self._check_group({**self.defaults, **group})
            self.param_groups[:] = [Group(g.data if isinstance(g, Group) else g, self) for g in self.param_groups]
            self._stepper.stale = True
        for group in not_alone(cast(list[Group], self.param_groups)):
            changes = group.changes()
            if not (changes or group.loose or len(group.data) < len(group.taken)):
                continue
            for key in self.defaults:
                self._setting(group, key)
            for key in changes:
                self._writing(group, key, group.data[key])
            for key in changes:
                self._written(group, key)
            group.take_all()

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
            self._catch_up()
            self._stepper.step(self)
        return loss

    def observe(self, *, head: Tensor | None = None, norms: bool = False, bf16: bool = False) -> Observed:
        """Tell NC0, and have every later step also compute what is asked for, in its pass over the parameters.

        Args:
            head: the classifier's weight `[K, d]`, one of the parameters: its row sum Wᵀ1 and NC0, whenever they are
                read.
            norms: the global norms of a step's gradient and update.
            bf16: a bfloat16 copy of each parameter, for the next forward pass; also of those that are added later.

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
    return not any(_kinds(value))


def _kinds(value: Any) -> list[Any]:
    """For each number of a hyperparameter None, or what of a tensor a compiled step is traced for."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [(v.device, v.dtype, v.shape, v.requires_grad) if isinstance(v, Tensor) else None for v in values]


def by_name(name: str) -> type[Optimizer]:
    """The optimizer class, the package's or the user's, of a name in lower case ("adamw"); ValueError if unknown."""
    if name not in _classes:
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(sorted(_classes))}")
    return _classes[name]
