"""Where tensors are and how they lie in memory, looked at in many of them at once: `Fingerprint`.

A kernel that reads addresses from a table must not trust what was true a step ago: `p.data = …`, `set_`,
`storage().resize_()`, `share_memory_()` and `swap_tensors` give a tensor other memory or another shape behind its back.
To ask each of 5,000 tensors from Python takes longer than their update; the C++ extension asks libtorch's stable C
functions. Without the extension, or where this torch's Python tensors are not laid out as expected, Python asks.
"""

import ctypes
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncollapse.kernels.operators import why_no_kernel

EXTENSION = "ncollapse.kernels._tensors"
#: `Fingerprint.look` returns it where a tensor is no longer what it was.
CHANGED = -1
#: The kinds of None, and of what has no memory that a kernel may touch.
NONE, FOREIGN = (n.to_bytes(8, "little", signed=True) for n in (-1, -2))
#: Stands for the address of an empty tensor, since 0 is that of None.
EMPTY = 16
_FUNCTIONS = (
    "get_data_ptr", "get_dim", "get_sizes", "get_strides", "get_dtype", "get_device_type", "get_device_index",
    "get_layout", "get_storage_size", "get_storage_offset", "dtype_element_size",
)  # fmt: skip
# void torch::autograd::impl::bump_version(const at::Tensor &)
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
# const at::Tensor &c10::TensorImpl::grad() const; PyObject *THPVariable_Wrap(const at::TensorBase &)
_GRAD, _WRAP = "_ZNK3c1010TensorImpl4gradEv", "_Z16THPVariable_WrapRKN2at10TensorBaseE"

#: Lists of tensors and Nones.
Columns = tuple[list[Any], ...]


class Fingerprint:
    """The kinds (dtype, device, shape, strides) and addresses of the tensors in some lists.

    Args:
        optional: the list in which a tensor may be missing (None) at any time without being a change; or -1.
        written: a mask of the lists whose tensors a kernel writes: `look` counts up their versions, so that autograd
            refuses a backward pass through values that have changed since.

    Attributes:
        addresses: int64, of all tensors of all lists; 0 for None, `EMPTY` for empty tensors.
    """

    def __init__(self, optional: int = -1, written: int = 0) -> None:
        self.optional, self.written = optional, written
        self.addresses: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        #: The kinds of each list. Of a missing tensor the one that it had, as long as that of its place in the first
        #: list is what it was then; else the latter.
        self.kinds: list[list[bytes]] = []
        self._joined: bytes | None = None

    def look(self, columns: Columns) -> int:
        """Compare the tensors with those of before, and take their addresses.

        Returns `CHANGED` if a kind differs, or their number; else a mask of the lists in which an address has changed.
        """
        if self._joined is None:
            return CHANGED
        if _compiled is not None:
            mask = _compiled.look(columns, self._joined, self._memory, self.optional, self.written)
        else:
            mask = self._look(columns)
        if mask >= 0 and self.written and not _bumps:
            lists = [column for c, column in enumerate(columns) if self.written >> c & 1]
            torch.autograd.graph.increment_version(t for column in lists for t in column if isinstance(t, Tensor))
        return mask

    def renew(self, columns: Columns) -> None:
        """Take the tensors for what they are now."""
        if _compiled is not None:
            for cls in {type(t) for column in columns for t in column} - _accepted:
                if has_memory_of_its_own(cls):
                    _compiled.accept(cls)
                    _accepted.add(cls)
        kinds = [_describe(column) for column in columns]
        if self.optional >= 0:
            column, before = kinds[self.optional], self.kinds
            for i, kind in enumerate(column):
                if kind == NONE:
                    same = bool(before) and i < len(before[0]) and before[0][i] == kinds[0][i]
                    known = before[self.optional][i] if same else NONE
                    column[i] = kinds[0][i] if known == NONE else known
        self.kinds, self._joined = kinds, b"".join(kind for column in kinds for kind in column)
        self.addresses = np.full(sum(map(len, columns)), -1, dtype=np.int64)
        self._memory = self.addresses.ctypes.data
        self.look(columns)

    def expect_none(self, i: int) -> None:
        """Take a tensor in place i of the list `optional` for a change."""
        self.kinds[self.optional][i] = NONE
        self._joined = b"".join(kind for column in self.kinds for kind in column)

    def _look(self, columns: Columns) -> int:
        if [len(column) for column in columns] != [len(column) for column in self.kinds]:
            return CHANGED
        mask, at = 0, 0
        for c, column in enumerate(columns):
            for kind, tensor in zip(self.kinds[c], column, strict=True):
                now = _kind(tensor)
                address = 0 if now in (NONE, FOREIGN) else tensor.data_ptr() if tensor.numel() else EMPTY
                if now != kind and not (c == self.optional and tensor is None):
                    return CHANGED
                if address != self.addresses[at]:
                    self.addresses[at] = address
                    mask |= 1 << c
                at += 1
        return mask


def tensor_of(values: Any) -> Tensor:
    """A tensor as it is; of an array, a number or a list, one on the CPU, whatever torch's default device is."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def has_memory_of_its_own(cls: type) -> bool:
    """Whether tensors of a class are no wrappers of others: not FakeTensor, DTensor and the like."""
    return issubclass(cls, Tensor) and cls.__torch_dispatch__ is Tensor.__torch_dispatch__


def has_no_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a meta tensor, or a fake one that stands for a tensor on another device."""
    try:
        return tensor.untyped_storage().device.type == "meta"
    except NotImplementedError:  # a transform's wrapper
        return False


def storage_needed(tensor: Tensor) -> int:
    """How many bytes the storage of a strided tensor must have; 0 for an empty one."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0


def _describe(tensors: list[Any]) -> list[bytes]:
    return _compiled.describe(tensors) if _compiled is not None else [_kind(tensor) for tensor in tensors]


def _kind(tensor: Any) -> bytes:
    if tensor is None:
        return NONE
    if (
        not has_memory_of_its_own(type(tensor))
        or tensor.layout != torch.strided
        or not (tensor.is_cpu or tensor.is_cuda)
    ):
        return FOREIGN
    try:
        small = storage_needed(tensor) > tensor.untyped_storage().nbytes()
    except NotImplementedError:  # a transform's wrapper
        return FOREIGN
    # A view of one element may have torch's lazy minus sign: its memory then holds the negative.
    if small or tensor.is_neg():
        return FOREIGN
    return repr((tensor.dtype, tensor.device, tensor.shape, tensor.stride())).encode()


def same_objects(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    if _compiled is not None:
        return _compiled.same(a, b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def values_of(dicts: list[dict[str, Any]], keys: tuple[str, ...]) -> list[list[Any]]:
    """For each key, its value in each dict; KeyError where one is missing."""
    return _compiled.values(dicts, keys) if _compiled is not None else [[d[key] for d in dicts] for key in keys]


def gradients_of(params: list[Any]) -> list[Any]:
    """The gradient of each tensor, or None."""
    return _compiled.gradients(params, Tensor.grad) if _compiled is not None else [p.grad for p in params]


def _bind() -> tuple[Any, bool]:
    """The extension, bound to libtorch, or None; and whether it counts up versions."""
    if why_no_kernel(torch.device("cpu"), EXTENSION) is not None:
        return None, False
    from ncollapse.kernels import _tensors

    try:
        library = _library("torch_cpu")
        functions = [getattr(library, f"aoti_torch_{name}") for name in _FUNCTIONS]
        codes = [
            getattr(library, f"aoti_torch_{name}")()
            for name in ("layout_strided", "device_type_cpu", "device_type_cuda")
        ]
    except (OSError, AttributeError, IndexError):
        return None, False
    # A Python tensor holds the address that `_cdata` tells, directly after the object's header or a word later.
    examples = torch.empty(2, 3, device="cpu"), torch.nn.Parameter(torch.empty(3, device="cpu"))
    word = ctypes.sizeof(ctypes.c_void_p)
    for offset in (object.__basicsize__, object.__basicsize__ + word):
        if all(ctypes.c_void_p.from_address(id(t) + offset).value == t._cdata for t in examples):
            break
    else:
        return None, False
    bump = _address("torch_cpu", _BUMP_VERSION)
    bound = offset, *codes, *map(_pointer, functions), bump
    _tensors.bind(*bound, _address("c10", _GRAD), _address("torch_python", _WRAP))
    for cls in (Tensor, torch.nn.Parameter):
        _tensors.accept(cls)
        _accepted.add(cls)
    examples[1].grad = examples[0][0]
    if not _tensors.same(_tensors.gradients(list(examples[::-1]), Tensor.grad), [examples[1].grad, None]):
        _tensors.bind(*bound, 0, 0)
    return _tensors, bump != 0


def _library(name: str) -> ctypes.CDLL:
    """One of torch's libraries; IndexError or OSError if there is none."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    files = [each for each in os.listdir(folder) if each.split(".")[0].removeprefix("lib") == name]
    return ctypes.CDLL(os.path.join(folder, files[0]))


def _address(library: str, function: str) -> int:
    """The address of a C++ function, which is no part of torch's stable interface; 0 if there is none."""
    try:
        return _pointer(getattr(_library(library), function))
    except (OSError, AttributeError, IndexError):
        return 0


def _pointer(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_accepted: set[type] = set()
_compiled, _bumps = _bind()
