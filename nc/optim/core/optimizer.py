"""What the optimizers share: the way from param groups to one launch of the update kernel."""

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.optim.core.checks import check_group, check_param, check_state_dict
from ncollapse.optim.core.groups import Group
from ncollapse.optim.core.observe import Observed, observed
from ncollapse.optim.core.stepper import Plan, placed

_NUMBERS = {"lr", "weight_decay", "coupling", "momentum", "betas", "eps", "dampening"}
_STRUCTURE = {"params", "nesterov", "maximize", "rules"}
# A write into a param group goes to the GPU at once, so that a graph captured next finds it there. With more groups
# than this the next step brings all of them together.
_EAGER_GROUPS = 32


class Optimizer(torch.optim.Optimizer):
    """Base of the optimizers: `torch.optim.Optimizer` with coupled and decoupled decay, one kernel launch a step.

    A hyperparameter may be a float, a 0-d tensor (on the parameters' device it is read by the kernel at every step,
    also from a CUDA graph), or a tensor `[R]`, which says that each parameter of the group is R stacked runs `[R, …]`.
    """

    #: The coupling that a class uses when none is given.
    default_coupling: ClassVar[float] = 1.0
    #: A name of `ncollapse.kernels.update.reference.RULES`.
    rule: ClassVar[str]
    #: What `torch.optim` calls the states, V or m, and v.
    names: tuple[str, ...] = ("momentum_buffer",)
    #: Whether steps are counted.
    counts: bool = False
    # Whether `_numbers` makes tensors of plain numbers.
    _derived: ClassVar[bool] = False
    # torch.amp.GradScaler then leaves the scale, and a step that is to be skipped, to the kernel.
    _step_supports_amp_scaling = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any], coupling: Hyper | None, **unsupported: bool) -> None:
        for name in (name for name, wanted in unsupported.items() if wanted):
            raise ValueError(f"{type(self).__name__} does not support {name}; use torch.optim's class for that")
        self._plan = Plan(self)
        defaults["coupling"] = self.default_coupling if coupling is None else coupling
        super().__init__(params, defaults)

    # What a subclass may say of its rule.

    def _numbers(self, group: dict[str, Any]) -> dict[str, Hyper]:
        """The numbers `HYPERS` of a group."""
        beta1, beta2 = group["betas"] if "betas" in group else (group["momentum"], group.get("dampening", 0.0))
        common = {name: group[name] for name in ("lr", "weight_decay", "coupling")}
        return {**common, "beta1": beta1, "beta2": beta2, "eps": group.get("eps", 0.0)}

    def _rules(self, group: dict[str, Any]) -> list[str]:
        """The rule of each stacked run of a group."""
        return [self.rule] * max(n.numel() if isinstance(n, Tensor) else 1 for n in self._numbers(group).values())

    def _has_state(self, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group keep state; with a momentum for each run they do, though it may be 0."""
        momentum = group.get("momentum", 1.0)
        return isinstance(momentum, Tensor) or momentum != 0

    # Param groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`; raises ValueError or TypeError before anything is changed."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])  # may be a generator
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            group = {**self.defaults, **param_group}
            check_group(self, group)
            params = group["params"]
            # A named parameter comes as (name, tensor).
            params = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
            group["params"] = [p for p in params if isinstance(p, Tensor)]  # torch.optim has the words for the others
            for param in group["params"]:
                check_param(self, param, self._numbers(group))
        super().add_param_group(param_group)
        self.param_groups[-1] = Group(self.param_groups[-1], self, len(self.param_groups) - 1)
        self._plan.stale = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in `torch.optim`, whose state dicts are taken too; half-precision parameters keep their float32 states.

        Raises:
            ValueError: the state dict is not of these parameters, or of another optimizer; nothing has changed then.
        """
        final: list[dict[str, Any]] = []
        before = {param: dict(state) for param, state in self.state.items()}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:  # comes after the user's own hooks
            check_state_dict(self, state_dict)
            final.append(state_dict)

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch.optim has cast the states to the parameters' dtype: take them again from where they came, into the
        # tensors that there are, which a CUDA graph may use.
        flat = [p for g in self.param_groups for p in g["params"]]
        saved = [i for g in final[0]["param_groups"] for i in g["params"]]
        for param, i in zip(flat, saved, strict=True):
            for name, value in final[0]["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    new, old = placed(value, name, param), before.get(param, {}).get(name)
                    if isinstance(old, Tensor) and (old.device, old.dtype) == (new.device, new.dtype):
                        new = old.copy_(new)
                    self.state[param][name] = new
        if self._plan.live:
            self._plan.prepare_again(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy or a pickle has no plan; load_state_dict goes on with the one that there is.
        self._plan = self.__dict__.get("_plan") or Plan(self)
        self._plan.stale = True
        # A state dict of torch.optim has no coupling; one of an older version may lack other keys.
        groups = [{**self.defaults, **_coupling_of(group), **group} for group in self.param_groups]
        self.param_groups = [Group(group, self, row) for row, group in enumerate(groups)]

    def _written(self, group: Group, key: str, before: Any) -> None:
        """Of a write into a param group: a number goes to the device; anything else makes the next step start over."""
        plan, after = self._plan, group.get(key)
        if plan.stale or key not in _NUMBERS:
            plan.stale |= key in _STRUCTURE
            return
        numbers = self._numbers(group)
        derived = self._derived and any(isinstance(n, Tensor) for n in numbers.values())
        switched = key == "momentum" and _plain(before) and (before == 0) != (after == 0)
        if derived or switched or not (_plain(before) and _plain(after)):
            plan.stale = True
            return
        plan.numbers.write(group.row, numbers)
        if plan.live or len(self.param_groups) <= _EAGER_GROUPS:
            plan.numbers.flush()

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
            self._plan.traced_step(self)
        else:
            self._plan.step(self)
        return loss

    def observe(self, *, head: Tensor | None = None, norms: bool = False, bf16: bool = False) -> Observed:
        """Have every step from now on also give, without a pass of its own, what is asked for.

        Args:
            head: the classifier's weight `[K, d]`, one of the parameters: its row sum Wᵀ1 and NC0.
            norms: the global norms of the gradient and of the change.
            bf16: a bfloat16 copy of each parameter, for the next forward pass.

        Raises:
            ValueError: the head is no parameter of this optimizer, or norms of several devices.

        Example:
            >>> model = torch.nn.Linear(5, 3)
            >>> seen = (opt := SGD(model.parameters(), lr=0.1)).observe(head=model.weight, norms=True)
            >>> model(torch.ones(2, 5)).sum().backward(); opt.step()
            >>> seen.nc0, seen.grad_norm
        """
        params = [p for group in self.param_groups for p in group["params"]]
        runs = {len(self._rules(group)) for group in self.param_groups}
        if len(runs) > 1:
            raise ValueError(f"{type(self).__name__}: all groups must have the same number of stacked runs; got {runs}")
        self._plan.observed = observed(type(self).__name__, params, runs.pop(), head, norms, bf16)
        self._plan.stale = True
        return self._plan.observed


def _coupling_of(group: dict[str, Any]) -> dict[str, float]:
    """What a param group of torch.optim.Adam says of its decay."""
    decoupled = group.get("decoupled_weight_decay")
    return {} if decoupled is None else {"coupling": 0.0 if decoupled else 1.0}


def _plain(value: Any) -> bool:
    """Whether a hyperparameter is a number, or two."""
    return all(isinstance(v, (int, float)) for v in (value if isinstance(value, (tuple, list)) else (value,)))
