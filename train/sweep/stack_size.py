"""How a sweep is trained: the size of its stacks, and how many of them side by side, by measurement."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ncollapse.train.config import RunConfig
from ncollapse.train.sweep.grouping import Shape, by_shape

if TYPE_CHECKING:  # `ncollapse status` reads choices, and must not wait for torch
    from ncollapse.train.sweep.throughput import Facts

#: Runs per stack where there is too little work to measure. On a CPU linear layers gain the more the larger the stack,
#: convolutions up to a few runs (`bench/NOTES.md`).
_USUAL = {"mlp": 32, "cnn": 4}
#: A larger stack has to be this much faster, since a failure costs the stacks that are in flight.
_FASTER = 1.03

#: Training steps a second, of all processes and runs, with stacks of a size; None where that does not fit in memory.
Measure = Callable[[Shape, "Facts", int], float | None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a sweep is trained, and what that was chosen by.

    Attributes:
        workers: stacks that train side by side.
        threads: of each of them.
        sizes: runs in a stack, at most.
        rates: training steps a second of all runs together; missing where it was not measured.
        measured: every measurement.
        per_gpu: stacks that share each GPU of a cluster.
    """

    workers: int
    threads: int
    sizes: dict[Shape, int]
    rates: dict[Shape, float] = dataclasses.field(default_factory=dict)
    measured: tuple[dict[str, Any], ...] = ()
    per_gpu: int = 1

    def as_dict(self) -> dict[str, Any]:
        """What the store keeps."""
        sizes = [
            {**dataclasses.asdict(shape), "size": size, "steps_per_second": self.rates.get(shape)}
            for shape, size in self.sizes.items()
        ]
        return {
            "workers": self.workers,
            "threads": self.threads,
            "per_gpu": self.per_gpu,
            "stacks": sizes,
            "measured": list(self.measured),
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Choice":
        """The choice that the store has kept."""
        sizes, rates = {}, {}
        for stack in kept["stacks"]:
            shape = Shape(**{field.name: stack[field.name] for field in dataclasses.fields(Shape)})
            sizes[shape] = stack["size"]
            if stack["steps_per_second"] is not None:
                rates[shape] = stack["steps_per_second"]
        return cls(kept["workers"], kept["threads"], sizes, rates, tuple(kept["measured"]), kept.get("per_gpu", 1))

    def describe(self) -> Iterator[str]:
        """What to tell the user, a line for each shape."""
        workers = "one process" if self.workers == 1 else f"{self.workers} processes"
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        if self.per_gpu > 1:
            threads += f", {self.per_gpu} on each GPU"
        for shape, size in self.sizes.items():
            stacks = "one run at a time" if size == 1 else f"stacks of up to {size} runs"
            measured = f" (measured: {self.rates[shape]:,.0f} training steps/s)" if shape in self.rates else ""
            yield f"{shape}: {stacks} in {workers} with {threads}{measured}"


@dataclasses.dataclass(frozen=True)
class Work:
    """Runs that are to be trained.

    Attributes:
        stack: runs per stack if the user says so, else "auto".
        facts: of each data set.
    """

    runs: Sequence[RunConfig]
    facts: Mapping[str, "Facts"]
    stack: int | str

    @property
    def shapes(self) -> dict[Shape, list[RunConfig]]:
        """The runs of each shape."""
        return by_shape(self.runs)

    def seconds(self, rates: Mapping[Shape, float]) -> float:
        """What all training steps take at these rates; infinite where one is missing."""
        total = 0.0
        for shape, own in self.shapes.items():
            samples = self.facts[shape.data].samples_of(shape)
            steps = sum(run.epochs * run.steps_per_epoch(samples) for run in own)
            total += steps / rates[shape] if rates.get(shape) else math.inf
        return total

    def unmeasured(self, threads: int, room: Mapping[Shape, int]) -> Choice:
        """One stack at a time, as large as is usual for the model, or as the user says.

        Args:
            room: how many runs fit in memory.
        """
        sizes = {}
        for shape, own in self.shapes.items():
            usual = self.stack if isinstance(self.stack, int) else _USUAL.get(shape.model, 1)
            sizes[shape] = min(usual, room[shape], shape.most or len(own), len(own))
        return Choice(1, threads, sizes)

    def measured(self, measure: Measure, workers: int, threads: int, room: Mapping[Shape, int]) -> Choice:
        """The best size for each shape with so many stacks side by side: stacks grow as long as that pays.

        Args:
            room: how many runs fit in memory.
        """
        sizes: dict[Shape, int] = {}
        rates: dict[Shape, float] = {}
        measured = []
        for shape, own in self.shapes.items():
            most = max(1, min(room[shape], shape.most or len(own), -(-len(own) // workers)))
            # Where even that does not fit by the measurement, training tries, says so and halves it.
            sizes[shape] = min(self.stack, most) if isinstance(self.stack, int) else 1
            tried = set()
            for step in (4, 2):  # growing in large steps first, then looking about in small ones
                for size in self._candidates(sizes[shape], most, step):
                    if size in tried:
                        continue
                    tried.add(size)
                    rate = measure(shape, self.facts[shape.data], size)
                    one = {"workers": workers, "threads": threads, "size": size, "steps_per_second": rate}
                    measured.append({"shape": str(shape), **one})
                    if rate is None:
                        break
                    better = _FASTER if size > sizes[shape] else 1 / _FASTER
                    if shape not in rates or rate > better * rates[shape]:
                        sizes[shape], rates[shape] = size, rate
                    elif step == 4:
                        break
        return Choice(workers, threads, sizes, rates, tuple(measured))

    def _candidates(self, best: int, most: int, step: int) -> list[int]:
        if isinstance(self.stack, int):
            return [min(self.stack, most)]
        if step == 2:
            return [size for size in (max(1, best // 2), min(2 * best, most)) if size != best]
        sizes = [1]
        while sizes[-1] * step < most:
            sizes.append(sizes[-1] * step)
        return sizes if sizes[-1] == most else [*sizes, most]
