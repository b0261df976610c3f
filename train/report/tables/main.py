"""The tables of the report, as DataFrames: the best run of each optimizer, NC0 over weight decay, what was run."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ncollapse import ufm
from ncollapse.train.config import FIELDS, RunConfig, make_run
from ncollapse.train.optimizers import OPTIMIZERS
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.settings import described
from ncollapse.train.results.schema import FINISHED

CHANGES = ("nc0", "nc1", "nc2", "nc3", "nc3_difference", "nc4")


def run_config(row: "pd.Series[Any]") -> RunConfig:
    """The settings of a row of `load_runs`."""
    values: dict[str, Any] = {field.name: row[field.name] for field in FIELDS}
    return make_run({name: None if pd.isna(value) else value for name, value in values.items()}, "the store")


def settings_of(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The runs of each model and data set, with a title."""
    for (model, data), part in runs.groupby(["model", "data"], sort=False):
        yield f"{model} on {data}", part


def best_runs(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """The best eligible run of each optimizer, in the order of the paper's table."""
    eligible = selection.eligible(runs).dropna(subset=[selection.best_by])
    best = eligible.loc[eligible.groupby("optimizer")[selection.best_by].idxmin()]
    return in_order(best)


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows by optimizer, in the order of the paper's table."""
    return frame.sort_values("optimizer", key=lambda names: names.map(OPTIMIZERS.index), kind="stable")


def tried(runs: pd.DataFrame) -> list[str]:
    """The optimizers of these runs, in the order of the paper's table."""
    return [name for name in OPTIMIZERS if name in set(runs.optimizer)]


def predicted_nc0(row: "pd.Series[Any]") -> NDArray[np.float64] | None:
    """NC0 after each epoch as theory has it, `[epochs + 1]`, from the run's own start; None but for SGD and SGDW."""
    config = run_config(row)
    if config.family != "sgd":
        return None
    return np.asarray(row.nc0_start * _factor(config, int(row.train_samples)) ** 2)


@functools.lru_cache(maxsize=64)  # a table and a figure ask for the same runs
def _factor(config: RunConfig, samples: int) -> NDArray[np.float64]:
    steps = config.steps_per_epoch(samples)
    factor = ufm.row_sum_factor(
        [config.lr * config.lr_factor(epoch) for epoch in range(config.epochs) for _ in range(steps)],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        coupling=config.decay_coupling,
    )
    return factor[::steps]


def main_table(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """One row per optimizer that was run: its best run's metrics, their change in percent, NC0 as predicted, settings.

    An optimizer none of whose runs is eligible has a row with NaN.
    """
    best = {run.optimizer: run for _, run in best_runs(runs, selection).iterrows()}
    settings = described(runs).set_axis(runs.id)
    rows = []
    for optimizer in tried(runs):
        own = runs[runs.optimizer == optimizer]
        row: dict[str, object] = {
            "optimizer": optimizer,
            "eligible": len(selection.eligible(own)),
            "runs": int(own.status.isin(FINISHED).sum()),
        }
        if optimizer in best:
            run = best[optimizer]
            for name in CHANGES:
                start = run[f"{name}_start"]
                row[name] = run[name]
                row[f"{name}_change"] = 100 * (run[name] / start - 1) if start else math.nan
            prediction = predicted_nc0(run)
            row["nc0_predicted"] = math.nan if prediction is None else prediction[-1]
            row |= {name: run[name] for name in ("train_accuracy", "val_accuracy")}
            row["settings"] = settings[run["id"]]
            row["run"] = run["id"]
        rows.append(row)
    columns = ["optimizer", "nc0", "nc0_change", "nc0_predicted"]
    columns += [name for metric in CHANGES[1:] for name in (metric, f"{metric}_change")]
    columns += ["train_accuracy", "val_accuracy", "settings", "eligible", "runs", "run"]
    return pd.DataFrame(rows, columns=columns)


def nc0_by_decay(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Smallest and largest NC0 over its start, of the eligible runs of each optimizer, weight decay and coupling."""
    eligible = selection.eligible(runs)
    keys = [eligible[name] for name in ("optimizer", "weight_decay", "coupling")]
    frame = (eligible.nc0 / eligible.nc0_start).groupby(keys).agg(smallest="min", largest="max", runs="count")
    return in_order(frame.reset_index())


def status_counts(runs: pd.DataFrame) -> dict[str, int]:
    """How many runs have each status."""
    return {str(status): int(count) for status, count in runs.status.value_counts().items()}


def what_was_run(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """A row per model, data set and optimizer: runs by how they ended, how many reached the threshold, seconds."""
    runs = runs.assign(reached=runs.id.isin(selection.eligible(runs).id))
    for status in FINISHED:
        runs[status] = runs.status == status
    runs["unfinished"] = ~runs.status.isin(FINISHED)
    counted = ["reached", *FINISHED, "unfinished"]
    groups = runs.groupby(["model", "data", "optimizer"], sort=False)
    frame = groups[counted].sum().assign(runs=groups.size(), seconds=groups.seconds.sum()).reset_index()
    frame["place"] = frame.groupby(["model", "data"], sort=False).ngroup()
    frame = in_order(frame).sort_values("place", kind="stable")
    return frame[["model", "data", "optimizer", "runs", *FINISHED, "unfinished", "reached", "seconds"]]
