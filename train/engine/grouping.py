"""Which runs train together in a stack, and in which order the sweep visits the stacks."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ncollapse.optimizer_table import TABLE, row_of
from ncollapse.train.config import RunConfig, is_own

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
#: The family of optimizers that are not ncollapse's: each run has its own object.
_OWN = "own"


@dataclasses.dataclass(frozen=True)
class StackKey:
    """The settings that all runs of a stack have in common; they may differ in all others."""

    model: str
    data: str  # with its options and its border: `RunConfig.data_key`
    limit: int | None
    batch_size: int
    width: int | None = None
    precision: str = "fp32"
    augment: str = "none"
    layers: str = "head"
    own_family: str | None = None  # of the optimizers, if this family trains in stacks of its own; "own": not ours
    model_options: str = ""
    head: str = ""
    loss: str = "cross_entropy"
    loss_options: str = ""
    label_smoothing: float = 0.0

    @staticmethod
    def of(run: RunConfig) -> "StackKey":
        """Return the key of a run."""
        row = row_of(run.optimizer)
        settings = {name: getattr(run, name) for name in _FIELDS if name not in ("own_family", "data")}
        family = _OWN if row.foreign else row.family if row.own_stack else None
        return StackKey(**settings, data=run.data_key, own_family=family)

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "StackKey":
        """Return the key that a store has kept; fields that it lacks have their defaults, unknown ones are ignored."""
        settings = {name: stored[name] for name in _FIELDS if name in stored}
        if "own_family" not in stored:  # format 3 has a flag named after the family instead
            flags = [row.family for row in TABLE.values() if row.own_stack and stored.get(row.family)]
            settings["own_family"] = flags[0] if flags else None
        return StackKey(**settings)

    @property
    def foreign(self) -> bool:
        """Whether the optimizers are not ncollapse's."""
        return self.own_family == _OWN

    @property
    def needs_runs(self) -> bool:
        """Whether a step can only be made of the settings of actual runs: of optimizers or a loss of the user's."""
        return self.foreign or is_own("loss", self.loss)

    def __str__(self) -> str:
        parts = [
            f"{self.model} {self.model_options}".rstrip() + f" on {self.data}",
            f"batches of {self.batch_size}",
            f"width {self.width}" if self.width else "",
            f"first {self.limit} samples" if self.limit else "",
            self.precision if self.precision != "fp32" else "",
            self.augment if self.augment != "none" else "",
            "all layers" if self.layers == "all" else "",
            f"{self.loss} {self.loss_options}".rstrip() if self.loss != "cross_entropy" else "",
            f"label smoothing {self.label_smoothing:g}" if self.label_smoothing else "",
            "optimizers of their own" if self.foreign else self.own_family or "",
        ]
        return ", ".join(filter(None, parts))


_FIELDS = tuple(field.name for field in dataclasses.fields(StackKey))


def group(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group items by a key, in order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def make_stacks(runs: Iterable[RunConfig], size: Callable[[StackKey], int], workers: int = 1) -> list[list[RunConfig]]:
    """Divide runs into stacks of at most `size(key)`, ordered so that any first part is a fair sample of the grid.

    Every stack has its share of each optimizer, settings are in random order (that of the runs' ids: the same on every
    machine), and models and data sets alternate. Where there are enough runs, the number of stacks of each key is a
    multiple of `workers`.
    """
    stacks = []
    for key, members in group(runs, StackKey.of).items():
        ordered = _spread(sorted(members, key=lambda run: run.id), lambda run: run.optimizer)
        count = -(-len(ordered) // size(key))
        count = min(-(-count // workers) * workers, len(ordered))
        # Even sizes: 13 runs in stacks of at most 12 are 7 and 6.
        bounds = [len(ordered) * i // count for i in range(count + 1)]
        stacks += [ordered[a:b] for a, b in itertools.pairwise(bounds)]
    return _spread(stacks, lambda stack: StackKey.of(stack[0]))


def _spread(items: Sequence[T], kind: Callable[[T], Hashable]) -> list[T]:
    """Reorder items so that those of each kind are evenly spread; within a kind they keep their order."""
    placed = [((i + 0.5) / len(alike), item) for alike in group(items, kind).values() for i, item in enumerate(alike)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]
