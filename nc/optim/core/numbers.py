"""The hyperparameters of an optimizer where the kernels read them: in memory of the parameters' devices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import HYPERS, HyperTable


class Numbers:
    """The numbers `HYPERS` of every param group, on every device.

    Attributes:
        host: `[G, 6]` float64 on the CPU; those that are tensors of the user's are 0 here.
        values: the same for each device; on the CPU the same tensor.
        read: tensors of the user's, read by the kernel, and their places in `values`.
        copied: tensors of the user's on the CPU, for parameters that are elsewhere, and their places.
        codes: for each group, the code of the rule of each of its runs.
    """

    def __init__(self) -> None:
        self.host = torch.empty(0, len(HYPERS), dtype=torch.float64)
        self.values: list[Tensor] = []
        self.read: list[Tensor] = []
        self.read_places: list[int] = []
        self.copied: list[Tensor] = []
        self.copied_places: list[int] = []
        self.codes: list[list[int]] = []
        self._dirty = False

    def fill(
        self, groups: Sequence[dict[str, Hyper]], codes: list[list[int]], devices: Sequence[torch.device]
    ) -> dict[torch.device, HyperTable]:
        """Take the numbers of all groups, and make each device's table of them."""
        self.codes = codes
        rows = [[0.0 if isinstance(n := numbers[name], Tensor) else n for name in HYPERS] for numbers in groups]
        self.host = torch.tensor(rows, dtype=torch.float64).view(-1, len(HYPERS))
        # In the tensors that there are, if they fit: a CUDA graph may have their addresses.
        old = {v.device: v for v in self.values if v.shape == self.host.shape and v.device.type != "cpu"}
        self.values = [old.get(d, self.host.to(d)) if d.type != "cpu" else self.host for d in devices]
        self.flush()
        tensors = [
            (len(HYPERS) * row + column, value)
            for row, numbers in enumerate(groups)
            for column, name in enumerate(HYPERS)
            if isinstance(value := numbers[name], Tensor)
        ]
        read = [(place, t) for place, t in tensors if t.device in devices]
        copied = [(place, t) for place, t in tensors if t.device not in devices]
        self.read, self.read_places = [t for _, t in read], [place for place, _ in read]
        self.copied, self.copied_places = [t for _, t in copied], [place for place, _ in copied]
        return {v.device: HyperTable(v, self.read, self.read_places, codes) for v in self.values}

    def write(self, row: int, numbers: dict[str, Hyper]) -> None:
        """Take a group's plain numbers, on the CPU so far."""
        for column, name in enumerate(HYPERS):
            if not isinstance(number := numbers[name], Tensor):
                self.host[row, column] = number
        self._dirty = True

    def flush(self) -> None:
        """Bring the numbers to the devices, without waiting for them."""
        self._dirty = False
        for values in self.values:
            if values.device.type != "cpu":
                values.copy_(self.host.pin_memory() if values.is_cuda else self.host, non_blocking=True)

    def refresh(self) -> None:
        """Before a step: flush what was written, and tensors on the CPU that were changed in place."""
        flat = self.host.view(-1)
        for place, tensor in zip(self.copied_places, self.copied, strict=True):
            if flat[place] != tensor:
                flat[place] = tensor
                self._dirty = True
        if self._dirty:
            self.flush()
