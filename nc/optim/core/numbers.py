"""The hyperparameters of an optimizer where the kernels read them: in memory of the parameters' devices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import HYPERS, numbers_device


@dataclass(frozen=True)
class HyperSet:
    """The hyperparameters of a param group, or of one kind of its parameters, as the update kernel takes them.

    Attributes:
        numbers: a value for each name in `HYPERS`.
        codes: for each stacked run, the kernel's code of its rule and flags.
        states: names of the state tensors that the kernel updates.
        counts_steps: whether the kernel counts steps.
    """

    numbers: dict[str, Hyper]
    codes: list[int]
    states: tuple[str, ...] = ()
    counts_steps: bool = False


class Numbers:
    """The numbers `HYPERS` of every set of hyperparameters, on every device.

    Attributes:
        host: `[G, 6]` float64 on the CPU; 0 where the user gave a tensor.
        values: the same on each `numbers_device`; on the CPU the same tensor.
        read: the user's tensors that the kernel reads itself, by their places in `values`.
        copied: the user's CPU tensors, if parameters on other devices need copies in `values`, by their places.
        codes: for each set, the code of each run.
    """

    def __init__(self) -> None:
        self.host = torch.empty(0, len(HYPERS), dtype=torch.float64, device="cpu")
        self.values: list[Tensor] = []
        self.read: dict[int, Tensor] = {}
        self.copied: dict[int, Tensor] = {}
        self.codes: list[list[int]] = []
        self._dirty = False

    def fill(self, sets: Sequence[HyperSet], devices: Sequence[torch.device]) -> None:
        """Take the numbers of all sets, for parameters on these devices."""
        self.codes = [each.codes for each in sets]
        rows = [[0.0 if isinstance(n := each.numbers[name], Tensor) else n for name in HYPERS] for each in sets]
        self.host = torch.tensor(rows, dtype=torch.float64, device="cpu").view(-1, len(HYPERS))
        # Reuse the existing tensors if they fit: a CUDA graph may hold their addresses.
        old = {v.device: v for v in self.values if v.shape == self.host.shape and v.device.type != "cpu"}
        places = dict.fromkeys(map(numbers_device, devices))
        self.values = [old.get(d, self.host.to(d)) if d.type != "cpu" else self.host for d in places]
        self.flush()
        flat = enumerate(each.numbers[name] for each in sets for name in HYPERS)
        tensors = {place: number for place, number in flat if isinstance(number, Tensor)}
        self.read = {k: t for k, t in tensors.items() if numbers_device(t.device) in places and not t.is_meta}
        elsewhere = any(device.type != "cpu" for device in places)
        self.copied = {k: t for k, t in tensors.items() if t.device.type == "cpu" and elsewhere}

    def write(self, row: int, numbers: dict[str, Hyper]) -> None:
        """Take a set's numbers, each of the kind that it was: `flush` sends plain ones to the devices."""
        for column, name in enumerate(HYPERS):
            place = row * len(HYPERS) + column
            if not isinstance(number := numbers[name], Tensor):
                self.host[row, column] = number
                continue
            if self.read.get(place, number) is not number:
                self.read = {**self.read, place: number}  # a CUDA graph keeps what the old dict holds
            if place in self.copied:
                self.copied[place] = number
        self._dirty = True

    def flush(self) -> None:
        """Send the numbers to the devices, without synchronising.

        Raises:
            RuntimeError: a CUDA graph is being captured: its replays would undo what is written after it.
        """
        self._dirty = True
        on_gpu = any(values.is_cuda for values in self.values) and torch.cuda.is_initialized()
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a hyperparameter has been written since the optimizer's last step; take a step before one is captured "
                "in a CUDA graph: each replay would write the numbers of the capture again"
            )
        self._dirty = False
        for values in self.values:
            if values.device.type != "cpu":
                values.copy_(self.host.pin_memory() if values.is_cuda else self.host, non_blocking=True)

    def refresh(self) -> None:
        """Before a step: send the numbers that were written, and CPU tensors that were changed in place."""
        flat = self.host.view(-1)
        for place, tensor in self.copied.items() if self.values else ():  # else no parameter has memory
            if flat[place] != tensor:
                flat[place] = tensor
                self._dirty = True
        if self._dirty:
            self.flush()
