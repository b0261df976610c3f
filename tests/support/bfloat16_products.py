"""Products of bfloat16 tiles in Triton's interpreter, which keeps them as uint16, and multiplies those numbers."""

from typing import Any

import numpy as np
import pytest


def decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tl.dot` of the interpreter take bfloat16 operands for what they are."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def float_of(tile: Any) -> Any:
        if tile.dtype != tl.bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, float_of(a), float_of(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
