"""What the optimizers share: checking hyperparameters and gradients, and the walk over param groups."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nc.kernels.update import Hyper, compute_dtype

# name -> (lower bound, upper bound, whether the upper bound itself is allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "lr": (0, float("inf"), False),
    "momentum": (0, 1, False),
    "weight_decay": (0, float("inf"), False),
    "coupling": (0, 1, True),
    "eps": (0, float("inf"), False),
    "betas": (0, 1, False),
}


def _check_range(owner: str, name: str, value: Hyper) -> None:
    low, high, closed = _RANGES[name]
    values = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    inside = (values >= low) & ((values <= high) if closed else (values < high))
    if values.dim() > 1 or not bool(inside.all()):
        interval = f"[{low}, {high}{']' if closed else ')'}"
        raise ValueError(f"{owner}: {name} must be a number, or one per stacked run, in {interval}; got {value!r}")


class Coupled(torch.optim.Optimizer):
    """Base of the optimizers: `torch.optim.Optimizer` whose hyperparameters may also be one per stacked run.

    A hyperparameter given as a tensor `[R]` says that each parameter of the group is R stacked runs `[R, …]`.
    """

    #: The coupling that a class uses when none is given.
    default_coupling = 1.0

    def __init__(self, params: ParamsT, defaults: dict[str, Any], coupling: Hyper | None) -> None:
        defaults["coupling"] = self.default_coupling if coupling is None else coupling
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`; raises ValueError or TypeError before anything is changed."""
        group = {**self.defaults, **param_group}
        self._check(group)
        params = group["params"]
        tensors = [params] if isinstance(params, Tensor) else list(params)
        param_group["params"] = tensors  # may have been a generator, which is spent now
        # A named parameter comes as (name, tensor).
        for param in (p[1] if isinstance(p, tuple) else p for p in tensors):
            self._check_param(param, group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A state dict of torch.optim has no coupling, one of an older version may lack other keys.
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _check(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        for name in _RANGES.keys() & group.keys():
            values = group[name] if name == "betas" else (group[name],)
            for value in values:
                _check_range(owner, name, value)

    def _check_param(self, param: Any, group: dict[str, Any]) -> None:
        if not isinstance(param, Tensor):
            return  # torch.optim has the right words for that
        if param.is_complex():
            raise TypeError(
                f"{type(self).__name__} does not take complex parameters; use torch.optim's, or view_as_real"
            )
        for name, value in group.items():
            for h in value if name == "betas" else (value,):
                if isinstance(h, Tensor) and h.dim() == 1 and (param.dim() == 0 or param.shape[0] != h.shape[0]):
                    raise ValueError(
                        f"{type(self).__name__}: {name} has a value for each of {h.shape[0]} stacked runs, "
                        f"but a parameter has shape {tuple(param.shape)}; its first dimension must be the runs"
                    )

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        """State of a parameter before its first step; as in torch.optim.SGD, the momentum buffer comes later."""
        return {"momentum_buffer": None}

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Any]) -> None:
        """One step for the parameters of a group that have gradients."""
        raise NotImplementedError

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
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
            for p in params:
                if not self.state[p]:
                    self.state[p].update(self._new_state(p))
            self._update(group, params, [p.grad for p in params], [self.state[p] for p in params])
        return loss


def zero_state(param: Tensor) -> Tensor:
    """A state tensor for a parameter before its first step: in its layout, float32 for half precision."""
    return torch.zeros_like(param, dtype=compute_dtype(param))


def column(states: Iterable[dict[str, Any]], name: str) -> list[Any]:
    """One entry of each parameter's state."""
    return [state.get(name) for state in states]


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether the group needs a momentum buffer: one per stacked run always does, so that a run may have none."""
    return isinstance(group["momentum"], Tensor) or group["momentum"] != 0


def momentum_buffers(group: dict[str, Any], params: list[Tensor], states: list[Any]) -> list[Tensor | None]:
    """The momentum buffers of a group, made where a parameter has none yet; all None where there is no momentum."""
    if not has_momentum(group):
        return [None] * len(params)
    for param, state in zip(params, states, strict=True):
        if state["momentum_buffer"] is None:
            state["momentum_buffer"] = zero_state(param)
    return column(states, "momentum_buffer")
