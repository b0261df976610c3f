"""Results folders for the tests of the claims: runs that never trained, with the metrics that a test gives them.

planted_runs(folder, {run: {"nc3": 0.2, "nc0": [1.8, 0.9, 0.1]} for run in product(optimizer=["sgd", "sgdw"])})
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ncollapse.train.config import RunConfig
from ncollapse.train.grid import Grid
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.record import Ended, Evaluation
from ncollapse.train.results.writer import Store

#: What every run has before the first step, and at its end where a test says nothing else.
START = dict.fromkeys(METRICS, 1.0) | {"nc0": 1.8, "train_accuracy": 0.1, "val_accuracy": 0.1, "degenerate": 0.0}
END = START | {"train_accuracy": 1.0, "val_accuracy": 0.98, "train_loss": 0.01, "nc4": 0.0}


def product(**axes: Any) -> list[RunConfig]:
    """Return the product of these settings, of 100 epochs unless they say so; what is no list counts as one value."""
    lists = [value if isinstance(value, list) else [value] for value in axes.values()]
    return [RunConfig(**{"epochs": 100} | dict(zip(axes, values, strict=True))) for values in itertools.product(*lists)]


def planted_runs(
    folder: Path, runs: Mapping[RunConfig, Mapping[str, float | Sequence[float]]], *,
    status: Mapping[RunConfig, str] | None = None, train_samples: int = 1000, name: str = "planted",
) -> Path:  # fmt: skip
    """Write a results folder and return it.

    Args:
        runs: each run's metrics: a number, its value at the end; or values at evenly spaced epochs from 0 to the last.
            Metrics that are not given are those of `START` and `END`.
        status: of runs that did not end as "done".
        name: of the grid.
    """
    status = status or {}
    with Store(folder, Grid(name, tuple(runs))) as store:
        stacks: dict[tuple[int, tuple[int, ...]], list[RunConfig]] = {}
        for run, metrics in runs.items():
            stacks.setdefault((run.epochs, _epochs(run, metrics)), []).append(run)
        store.set_plan(list(stacks.values()))
        session = store.begin_session("ncollapse sweep planted", {"device": "cpu"})
        for stack in store.stacks():
            store.begin(stack, session, train_samples, resume=False)
            epochs = _epochs(stack.runs[0], runs[stack.runs[0]])
            for i, epoch in enumerate(epochs):
                values = {metric: [_at(runs[run].get(metric), metric, i, len(epochs)) for run in stack.runs]
                          for metric in METRICS}  # fmt: skip
                ended = {}
                if i == len(epochs) - 1:
                    ends = [status.get(run, "done") for run in stack.runs]
                    ended = {j: Ended(end, epoch if end == "diverged" else None, 1.0) for j, end in enumerate(ends)}
                store.record(stack, Evaluation(epoch, tuple(range(len(stack.runs))), values, {}, ended, {}))
    return folder


def _epochs(run: RunConfig, metrics: Mapping[str, float | Sequence[float]]) -> tuple[int, ...]:
    """Return the evaluated epochs: as many as the longest list of values has."""
    most = max([2, *(len(value) for value in metrics.values() if isinstance(value, Sequence))])
    return tuple(round(run.epochs * i / (most - 1)) for i in range(most))


def _at(value: float | Sequence[float] | None, metric: str, i: int, n: int) -> float:
    """Return the value of a metric at evaluation i of n: a single number is reached in equal steps from its start."""
    if isinstance(value, Sequence):
        return float(value[i])
    end = END[metric] if value is None else value
    return float(START[metric]) if i == 0 else float(np.interp(i, [0, n - 1], [START[metric], end]))
