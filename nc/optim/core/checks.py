"""Checks of settings, parameters, gradients and state dicts; each error names the cause and the remedy."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import HYPERS

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
# States of torch.optim's classes that none of ours has. Not Adam's max_exp_avg_sq: the setting amsgrad tells.
_STATES_OF_TORCH = {
    "square_avg", "acc_delta", "sum", "grad_avg", "mu_product", "exp_inf", "eta", "mu", "ax", "prev", "step_size",
    "row_var", "col_var", "variance",
}  # fmt: skip


def _check_number(owner: str, name: str, value: Any) -> None:
    low, high, closed = _RANGES[name]
    interval = f"[{low}, {high}{']' if closed else ')'}"
    wanted = f"{owner}: {name} must be a number, or one per stacked run, in {interval}"
    if isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{owner}: {name} as a tensor must be float32 or float64; got {value.dtype}")
        if value.dim() > 1:
            raise ValueError(f"{wanted}; got a tensor of shape {tuple(value.shape)}")
        if value.is_meta:  # has no values
            return
        inside = bool(((value >= low) & ((value <= high) if closed else (value < high))).all())
    else:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{wanted}; got {value!r}") from None
        inside = low <= number and (number <= high if closed else number < high)
    if not inside:
        raise ValueError(f"{wanted}; got {value!r}")


def check_setting(owner: str, name: str, value: Any) -> None:
    """Raise ValueError for a hyperparameter out of its range, NaN included. `owner` is the optimizer's class name."""
    if name == "betas":
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ValueError(f"{owner}: betas must be two numbers; got {value!r}")
        for beta in value:
            _check_number(owner, name, beta)
    elif name in _RANGES:
        _check_number(owner, name, value)


def check_nesterov(owner: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError for Nesterov momentum without momentum or with dampening."""
    momentum = group["momentum"]
    some = bool(momentum.gt(0).all()) if isinstance(momentum, Tensor) else momentum > 0
    damped = bool(group["dampening"].ne(0).any()) if isinstance(group["dampening"], Tensor) else group["dampening"] != 0
    if damped or not some:
        raise ValueError(f"{owner}: Nesterov momentum needs momentum > 0 and dampening = 0")


def check_param(owner: str, param: Tensor, numbers: Mapping[str, Hyper]) -> None:
    """Raise TypeError or ValueError for a parameter that cannot be updated with these hyperparameters."""
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


def check_grads(
    owner: str, params: Sequence[Tensor], grads: Sequence[Tensor | None], states: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Raise RuntimeError for a gradient or a state that cannot be used."""
    for param, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{owner} does not take sparse gradients; make the layer's gradient dense (sparse=False)"
            )
        for name, value in states.get(param, {}).items():
            if isinstance(value, Tensor) and value.device != param.device and name != "step":
                raise RuntimeError(
                    f"{owner}: a parameter is on {param.device}, its {name} on {value.device}; move the model before "
                    "the optimizer's first step, or load the optimizer's state_dict again after moving it"
                )


def check_state(
    owner: str, param: Tensor, state: Mapping[str, Any], wanted: Sequence[str], others: Collection[str]
) -> None:
    """Raise ValueError for a saved state of another optimizer, or of a parameter of another shape.

    Args:
        owner: the optimizer's class name.
        param: the parameter.
        state: its saved state; entries that no optimizer is known to keep are the user's, and allowed.
        wanted: the names of the states that the parameter may have, `step` included.
        others: the names of other optimizers' states.
    """
    found = {name for name, value in state.items() if value is not None}
    kept = [name for name in wanted if name != "step"]
    if foreign := found & (_STATES_OF_TORCH | set(others)) - {*kept, "step"}:
        raise ValueError(
            f"{owner}: the state dict is another optimizer's: it has {', '.join(sorted(foreign))}, "
            f"{owner} keeps {', '.join(kept)}"
        )
    if found & {*kept} and (missing := set(kept) - found):
        raise ValueError(f"{owner}: the state dict is another optimizer's: it lacks {', '.join(sorted(missing))}")
    for name in kept:
        if name in found and state[name].shape != param.shape:
            raise ValueError(
                f"{owner}: the state dict's {name} has shape {tuple(state[name].shape)} where the parameter has "
                f"{tuple(param.shape)}; it was saved with other parameters, or in another order"
            )
