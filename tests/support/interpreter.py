"""Triton's interpreter, which runs kernels without a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pytest


@contextmanager
def quiet() -> Iterator[None]:
    """Silence NumPy, which computes in the interpreter: it warns of NaN and of log 0."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def run_backwards(monkeypatch: pytest.MonkeyPatch, order: list[int]) -> None:
    """Let the programs of every launch, of a grid of one dimension, run from last to first; `order` lists them."""
    from triton.runtime.interpreter import interpreter_builder

    set_index = interpreter_builder.set_grid_idx

    def backwards(x: int, y: int, z: int) -> None:
        order.append(interpreter_builder.grid_dim[0] - 1 - x)
        set_index(order[-1], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", backwards)


def _accept_loop_bounds() -> None:
    """Let Triton 3.6 run loops with NumPy 2.4, which no longer converts an array of one element to a number."""
    try:
        old = tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9)
    except PackageNotFoundError:
        return
    if not old:
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


_accept_loop_bounds()
