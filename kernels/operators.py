"""Where no kernel can go: why, and a warning, once for each reason."""

import warnings
from functools import cache
from importlib.util import find_spec

import torch

_warned: set[str] = set()


def why_no_kernel(device: torch.device, extension: str) -> str | None:
    """Why there is no kernel on this device; None if there is one.

    Args:
        extension: name of the module that was compiled for the CPU.
    """
    if device.type == "cpu":
        return None if _found(extension) else "the package was installed without a C++ compiler"
    if device.type != "cuda":
        return f"there is no kernel for {device.type} tensors"
    return None if _found("triton") else "Triton is not installed"


def warn_once(what: str, reason: str) -> None:
    """Say that plain PyTorch does it."""
    message = f"plain PyTorch {what}, slowly: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


@cache
def _found(module: str) -> bool:
    return find_spec(module) is not None
