"""The record of a run, which the training makes and the results folder keeps: what was measured, and how it ended."""

import dataclasses

from ncollapse.train.config import RunConfig

#: Metric name -> one value per run.
Values = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: its status, the first evaluated epoch with NaN or inf, its share of the training time."""

    status: str
    diverged_epoch: int | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The metrics measured after an epoch (0: before the first step).

    Attributes:
        rows: the runs that were evaluated, as indices into the runs of the training.
        values: metric name -> one value for each of `rows`; after `METRICS`, those of the user's.
        layers: block -> metrics of its output, in the order of the blocks; empty unless requested.
        ended: run -> how it ended; such runs are not trained further.
        weights: run -> the bytes that `torch.save` writes for {"config": settings, "state_dict": final weights}, for
            the runs that ended; empty unless requested.
        snapshots: run -> the bytes of its `Snapshot`, at the epochs of `shown_epochs` and at its end.
    """

    epoch: int
    rows: tuple[int, ...]
    values: Values
    layers: dict[str, Values]
    ended: dict[int, Ended]
    weights: dict[int, bytes]
    snapshots: dict[int, bytes] = dataclasses.field(default_factory=dict)


def shown_epochs(run: RunConfig) -> tuple[int, ...]:
    """Return the epochs at which the geometry of a run is kept: the evaluated ones nearest to each quarter of all."""
    every, epochs, shown = run.eval_every, run.epochs, set()
    for quarter in range(5):
        before = epochs * quarter // 4 // every * every
        # Of two that are equally near the earlier one.
        shown.add(min((before, min(before + every, epochs)), key=lambda epoch: abs(4 * epoch - epochs * quarter)))
    return tuple(sorted(shown))
