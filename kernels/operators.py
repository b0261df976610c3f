"""What all operations share: registering torch operators, why no kernel runs on a device, dtype codes, threads."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

#: Dtypes of the update kernels, with the numbers by which C++ knows them (`_half.h`).
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
#: The build does not end for them, so that the package installs on every machine.
_NOT_BUILT = "ncollapse was built without its C++ kernels (no compiler, or one that failed: `pip install -v` tells)"
_ONE_THREAD = 65536  # with fewer elements, waking a second thread costs more than it saves

# `torch.library.custom_op` would add a Python wrapper that takes longer than a small batch or model.
_library = torch.library.Library("ncollapse", "DEF")
_warned: set[str] = set()


def register_operator(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] = lambda *_: None,
    tags: Sequence[torch.Tag] = (),
) -> Any:  # fmt: skip
    """Register `torch.ops.ncollapse.<name>` for all devices, and return it.

    Args:
        schema: name, arguments and results, as torch writes them.
        fake: the same arguments to results of the same shape, dtype and layout, with any content; by default none.
    """
    name = _library.define(schema, tags=tuple(tags))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ncollapse::{name}", fake, lib=_library)
    return getattr(torch.ops.ncollapse, name).default


def compile_time_constant(function: Function) -> Function:
    """Mark a function for torch.compile to call while it traces, instead of tracing into it.

    The same as `torch.compiler.assume_constant_result`, which would load the compiler: that takes as long as loading
    torch. The function must take constants only.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@compile_time_constant
def why_no_kernel(device: torch.device, extension: str = "") -> str | None:
    """The reason why no kernel runs on this device; None if one does. On a CPU the compiled `extension` has them."""
    if device.type == "cpu":
        return None if _found(extension) else _NOT_BUILT
    if device.type != "cuda":
        return f"there is no kernel for {device.type} tensors"
    return None if _found("triton") else "Triton is not installed"


def uses_threads(extension: str) -> bool:
    """Whether a compiled extension was built with OpenMP; else it uses one thread."""
    return bool(import_module(extension).has_openmp)


@compile_time_constant
def warn_once(what: str, reason: str) -> None:
    """Warn that plain PyTorch does `what`; once for each reason."""
    message = f"plain PyTorch {what}, slowly: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


def cpu_threads(elements: int) -> int:
    """How many threads a CPU kernel uses for so many elements."""
    return 1 if elements < _ONE_THREAD else torch.get_num_threads()


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 for the CPU, on which Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _found(module: str) -> bool:
    return find_spec(module) is not None
