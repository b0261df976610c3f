"""Optimizers that are not ncollapse's: made from a run's settings by the signature of their class, and tried."""

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncollapse.optimizer_table import row_of
from ncollapse.train.config import FIELDS, RunConfig
from ncollapse.train.errors import OwnCodeError, UserError, blamed, out_of_memory
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.randomness import seeded

_DEFAULTS = {field.name: field.default for field in FIELDS}
_NUMBERS = ("lr", "momentum", "weight_decay", "beta2", "eps")
#: Arguments that are settings of a run, and no options.
_SETTINGS = ("params", "lr", "momentum", "weight_decay")
_CPU = torch.device("cpu")


def make_foreign(run: RunConfig, params: Sequence[nn.Parameter], plugins: Plugins) -> torch.optim.Optimizer:
    """Make the optimizer of a run.

    `lr` and `weight_decay` are passed by their names, the momentum as `momentum` or the first of `betas`, β₂ and ε
    where they differ from the defaults of a run, each if the class takes it; further arguments are the run's
    `optimizer_options`. On a GPU `capturable` is set where the class has it, and the learning rate is a tensor, so that
    a CUDA graph follows it.

    Raises:
        UserError: it makes no `torch.optim.Optimizer`.
        OwnCodeError: it raises an error.
    """
    make = plugins.find("optimizer", run.optimizer)
    arguments = _arguments(run, _parameters(make), params[0].device)
    try:
        made = make(list(params), **arguments)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise _own(run, error) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"{_what(run, plugins)} must make a torch.optim.Optimizer; it makes a {type(made).__name__}")
    return made


def foreign_error(run: RunConfig, error: Exception) -> OwnCodeError:
    """Make the error for an exception that the optimizer of a run has raised."""
    new = _own(run, error)
    new.run = run.id
    return new


def _own(run: RunConfig, error: Exception) -> OwnCodeError:
    return OwnCodeError.of(f"optimizer {run.optimizer}", error)


def _what(run: RunConfig, plugins: Plugins) -> str:
    return f"optimizer {run.optimizer} ({plugins.where('optimizer', run.optimizer)})"


def _parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return what can be passed by name after the parameters; a class with **kwargs takes those of its base too."""
    found: dict[str, inspect.Parameter] = {}
    bases = [base.__init__ for base in make.__mro__ if "__init__" in vars(base)] if inspect.isclass(make) else [make]  # type: ignore[misc]
    for function in bases:
        parameters = inspect.signature(function).parameters
        skipped = 2 if inspect.isclass(make) else 1  # self and the parameters
        named = [p for p in list(parameters.values())[skipped:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        # What a base needs the class gives.
        found |= {
            p.name: p for p in named if p.name not in found and (function is bases[0] or p.default is not p.empty)
        }
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def _arguments(run: RunConfig, takes: Mapping[str, inspect.Parameter], device: torch.device) -> dict[str, Any]:
    options = run.options("optimizer")
    arguments: dict[str, Any] = {name: getattr(run, name) for name in ("lr", "weight_decay") if name in takes}
    if "momentum" in takes:
        arguments["momentum"] = run.momentum
    elif "betas" in takes:
        betas = takes["betas"].default
        betas = list(betas) if isinstance(betas, tuple | list) and len(betas) > 1 else [run.momentum, run.beta2]
        betas[0] = run.momentum
        if run.beta2 != _DEFAULTS["beta2"]:
            betas[1] = run.beta2
        arguments["betas"] = tuple(betas)
    if "beta2" in takes and run.beta2 != _DEFAULTS["beta2"]:
        arguments["beta2"] = run.beta2
    if "eps" in takes and run.eps != _DEFAULTS["eps"]:
        arguments["eps"] = run.eps
    if device.type == "cuda" and "capturable" in takes:
        arguments["capturable"] = True
        if options.get("capturable", True) and "lr" in arguments:
            arguments["lr"] = torch.tensor(run.lr, device=device)
    # JSON has lists for tuples.
    return arguments | {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def check_optimizers(runs: Sequence[RunConfig], plugins: Plugins) -> None:
    """Check the optimizers of a grid's runs that are not ncollapse's, and try each on two small parameters.

    Raises:
        UserError: a class that is no optimizer; options that it does not take, arguments that it needs; numbers that
            differ among its runs and that it does not take; an error in a step, or that a step needs a closure; a state
            that cannot be kept in a checkpoint, or from which it does not continue with the same numbers.
    """
    groups: dict[tuple[str, str], list[RunConfig]] = {}
    for run in runs:
        if row_of(run.optimizer).foreign:
            groups.setdefault((run.optimizer, run.optimizer_options), []).append(run)
    for members in groups.values():
        _check_signature(members, plugins)
        tried = {tuple(getattr(run, name) for name in _NUMBERS): run for run in members}
        for run in tried.values():
            make_foreign(run, _small_params(), plugins)
        _try_steps(members[0], plugins)


def _check_signature(runs: Sequence[RunConfig], plugins: Plugins) -> None:
    what, make = _what(runs[0], plugins), plugins.find("optimizer", runs[0].optimizer)
    if inspect.isclass(make) and not issubclass(make, torch.optim.Optimizer):
        raise UserError(
            f"{what} is no torch.optim.Optimizer; its bases are {', '.join(b.__name__ for b in make.__mro__)}"
        )
    try:
        takes = _parameters(make)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: it cannot be seen which arguments it takes: {error}") from None
    options = runs[0].options("optimizer")
    for name in options:
        if name in _SETTINGS:
            raise UserError(f"optimizer_options of {runs[0].optimizer}: {name} is a setting of the run, not an option")
        if name not in takes:
            others = ", ".join(known for known in takes if known not in _SETTINGS)
            raise UserError(f"{what} has no option {name!r}; it has {others or 'none'}")
    given = {"lr", "weight_decay", "momentum", "betas", *options}
    if missing := [p.name for p in takes.values() if p.default is p.empty and p.name not in given]:
        raise UserError(f"{what} needs {', '.join(missing)}: give it in optimizer_options")
    aliases = {"momentum": ("momentum", "betas"), "beta2": ("betas", "beta2")}
    for name in _NUMBERS:
        names = [n for n in aliases.get(name, (name,)) if n in takes]
        values = sorted({getattr(run, name) for run in runs})
        if len(values) > 1 and not [n for n in names if n not in options]:
            shown = ", ".join(f"{value:g}" for value in values[:4]) + ", …" * (len(values) > 4)
            why = f"optimizer_options give {names[0]}" if names else f"it takes no {name}"
            raise UserError(f"{what}: {name} differs among its runs ({shown}), but {why}")


def _small_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator, device="cpu")) for shape in ((3, 5), (4,))]


def _try_steps(run: RunConfig, plugins: Plugins) -> None:
    """Take steps, and steps that continue from a saved state, which must give the same numbers."""
    what = _what(run, plugins)

    def stepped(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], steps: range) -> None:
        set_mode(optimizer, "train")
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, device="cpu")
            with seeded(_CPU, step):
                optimizer.step()

    params = _small_params()
    optimizer = make_foreign(run, params, plugins)
    buffer = io.BytesIO()
    saves = ""
    try:
        stepped(optimizer, params, range(3))
        set_mode(optimizer, "eval")
        set_mode(optimizer, "train")
        copies = [nn.Parameter(param.detach().clone()) for param in params]
        saves = _saved(optimizer, buffer)
        stepped(optimizer, params, range(3, 5))
    except Exception as error:
        if "closure" in f"{error}".lower() or "closure" in _required(optimizer.step):
            raise UserError(
                f"{what}: its step needs a closure, which computes the loss again; a sweep computes one gradient a step"
            ) from None
        raise UserError(
            f"{what} cannot take a step with a matrix and a vector as parameters: {blamed(error)}"
        ) from error
    if saves:
        raise UserError(
            f"{what} keeps {saves} in its state, which a checkpoint cannot hold: it holds tensors, numbers, texts, and "
            "lists and dictionaries of them"
        )
    saved = torch.load(buffer, weights_only=True)
    continued = make_foreign(run, copies, plugins)
    try:
        load_exactly(continued, saved)
        stepped(continued, copies, range(3, 5))
    except Exception as error:
        raise UserError(f"{what} does not continue from its own state_dict: {blamed(error)}") from error
    if not all(torch.equal(a, b) for a, b in zip(params, copies, strict=True)):
        raise UserError(
            f"{what} continues from its own state_dict with other numbers, so that an interrupted run would be another "
            "one: what changes from step to step must be in its `state` or in its `param_groups`"
        )


def _saved(optimizer: torch.optim.Optimizer, buffer: io.BytesIO) -> str:
    """Save the state of an optimizer; return what a checkpoint cannot hold of it, in words."""
    try:
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # whatever cannot be pickled, or read back without running code
        return ", ".join(sorted(_other_kinds(optimizer.state_dict()))) or "something"
    finally:
        buffer.seek(0)
    return ""


def _other_kinds(value: Any) -> set[str]:
    """Return the types in nested lists and dictionaries that are neither tensors nor plain values."""
    if isinstance(value, dict):
        return set[str]().union(*(_other_kinds(one) for pair in value.items() for one in pair))
    if isinstance(value, list | tuple):
        return set[str]().union(*(_other_kinds(one) for one in value))
    plain = isinstance(value, Tensor) or type(value) in (int, float, complex, bool, str, bytes, type(None))
    return set() if plain else {type(value).__name__}


def _required(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]


def set_mode(optimizer: torch.optim.Optimizer, mode: str) -> bool:
    """Call `train()` or `eval()` of a schedule-free optimizer; return whether it has them."""
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()
    return callable(method)


def load_exactly(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load a `state_dict`, without the conversion of its tensors to the dtype of their parameter."""
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, old in zip(optimizer.param_groups, before, strict=True):
        # A CUDA graph reads a learning rate on the GPU, while a checkpoint is read on the CPU.
        group.update({name: _placed(old.get(name), value) for name, value in group.items() if name != "params"})
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        if index in saved["state"]:
            optimizer.state[param] = _placed(optimizer.state[param], saved["state"][index])


def _placed(loaded: Any, saved: Any) -> Any:
    """Return what was saved, with each tensor on the device that loading has chosen for it."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device) if isinstance(loaded, Tensor) else saved
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _placed(loaded.get(key), value) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(loaded) == len(saved):
        return type(saved)(_placed(one, other) for one, other in zip(loaded, saved, strict=True))
    return saved
