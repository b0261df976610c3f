"""Which runs train together, and in which order the sweep visits them."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from ncollapse.train.config import ALONE, RunConfig
from ncollapse.train.optimizers import TABLE

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The settings that the runs of a stack have in common; in all others they may differ."""

    model: str
    data: str
    limit: int | None
    batch_size: int
    width: int | None = None
    precision: str = "fp32"
    augment: str = "none"
    layers: str = "head"
    muon: bool = False  # whose step is not that of the other rules

    @staticmethod
    def of(run: RunConfig) -> "Shape":
        """The shape of a run."""
        own = {field.name: getattr(run, field.name) for field in dataclasses.fields(Shape) if field.name != "muon"}
        return Shape(**own, muon=TABLE[run.optimizer].own_stack)

    @property
    def most(self) -> int | None:
        """The most runs that train as one program; None: any number."""
        return 1 if self.model in ALONE else None

    def __str__(self) -> str:
        parts = [f"{self.model} on {self.data}", f"batches of {self.batch_size}"]
        others = {
            f"width {self.width}": self.width,
            f"first {self.limit} samples": self.limit,
            self.precision: self.precision != "fp32",
            self.augment: self.augment != "none",
            "all layers": self.layers == "all",
            "muon": self.muon,
        }
        return ", ".join(parts + [text for text, there in others.items() if there])


def by_shape(runs: Iterable[RunConfig]) -> dict[Shape, list[RunConfig]]:
    """The runs of each shape, in order."""
    groups: dict[Shape, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(Shape.of(run), []).append(run)
    return groups


def plan(runs: Iterable[RunConfig], size: Callable[[Shape], int], workers: int = 1) -> list[list[RunConfig]]:
    """Stacks of at most `size(shape)` runs, in an order in which any beginning is a fair sample of the grid.

    Every stack has its share of each optimizer, settings are drawn at random (by the runs' identities: the same way on
    every machine), and models and data sets take turns. Where the runs allow it, the stacks of a shape divide evenly
    among `workers`.
    """
    stacks = []
    for shape, members in by_shape(runs).items():
        ordered = _spread(sorted(members, key=lambda run: run.id), lambda run: run.optimizer)
        count = -(-len(ordered) // size(shape))
        count = min(-(-count // workers) * workers, len(ordered))
        # Even sizes: 13 runs in stacks of at most 12 are 7 and 6.
        bounds = [len(ordered) * i // count for i in range(count + 1)]
        stacks += [ordered[a:b] for a, b in itertools.pairwise(bounds)]
    return _spread(stacks, lambda stack: Shape.of(stack[0]))


def _spread(items: Sequence[T], kind: Callable[[T], Hashable]) -> list[T]:
    """The items with those of each kind evenly spread, in their order."""
    kinds: dict[Hashable, list[T]] = {}
    for item in items:
        kinds.setdefault(kind(item), []).append(item)
    placed = [((i + 0.5) / len(own), item) for own in kinds.values() for i, item in enumerate(own)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]
