"""The table with which one kernel launch updates a whole model: a row of addresses per parameter, or per run of one.

A launch reads three int64 tensors on the device of the parameters:

- `tensors [rows, len(Col)]`: per parameter or run, the columns `Col`; addresses in bytes; a row without a gradient is
  skipped;
- `chunks [N, 2]`: per program, its row of `tensors` and the element it starts at;
- `hypers [sets, HYPER_COLUMNS]`: per set of hyperparameters, the addresses of its numbers `HYPERS`, a bit mask of those
  that are float64 (the others are float32), and the code of its rule.

A captured step has a table of its own. Its addresses are known only during the capture, when nothing may be copied to
the device but by the graph itself, in every replay. So the host writes the table into pinned memory, which a GPU can
read, and the kernel takes from there what is `UNFILLED` in `tensors`: all in the first replay, nothing later.

Kernels read numbers through addresses, so that a captured CUDA graph or a compiled step sees a learning rate that a
schedule writes later. Columns, flags and numbers are defined here; the Triton kernel imports them, and `cpu.py`
compares them with those compiled into the C++ kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncollapse.kernels.update.graph_memory import free_ended
from ncollapse.kernels.update.reference import RULES, Hyper, Settings, Slot, compute_dtype, declared

Rows = npt.NDArray[np.int64]

#: The numbers of a set of hyperparameters: the first columns of `hypers`.
HYPERS = ("lr", "weight_decay", "coupling", "beta1", "beta2", "eps")
#: The other columns: the bit mask of float64 numbers, and the code.
WIDE, CODE, HYPER_COLUMNS = len(HYPERS), len(HYPERS) + 1, len(HYPERS) + 2
#: A code is a rule's number plus flags.
RULE_MASK, MAXIMIZE, NESTEROV = 255, 256, 512
#: Stands for the rule's number where a launch has several rules and the kernel reads each row's from the table.
MIXED = -1
#: Flags of a row of `tensors`.
ALIGNED, FRESH = 1, 2
# Rules without a kernel have numbers from here on, which no kernel knows.
_NO_KERNEL = 128
#: Stands in `tensors` for an entry that the kernel is yet to read from the host's memory; no entry has this value.
UNFILLED = -1
#: Whether the first replay of a captured step fills its table (not measured yet); else a copy from the host within the
#: graph does, in every replay (8 to 9 µs, measured).
FILLED_ONCE = True
# Memory for the tables of captured steps is allocated before the capture: that of so many steps at least.
_SPARES = 32


class Col(IntEnum):
    """Columns of the table `tensors`."""

    PARAM, GRAD, FIRST, SECOND, STEP, COPY = range(6)  # addresses
    NUMEL, HYPER, FLAGS, RUN = range(6, 10)


def _rule_number(rule: str) -> int:
    kernel = declared(rule).kernel
    return _NO_KERNEL + list(RULES).index(rule) if kernel is None else kernel


def code(rule: str, *, maximize: bool = False, nesterov: bool = False) -> int:
    """A rule of `RULES` and its flags as one number."""
    return _rule_number(rule) | MAXIMIZE * maximize | NESTEROV * nesterov


class Tensors(NamedTuple):
    """The tensors of a step in parallel lists, in the order of `Col`; a list is empty where no parameter has one."""

    params: list[Any]  # W, on any devices, of any floating dtypes and layouts
    grads: list[Any]  # ∇L, of the same shapes; None: the parameter takes no step
    firsts: list[Any]
    seconds: list[Any]
    steps: list[Any]
    copies: list[Any]


def numbers_device(device: torch.device) -> torch.device:
    """Where the hyperparameters of a device's parameters are: on it if a kernel reads them there, else on the CPU.

    The reference takes them one by one, and the device may not have float64.
    """
    return device if device.type == "cuda" else torch.device("cpu")


class HyperTable:
    """G sets of hyperparameters on one device, each for one run or for R stacked runs.

    Args:
        values: `[G, len(HYPERS)]` float64 on the `numbers_device`; a number that is not in `live` is read from here.
        live: tensors, float32 or float64, on the device, 0-d or `[R]`, read at every step.
        slots: for each of `live`, the index of the number that it replaces in the flattened `values`.
        codes: for each set, the `code` of each run: R numbers.
    """

    def __init__(
        self, values: Tensor, live: Sequence[Tensor], slots: Sequence[int], codes: Sequence[Sequence[int]]
    ) -> None:
        self.values, self.codes = values, codes
        self.live = dict(zip(slots, live, strict=True))
        runs = np.array([len(c) for c in codes], dtype=np.int64)
        #: The first row of each set.
        self.base = np.concatenate([[0], np.cumsum(runs)])
        names = {_rule_number(name): name for name in RULES}
        #: For each set, the rule of each run.
        self.names = [[names[c & RULE_MASK] for c in row] for row in codes]
        numbers = {c & RULE_MASK for row in codes for c in row}
        self.rule = numbers.pop() if len(numbers) == 1 else MIXED
        width = len(HYPERS)
        addresses = values.data_ptr() + 8 * np.arange(width * len(codes)).reshape(-1, width)
        rows = np.zeros((int(self.base[-1]), HYPER_COLUMNS), dtype=np.int64)
        rows[:, :width] = np.repeat(addresses, runs, axis=0)
        rows[:, WIDE] = (1 << width) - 1
        for slot, tensor in self.live.items():
            group, column = divmod(slot, width)
            where = slice(self.base[group], self.base[group + 1])
            stride = tensor.stride(0) * tensor.itemsize if tensor.dim() else 0
            rows[where, column] = tensor.data_ptr() + stride * np.arange(runs[group])
            if tensor.dtype == torch.float32:
                rows[where, WIDE] &= ~(1 << column)
        rows[:, CODE] = np.concatenate([np.array(c, dtype=np.int64) for c in codes]) if codes else 0
        self.table = upload(rows, values.device)

    def settings(self, group: int) -> Settings:
        """The hyperparameters of a set for the reference; reads the device."""
        numbers: dict[str, Hyper] = dict(zip(HYPERS, self.values[group].tolist(), strict=True))
        width = len(HYPERS)
        numbers |= {HYPERS[slot % width]: tensor for slot, tensor in self.live.items() if slot // width == group}
        flags = self.codes[group][0]
        return Settings(**numbers, nesterov=bool(flags & NESTEROV), maximize=bool(flags & MAXIMIZE))

    def rules(self, group: int) -> str | list[str]:
        """The rule of a set; of each of its runs if they differ, or if only a function for one run knows it."""
        names = self.names[group]
        apart = len(set(names)) > 1 or declared(names[0]).kernel is None
        return names if len(names) > 1 and apart else names[0]


@dataclass
class Extras:
    """What a step computes beside the update, in the same pass; on one device, allocated by the caller.

    Attributes:
        copies: for each parameter, a bfloat16 tensor of its layout for a copy of the new weights, or None.
        norms: `[R, 2]` float64, for the squared norms of the unscaled gradients and of the change of the weights; NaN
            after a step that was skipped.
        add: whether to add the norms to the values already there.
    """

    copies: Sequence[Tensor | None] = ()
    norms: Tensor | None = None
    add: bool = False


def dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one range of memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, and strides that differ at most where a dimension has size 1."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and all(n <= 1 or s == t for n, s, t in pairs)


@dataclass
class Lists:
    """The tensors of an update beside its gradients, in parallel lists."""

    params: list[Tensor]  # W, on any devices, of any floating dtypes and layouts
    slots: list[Slot]
    sets: list[int]  # for each parameter, the index of its set of hyperparameters
    extras: Extras = field(default_factory=Extras)

    def part(self, indices: list[int], add: bool) -> "Lists":
        """The lists of some of the parameters; `add` as in `Extras`."""
        copies = [self.extras.copies[i] for i in indices] if self.extras.copies else ()
        extras = Extras(copies, self.extras.norms, add)
        return Lists(
            [self.params[i] for i in indices], [self.slots[i] for i in indices], [self.sets[i] for i in indices], extras
        )

    def fits(self, i: int, runs: int) -> bool:
        """Whether parameter i, its states and copy are dense and alike in memory, as the kernels need."""
        param, slot = self.params[i], self.slots[i]
        copy = self.extras.copies[i] if self.extras.copies else None
        alike = all(same_layout(param, t) for t in (slot.first, slot.second, copy) if t is not None)
        typed = all(t.dtype == compute_dtype(param) for t in (slot.first, slot.second) if t is not None)
        typed &= slot.step is None or (slot.step.dtype == torch.float32 and slot.step.numel() == 1)
        typed &= copy is None or copy.dtype == torch.bfloat16
        # Runs must be contiguous in memory.
        split = runs == 1 or param.numel() == 0 or param.stride(0) == param.numel() // runs
        return dense(param) and split and alike and typed


class Table:
    """`tensors` and `chunks` for one launch: parameters of one device and dtype, gradients of one dtype.

    Args:
        lists: the parameters, one or more; each must fit (`Lists.fits`).
        grad: the dtype of their gradients.
        hypers: their hyperparameters.
        chunk: elements per program.
    """

    def __init__(self, lists: Lists, grad: torch.dtype, hypers: HyperTable, chunk: int) -> None:
        # Keep addresses, not tensors: a table must not keep a model alive.
        first, extras = lists.params[0], lists.extras
        self.param, self.grad, self.hypers = first.dtype, grad, hypers
        self.device, self.norms, self.add = first.device, extras.norms, extras.add
        self.has_copies = any(copy is not None for copy in extras.copies)
        runs = np.array([len(hypers.codes[s]) for s in lists.sets], dtype=np.int64)
        # One row per parameter, or per run of a stacked parameter: the index of its parameter, and its run.
        self._param = np.repeat(np.arange(len(runs)), runs)
        run = np.concatenate([np.arange(r) for r in runs])
        numel = np.array([p.numel() for p in lists.params], dtype=np.int64)[self._param] // runs[self._param]
        rows = np.zeros((len(numel), len(Col)), dtype=np.int64)
        rows[:, Col.NUMEL] = numel
        rows[:, Col.HYPER] = hypers.base[np.array(lists.sets)][self._param] + run
        rows[:, Col.FLAGS] = FRESH * np.array([s.fresh for s in lists.slots], dtype=np.int64)[self._param]
        rows[:, Col.RUN] = run
        self._rows = rows
        state = compute_dtype(first).itemsize
        offsets = (numel * run) * np.array([first.itemsize, grad.itemsize, state, state, 0, 2])[:, None]
        self._offsets = offsets if runs.max() > 1 else None
        self.elements = int(numel.sum())
        chunks = _cut(numel, chunk)
        self.programs = len(chunks)
        self.chunks = upload(chunks, self.device)
        self.counts_steps = any(s.step is not None for s in lists.slots)
        #: `tensors`, and where the kernel finds what is `UNFILLED` in it. `point` replaces both.
        self.tensors = self.source = self.chunks
        # For captured steps: tables on the device, unfilled, and in pinned memory.
        self._spares: list[tuple[Tensor, Tensor]] = []

    def point(self, addresses: Rows) -> None:
        """Fill `tensors` with the addresses `[NUMEL, parameters]` of the parameters' tensors; 0 for those they lack.

        A parameter whose gradient is missing takes no step.
        """
        rows = self._rows.copy()
        if self._offsets is not None:
            addresses = addresses[:, self._param]
            addresses = np.where(addresses != 0, addresses + self._offsets, 0)
        rows[:, : Col.NUMEL] = addresses.T
        together = np.bitwise_or.reduce(addresses[[Col.PARAM, Col.GRAD, Col.FIRST, Col.SECOND, Col.COPY]])
        rows[:, Col.FLAGS] |= np.where(together % 16 == 0, ALIGNED, 0)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.tensors, self.source = self._captured(rows)
        else:
            self.tensors = self.source = upload(rows, self.device)
            if self.device.type == "cuda":
                self._allocate_spares(rows)

    def _captured(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The table of a captured step, and its source. Both must live as long as the graph."""
        if not self._spares:
            raise RuntimeError(
                f"after a step outside of a CUDA graph, at least {_SPARES} optimizer steps can be captured; "
                "take another step outside of a graph before capturing more"
            )
        unfilled, pinned = self._spares.pop()
        pinned.copy_(torch.from_numpy(rows))
        if FILLED_ONCE:
            return unfilled, pinned
        return torch.empty_like(unfilled).copy_(pinned, non_blocking=True), pinned

    def _allocate_spares(self, rows: Rows) -> None:
        if len(self._spares) < _SPARES:
            free_ended()
            shape = _SPARES, *rows.shape
            # Not of the graph's own pool: a replay would write other things there before.
            unfilled = torch.full(shape, UNFILLED, dtype=torch.int64, device=self.device)
            pinned = torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)
            self._spares += zip(unfilled.unbind(), pinned.unbind(), strict=True)


def _cut(spans: Rows, size: int) -> Rows:
    """Cut spans of elements into chunks of at most `size`: `[N, 2]`, index of the span and first element."""
    counts = -(-spans // size)
    counts[0] = max(counts[0], 1)  # steps are counted even where every parameter is empty
    span = np.repeat(np.arange(len(spans)), counts)
    nth = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([span, nth * size], axis=1)


def upload(rows: Rows, device: torch.device) -> Tensor:
    """Copy an int64 array to a device without synchronising."""
    host = torch.from_numpy(np.ascontiguousarray(rows))
    if device.type != "cuda":
        return host.to(device)
    return torch.empty_like(host, device=device).copy_(host.pin_memory(), non_blocking=True)
