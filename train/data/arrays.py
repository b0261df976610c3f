"""Tensors of whatever holds numbers, and samples in the form in which a data set keeps them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncollapse.train.errors import UserError

#: An axis of an image that is this long or shorter is that of its channels.
_MOST_CHANNELS = 4


def as_tensor(value: Any, what: str) -> Tensor:
    """Return numbers as a tensor on the CPU, without a copy where there need not be one.

    Args:
        value: a tensor, or an array: anything with `__array__`.
        what: its name, for messages.

    Raises:
        UserError: something else, such as texts or objects.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
            raise UserError(f"{what} is a {value.layout} tensor of {value.dtype}; give a dense one of real numbers")
        return value.detach().cpu().resolve_neg()
    if isinstance(value, list | tuple):
        raise UserError(f"{what} is a {type(value).__name__}; give a tensor or an array: torch.stack(…), np.array(…)")
    if not hasattr(value, "__array__"):
        raise UserError(f"{what} is a {type(value).__name__}; give a tensor or an array")
    return _of_array(value, what)


def label_tensor(value: Any, what: str) -> Tensor:
    """Return labels as a tensor on the CPU; as in `as_tensor`, but they may be a list too."""
    return _of_array(value, what) if isinstance(value, list | tuple) else as_tensor(value, what)


def _of_array(value: Any, what: str) -> Tensor:
    try:
        array = np.asarray(value)
    except Exception as error:  # of rows of different lengths, of whatever `__array__` raises
        raise UserError(f"{what} is no array: {error}") from None
    if array.dtype.kind not in "biuf":
        hint = ": number them, as np.unique(…, return_inverse=True) does" if array.dtype.kind in "USO" else ""
        raise UserError(f"{what} has values of the type {array.dtype}, not numbers{hint}")
    kind = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    array = np.ascontiguousarray(array.astype(kind, copy=False)).reshape(array.shape)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def samples_of(value: Any, what: str) -> Tensor:
    """Return samples as bytes, float32 or int64; images with their channels first.

    Bytes stay bytes, uint16 is scaled to bytes, floats and booleans become float32, other integers, which are tokens,
    int64. Bytes `[N, H, W]` are grey images; those and floats of four axes are images, see `channels_are_last`.

    Raises:
        UserError: no samples, no numbers, values that are not finite, negative integers.
    """
    x = as_tensor(value, what)
    if x.dim() < 2 or 0 in x.shape:
        raise UserError(f"{what} has the shape {list(x.shape)}; samples are [N, …], none of these 0")
    if x.dtype == torch.uint16:  # as the files of images
        x = torch.from_numpy(eight_bits(x.numpy(), what))
    elif x.is_floating_point() or x.dtype == torch.bool:
        x = x.float()
        check_finite(x, what)
    elif x.dtype != torch.uint8:
        x = x.long()
        if int(x.min()) < 0:
            where = _first(x < 0)
            raise UserError(
                f"{what}{list(where)} is {int(x[where])}: integers are tokens, which count from 0; give other numbers "
                "as floats"
            )
    if x.dtype == torch.uint8 and x.dim() == 3:
        return x.unsqueeze(1)
    if x.dtype != torch.int64 and channels_are_last(x.shape[1:]):
        return x.movedim(-1, 1).contiguous()
    return x


def eight_bits(pixels: np.ndarray, what: str) -> np.ndarray:
    """Scale integers from 0 to 65,535 to bytes; Pillow's own conversion makes all above 255 white."""
    if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 65_535:
        raise UserError(f"{what} has values outside 0 to 65,535; save it with 8 or 16 bits")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def channels_are_last(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape is an image `[H, W, C]`, not `[C, H, W]`.

    It is where only its last axis has at most 4 entries; where none has, if its first two are equal and the last is
    not.
    """
    if len(shape) != 3:
        return False
    first, middle, last = shape
    return last <= _MOST_CHANNELS < first or (min(first, last) > _MOST_CHANNELS and first == middle != last)


def check_finite(x: Tensor, what: str) -> None:
    """Raise UserError, which names the first, for values that are NaN or inf."""
    finite = x.isfinite()
    if not bool(finite.all()):
        where = _first(~finite)
        raise UserError(f"{what}{list(where)} is {float(x[where])}; values must be finite in float32")


def _first(found: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(found.flatten().to(torch.uint8).argmax()), tuple(found.shape)))
