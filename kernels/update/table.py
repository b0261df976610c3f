"""The table that lets one kernel launch update a whole model: a row of addresses for every parameter (or run of one).

A launch reads, all int64 and on the device of the parameters:

- `tensors [rows, 12]`: what a row of the enum `Col` names, addresses in bytes;
- `chunks [N, 2]`: for each program, the row it works on and the element it starts at;
- `hypers [sets, 8]`: the addresses of the six numbers of a set of hyperparameters (`HYPERS`), a bit for each that says
  whether it is float64 (else float32), and the code of the rule with its flags.

Numbers are read through addresses, so that a captured CUDA graph or a compiled step sees a learning rate that a
schedule has written since.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ncollapse.kernels.update.reference import RULES, Hyper, Settings, Slot, compute_dtype

Rows = npt.NDArray[np.int64]

#: The numbers of a set of hyperparameters, in the order of the table.
HYPERS = ("lr", "weight_decay", "coupling", "beta1", "beta2", "eps")
_RULE_NUMBER = {name: i for i, name in enumerate(RULES)}
NEED_FIRST = {_RULE_NUMBER["adam"], _RULE_NUMBER["lion"]}  # rules that cannot do without
NEED_SECOND = {_RULE_NUMBER["adam"]}
MIXED = len(RULES)  # in place of a rule's number: it stands in the table
MAXIMIZE, NESTEROV = 256, 512  # flags beside a rule's number
ALIGNED, FRESH = 1, 2  # flags of a row
#: Steps that can at least be captured in CUDA graphs after one outside of them: each keeps its table for replays.
_SPARES = 32


class Col(IntEnum):
    """Columns of the table `tensors`."""

    PARAM = 0
    GRAD = 1
    FIRST = 2
    SECOND = 3
    STEP = 4
    COPY = 5
    NUMEL = 6
    HYPER = 7
    FLAGS = 8
    RUN = 9
    PITCH = 10  # 0, or the length of the rows that are summed
    SUMS = 11  # where the row sum goes


def code(rule: str, *, maximize: bool = False, nesterov: bool = False) -> int:
    """A rule and its flags as one number."""
    return _RULE_NUMBER[rule] | MAXIMIZE * maximize | NESTEROV * nesterov


class HyperTable:
    """G sets of hyperparameters on one device, each for one run or for R stacked runs.

    Args:
        values: `[G, 6]` float64 on the device; a number that is not in `live` is read from here.
        live: tensors, float32 or float64, on the device, 0-d or `[R]`, read at every step.
        slots: for each of `live`, its place in `values`: `6·g + column`.
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
        numbers = {c & 255 for row in codes for c in row}
        self.rule = numbers.pop() if len(numbers) == 1 else MIXED
        own = values.data_ptr() + 8 * np.arange(6 * len(codes)).reshape(-1, 6)
        rows = np.zeros((int(self.base[-1]), 8), dtype=np.int64)
        rows[:, :6] = np.repeat(own, runs, axis=0)
        rows[:, 6] = 0b111111
        for slot, tensor in self.live.items():
            group, column = divmod(slot, 6)
            where = slice(self.base[group], self.base[group + 1])
            stride = tensor.stride(0) * tensor.itemsize if tensor.dim() else 0
            rows[where, column] = tensor.data_ptr() + stride * np.arange(runs[group])
            if tensor.dtype == torch.float32:
                rows[where, 6] &= ~(1 << column)
        rows[:, 7] = np.concatenate([np.array(c, dtype=np.int64) for c in codes]) if codes else 0
        self.table = upload(rows, values.device)

    def settings(self, group: int) -> Settings:
        """The hyperparameters of a set for the reference; reads the device."""
        numbers: dict[str, Hyper] = dict(zip(HYPERS, self.values[group].tolist(), strict=True))
        numbers |= {HYPERS[slot % 6]: tensor for slot, tensor in self.live.items() if slot // 6 == group}
        flags = self.codes[group][0]
        return Settings(**numbers, nesterov=bool(flags & NESTEROV), maximize=bool(flags & MAXIMIZE))

    def rules(self, group: int) -> str | list[str]:
        """The rule of a set, or of each of its runs if they differ."""
        names = [list(RULES)[c & 255] for c in self.codes[group]]
        return names if len(set(names)) > 1 else names[0]


@dataclass
class Extras:
    """What a step can give beside the update, without a pass of its own. All on one device, allocated by the caller.

    Attributes:
        copies: for each parameter, a bfloat16 tensor of its layout that takes a copy of the new weights, or None.
        norms: `[R, 2]` float64; takes the squared norms of the gradients (unscaled) and of the change of the weights.
        add: the norms are added to what is there.
        head: which parameter is the classifier `[K, d]` (or `[R, K, d]`), whose row sum Wᵀ1 is wanted; -1 for none.
        row_sum: `[R, d]` float64.
    """

    copies: Sequence[Tensor | None] = ()
    norms: Tensor | None = None
    add: bool = False
    head: int = -1
    row_sum: Tensor | None = None

    @property
    def has_copies(self) -> bool:
        return any(copy is not None for copy in self.copies)


def dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one range of memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i in memory of one is element i of the other: equal strides, where a stride means anything."""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and all(n <= 1 or s == t for n, s, t in pairs)


@dataclass
class Lists:
    """The tensors of an update beside its gradients, in parallel lists.

    Attributes:
        params: W, on any devices, of any floating dtypes and layouts.
        slots: their states.
        sets: for each parameter, its set of hyperparameters.
        extras: what else a step gives.
    """

    params: list[Tensor]
    slots: list[Slot]
    sets: list[int]
    extras: Extras = field(default_factory=Extras)

    def part(self, indices: list[int], add: bool) -> "Lists":
        """Some of the parameters, with what belongs to them; `add` as in `Extras`."""
        extras = self.extras
        head = indices.index(extras.head) if extras.head in indices else -1
        extras = replace(
            extras,
            copies=[extras.copies[i] for i in indices] if extras.copies else (),
            add=add,
            head=head,
            row_sum=extras.row_sum if head >= 0 else None,
        )
        return Lists(
            [self.params[i] for i in indices], [self.slots[i] for i in indices], [self.sets[i] for i in indices], extras
        )

    def fits(self, i: int, grad: Tensor, runs: int) -> bool:
        """Whether a kernel can walk parameter i and all that belongs to it by memory address."""
        param, slot = self.params[i], self.slots[i]
        copy = self.extras.copies[i] if self.extras.copies else None
        state = [t for t in (slot.first, slot.second) if t is not None]
        # Runs must come one after the other in memory, and so must the rows of a classifier.
        split = runs == 1 or param.numel() == 0 or param.stride(0) == param.numel() // runs
        rows = i != self.extras.head or param.is_contiguous()
        others = [grad, *state] if copy is None else [grad, *state, copy]
        return (
            dense(param)
            and split
            and rows
            and all(same_layout(param, t) for t in others)
            and all(t.dtype == compute_dtype(param) for t in state)
        )


class Table:
    """`tensors` and `chunks` for one launch: parameters of one device and dtype, gradients of one dtype.

    Args:
        lists: the parameters, one or more; each must fit (`Lists.fits`).
        grad: the dtype of their gradients.
        hypers: their hyperparameters.
        block: elements that a program takes at a time.
        chunk: elements that a program takes in all, a multiple of block.
    """

    def __init__(self, lists: Lists, grad: torch.dtype, hypers: HyperTable, block: int, chunk: int) -> None:
        # Addresses are kept, tensors are not: a table must not keep a model alive.
        first, extras = lists.params[0], lists.extras
        self.param, self.grad, self.hypers = first.dtype, grad, hypers
        self.norms, self.add, self.row_sum, self.has_copies = (
            extras.norms,
            extras.add,
            extras.row_sum,
            extras.has_copies,
        )
        self.device = first.device
        runs = np.array([len(hypers.codes[s]) for s in lists.sets], dtype=np.int64)
        # A row for each parameter, and of a stacked one for each run.
        self._of = np.repeat(np.arange(len(runs)), runs)
        run = np.concatenate([np.arange(r) for r in runs])
        numel = np.array([p.numel() for p in lists.params], dtype=np.int64)[self._of] // runs[self._of]
        rows = np.zeros((len(numel), 12), dtype=np.int64)
        rows[:, Col.NUMEL] = numel
        rows[:, Col.HYPER] = hypers.base[np.array(lists.sets)][self._of] + run
        rows[:, Col.FLAGS] = FRESH * np.array([s.fresh for s in lists.slots], dtype=np.int64)[self._of]
        rows[:, Col.RUN] = run
        spans = numel.copy()
        if extras.row_sum is not None:
            head = self._of == extras.head
            pitch = lists.params[extras.head].shape[-1]
            rows[head, Col.PITCH] = pitch
            rows[head, Col.SUMS] = extras.row_sum.data_ptr() + 8 * pitch * run[head]
            spans[head] = pitch
        self._rows = rows
        state = compute_dtype(first).itemsize
        self._offsets = (numel * run)[:, None] * np.array([first.itemsize, grad.itemsize, state, state, 0, 2])
        copies = extras.copies or [None] * len(lists.params)
        self._fixed = np.array(
            [
                (0, 0, _address(s.first), _address(s.second), _address(s.step), _address(c))
                for s, c in zip(lists.slots, copies, strict=True)
            ],
            dtype=np.int64,
        )
        self.elements = int(numel.sum())
        chunks = _cut(spans, np.where(rows[:, Col.PITCH] > 0, block, chunk))
        self.programs = len(chunks)
        self.chunks = upload(chunks, self.device)
        # The counts of steps, each once: runs of a parameter share theirs.
        steps = [s.step.data_ptr() for s in lists.slots if s.step is not None]
        self.counts = len(steps)
        self.steps = upload(np.array(steps or [0]), self.device)
        self.tensors = self.steps  # until `point`
        self._spares: list[Tensor] = []
        self._captured: list[Tensor] = []

    def point(self, params: list[int], grads: list[int]) -> None:
        """Make `tensors` for these addresses."""
        pointers = self._fixed.copy()
        pointers[:, Col.PARAM], pointers[:, Col.GRAD] = params, grads
        pointers = pointers[self._of]
        rows = self._rows.copy()
        rows[:, :6] = np.where(pointers != 0, pointers + self._offsets, 0)
        vectors = rows[:, [Col.PARAM, Col.GRAD, Col.FIRST, Col.SECOND, Col.COPY]]
        pitch = rows[:, Col.PITCH] * 2  # the smallest element
        aligned = (vectors % 16 == 0).all(axis=1) & (pitch % 16 == 0)
        rows[:, Col.FLAGS] |= np.where(aligned, ALIGNED, 0)
        self.tensors = self._upload(rows)

    def _upload(self, rows: Rows) -> Tensor:
        if self.device.type != "cuda":
            return upload(rows, self.device)
        if not torch.cuda.is_current_stream_capturing():
            # Pinned memory cannot be allocated during a capture: keep some for the graphs to come.
            if len(self._spares) < _SPARES:
                self._spares += torch.empty(_SPARES, *rows.shape, dtype=torch.int64, pin_memory=True).unbind()
            return upload(rows, self.device)
        if not self._spares:
            raise RuntimeError(
                f"only so many optimizer steps, at least {_SPARES}, can be captured in CUDA graphs one after the "
                "other; take one outside of them before the next is captured"
            )
        # A replay copies the table again, so that its source must stay as it is.
        self._captured.append(self._spares.pop())
        return upload(rows, self.device, self._captured[-1])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cut(spans: Rows, sizes: Rows) -> Rows:
    """Spans of elements cut into chunks of at most the given sizes: `[N, 2]`, which span and where in it."""
    counts = -(-spans // sizes)
    counts[0] = max(counts[0], 1)  # steps are counted even where every parameter is empty
    which = np.repeat(np.arange(len(spans)), counts)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([which, nth * sizes[which]], axis=1)


def upload(rows: Rows, device: torch.device, pinned: Tensor | None = None) -> Tensor:
    """An int64 array on a device, without waiting for it; through `pinned`, which is not read before, if given."""
    host = torch.from_numpy(np.ascontiguousarray(rows))
    if device.type != "cuda":
        return host.to(device)
    source = host.pin_memory() if pinned is None else pinned.copy_(host)
    return torch.empty_like(host, device=device).copy_(source, non_blocking=True)
