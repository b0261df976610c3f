"""What the optimizers refuse, in words that name what was wrong and what to do."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import HYPERS

if TYPE_CHECKING:
    from ncollapse.optim.core.optimizer import Optimizer

# name -> (lower bound, upper bound, whether the upper bound itself is allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "lr": (0, float("inf"), False),
    "momentum": (0, 1, False),
    "dampening": (0, 1, True),
    "weight_decay": (0, float("inf"), False),
    "coupling": (0, 1, True),
    "eps": (0, float("inf"), False),
    "betas": (0, 1, False),
}
_TENSORS = (torch.float32, torch.float64)


def _check_range(owner: str, name: str, value: Any) -> None:
    low, high, closed = _RANGES[name]
    interval = f"[{low}, {high}{']' if closed else ')'}"
    wanted = f"{owner}: {name} must be a number, or one per stacked run, in {interval}"
    if isinstance(value, Tensor):
        if value.dtype not in _TENSORS:
            raise ValueError(f"{owner}: {name} as a tensor must be float32 or float64; got {value.dtype}")
        if value.dim() > 1:
            raise ValueError(f"{wanted}; got a tensor of shape {tuple(value.shape)}")
        values = value
    else:
        try:
            values = torch.tensor(float(value), dtype=torch.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{wanted}; got {value!r}") from None
    if not bool(((values >= low) & ((values <= high) if closed else (values < high))).all()):
        raise ValueError(f"{wanted}; got {value!r}")


def check_group(optimizer: "Optimizer", group: dict[str, Any]) -> None:
    """Raise ValueError for a hyperparameter out of its range, NaN included."""
    owner = type(optimizer).__name__
    for name in _RANGES.keys() & group.keys():
        if name == "betas":
            if len(group[name]) != 2:
                raise ValueError(f"{owner}: betas must be two numbers; got {group[name]!r}")
            for value in group[name]:
                _check_range(owner, name, value)
        else:
            _check_range(owner, name, group[name])
    if group.get("nesterov") and (group["dampening"] != 0 or not torch.as_tensor(group["momentum"]).gt(0).all()):
        raise ValueError(f"{owner}: Nesterov momentum needs momentum > 0 and dampening = 0")


def check_param(optimizer: "Optimizer", param: Tensor, numbers: dict[str, Hyper]) -> None:
    """Raise TypeError or ValueError for a parameter that cannot be updated with these hyperparameters."""
    owner = type(optimizer).__name__
    if param.is_complex():
        raise TypeError(f"{owner} does not take complex parameters; use torch.optim's, or torch.view_as_real")
    if is_traceable_wrapper_subclass(param) and not hasattr(param, "to_local"):
        raise TypeError(
            f"{owner} updates ordinary tensors and DTensors; got a {type(param).__name__}; use torch.optim's"
        )
    if not param.is_floating_point():
        raise TypeError(f"{owner} updates floating-point parameters; got one of {param.dtype}")
    for name in HYPERS:
        value = numbers[name]
        if not isinstance(value, Tensor):
            continue
        if value.numel() != 1 and (param.dim() == 0 or param.shape[0] != value.shape[0]):
            raise ValueError(
                f"{owner}: {name} has a value for each of {value.shape[0]} stacked runs, "
                f"but a parameter has shape {tuple(param.shape)}; its first dimension must be the runs"
            )
        if value.device != param.device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise ValueError(
                f"{owner}: {name} is a tensor on {value.device}, a parameter is on {param.device}; "
                f"move it there, or give a float"
            )


def check_grad(optimizer: "Optimizer", param: Tensor, grad: Tensor) -> None:
    """Raise RuntimeError for a gradient or a state that cannot be used."""
    owner = type(optimizer).__name__
    if grad.layout != torch.strided:
        raise RuntimeError(f"{owner} does not take sparse gradients; make the layer's gradient dense (sparse=False)")
    for name, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.device != param.device and name != "step":
            raise RuntimeError(
                f"{owner}: a parameter is on {param.device}, its {name} on {value.device}; move the model before the "
                "optimizer's first step, or load the optimizer's state_dict again after moving it"
            )


def check_state_dict(optimizer: "Optimizer", state_dict: dict[str, Any]) -> None:
    """Raise ValueError for a state dict of other parameters or of another optimizer."""
    owner = type(optimizer).__name__
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved]:
        return  # torch.optim has the right words for that
    params = [p for g in groups for p in g["params"]]
    ids = [i for g in saved for i in g["params"]]
    for param, i in zip(params, ids, strict=True):
        state = {k: v for k, v in state_dict["state"].get(i, {}).items() if v is not None}
        names = {*optimizer.names, "step"}
        if unknown := set(state) - names:
            raise ValueError(
                f"{owner}: the state dict is another optimizer's: it has {', '.join(sorted(map(str, unknown)))}, "
                f"{owner} keeps {', '.join(optimizer.names)}"
            )
        if state and (missing := set(optimizer.names) - set(state)):
            raise ValueError(f"{owner}: the state dict is another optimizer's: it lacks {', '.join(sorted(missing))}")
        for name in optimizer.names:
            if name in state and state[name].shape != param.shape:
                raise ValueError(
                    f"{owner}: the state dict's {name} has shape {tuple(state[name].shape)} where the parameter has "
                    f"{tuple(param.shape)}; it was saved with other parameters, or in another order"
                )
    for group, old in zip(groups, saved, strict=True):
        check_group(optimizer, {**group, **{k: v for k, v in old.items() if k != "params"}})
