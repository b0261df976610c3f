"""The best run of each optimizer, and NC0 by weight decay: the paper's table."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from ncollapse.plot.settings import described, in_order, tried
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.view import Cell, Column, View
from ncollapse.train.results.schema import FINISHED

#: Metrics shown with their change from initialisation.
CHANGES = ("nc0", "nc1", "nc2", "nc3", "nc3_difference", "nc4")


def best_runs(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return the best eligible run of each optimizer, in the order of the table of optimizers."""
    eligible = selection.eligible(runs).dropna(subset=[selection.best_by])
    return in_order(eligible.loc[eligible.groupby("optimizer")[selection.best_by].idxmin()])


def main_table(runs: pd.DataFrame, selection: Selection, own: Iterable[str] = ()) -> pd.DataFrame:
    """Return a row per optimizer: metrics of its best run, their change in percent, predicted NC0, settings.

    An optimizer without an eligible run has a row with NaN.

    Args:
        own: metrics of the user's that the runs have.
    """
    best, own = best_runs(runs, selection), list(own)
    frame = best[["optimizer", *CHANGES, *own, "train_accuracy", "val_accuracy"]].assign(
        settings=described(runs)[best.index], run=best.id, nc0_predicted=[_predicted(run) for _, run in best.iterrows()]
    )
    for name in (*CHANGES, *own):
        start = best[f"{name}_start"]
        frame[f"{name}_change"] = 100 * (best[name] / start.where(start != 0) - 1)
    frame = frame.set_index("optimizer").reindex(tried(runs)).rename_axis("optimizer").reset_index()
    for count, counted in (("eligible", selection.eligible(runs)), ("runs", runs[runs.status.isin(FINISHED)])):
        frame[count] = [int((counted.optimizer == name).sum()) for name in frame.optimizer]
    columns = ["optimizer", "nc0", "nc0_change", "nc0_predicted"]
    columns += [name for metric in (*CHANGES[1:], *own) for name in (metric, f"{metric}_change")]
    return frame[[*columns, "train_accuracy", "val_accuracy", "settings", "eligible", "runs", "run"]]


def _predicted(run: "pd.Series[Any]") -> float:
    """Return NC0 at the end of a run as theory predicts it; NaN where it does not."""
    nc0 = predicted_nc0(run)
    return math.nan if nc0 is None else float(nc0[-1])


def main_view(slug: str, runs: pd.DataFrame, selection: Selection, own: Iterable[str] = ()) -> View:
    """Show `main_table`."""
    own = list(own)
    caption = (
        f"Best = smallest {selection.best_by.upper()} of the runs that reached {selection.percent} training accuracy "
        "(reached: how many did). Below each metric: its change from initialisation. NC0 predicted: the exact "
        "recursion of SGD and SGDW. NC3 diff.: ‖W/‖W‖ − M/‖M‖‖; its size at initialisation suggests that the paper "
        "calls this one NC3."
    )
    columns = (
        Column.optimizer(),
        Column.metric("nc0", best=True),
        Column.metric("nc0_predicted", "NC0 predicted"),
        *(Column.metric(name, best=True) for name in ("nc1", "nc2", "nc3")),
        Column.metric("nc3_difference", "NC3 diff.", best=True),
        Column.metric("nc4"),
        *(Column.metric(name, name) for name in own),
        Column.share("train_accuracy", "train acc."),
        Column.share("val_accuracy", "val. acc."),
        Column.text("settings", missing="no run reached the threshold"),
        Column("reached", lambda row: Cell(f"{row.eligible} of {row.runs}")),
    )
    return View(f"best-{slug}", caption, columns, main_table(runs, selection, own))


def nc0_by_decay(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return smallest and largest NC0 over its start of the eligible runs, by optimizer, weight decay and coupling."""
    eligible = selection.eligible(runs)
    keys = [eligible[name] for name in ("optimizer", "weight_decay", "coupling")]
    frame = (
        (eligible.nc0 / eligible.nc0_start).groupby(keys, dropna=False).agg(smallest="min", largest="max", runs="count")
    )
    return in_order(frame.reset_index())


def decay_view(slug: str, runs: pd.DataFrame, selection: Selection) -> View:
    """Show `nc0_by_decay`."""
    caption = f"Final NC0 as a multiple of its start, over the runs that reached {selection.percent} training accuracy."
    columns = (
        Column.optimizer(), Column.setting("weight_decay"), Column.setting("coupling"),
        Column.metric("smallest", "smallest NC0 / start"), Column.metric("largest", "largest NC0 / start"),
        Column.count("runs"),
    )  # fmt: skip
    return View(f"decay-{slug}", caption, columns, nc0_by_decay(runs, selection))
