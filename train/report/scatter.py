"""Scatter plots, each point a run, and their tables: validation accuracy over the metrics, and partial collapse."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.plot.frames import by_seed, over_seeds
from ncollapse.plot.scatter_panels import PARTIAL, draw_accuracy, draw_pairs
from ncollapse.plot.settings import described, in_order, tried
from ncollapse.plot.style import Drawing
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import Column, View

__all__ = [
    "PARTIAL", "accuracy_against_collapse", "correlations_view", "metric_pairs", "partial_collapse", "partial_view",
    "rank_correlations",
]  # fmt: skip


def rank_correlations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return Spearman's rank correlation of validation accuracy with each metric, over the eligible runs.

    Runs that differ only in the seed count once, with their medians. A row per optimizer and metric, the optimizer
    "all" first. Columns: optimizer, metric, correlation (NaN where either does not vary), runs (settings).
    """
    eligible = selection.eligible(runs).dropna(subset=["val_accuracy"])
    eligible = over_seeds(eligible.assign(setting=by_seed(eligible)), ["setting"], [*NC, "val_accuracy"])
    rows = []
    for optimizer in ("all", *tried(eligible)):
        part = eligible if optimizer == "all" else eligible[eligible.optimizer == optimizer]
        for name in NC:
            both = part[[name, "val_accuracy"]].dropna().rank()
            varies = (both.nunique() > 1).all()
            rows.append((optimizer, name, both[name].corr(both.val_accuracy) if varies else float("nan"), len(both)))
    return pd.DataFrame(rows, columns=["optimizer", "metric", "correlation", "runs"])


def correlations_view(slug: str, runs: pd.DataFrame, selection: Selection) -> View:
    """Show `rank_correlations`, a row per optimizer."""
    frame = rank_correlations(runs, selection)
    wide = frame.pivot(index="optimizer", columns="metric", values="correlation")
    wide = wide.join(frame.groupby("optimizer").runs.max()).loc[frame.optimizer.unique()].reset_index()
    columns = (Column.optimizer(), Column.count("runs"), *(Column.metric(name) for name in NC))
    caption = (
        "Spearman's rank correlation of validation accuracy with each metric: −1 where more collapse (a smaller "
        "metric) always goes with a higher accuracy, 0 where they are unrelated."
    )
    if (by_seed(runs).value_counts() > 1).any():
        caption += " Runs that differ only in the seed count once, with their medians."
    return View(f"accuracy-{slug}", caption, columns, wide)


def partial_collapse(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return a row per optimizer, over its runs that reached the threshold.

    Columns: optimizer, runs, good (runs whose NC1 and NC2 are both in the better half of all runs), partial (good runs
    whose NC0 did not fall or whose NC3 is in the worse half), and of the run with the smallest NC1 its NC1, NC2, NC0
    over its start, NC3, settings and id.
    """
    eligible = selection.eligible(runs)
    middle = eligible[list(NC)].median()
    good = (eligible.nc1 <= middle.nc1) & (eligible.nc2 <= middle.nc2)
    fails = (eligible.nc0 >= eligible.nc0_start) | (eligible.nc3 > middle.nc3)
    eligible = eligible.assign(
        good=good, partial=good & fails, settings=described(runs)[eligible.index], run=eligible.id,
        nc0_over_start=eligible.nc0 / eligible.nc0_start,
    )  # fmt: skip
    groups = eligible.groupby("optimizer")
    counts = groups[["good", "partial"]].sum().assign(runs=groups.size())
    smallest = eligible.loc[eligible.dropna(subset=["nc1"]).groupby("optimizer").nc1.idxmin()].set_index("optimizer")
    columns = ["optimizer", "runs", "good", "partial", "nc1", "nc2", "nc0_over_start", "nc3", "settings", "run"]
    return in_order(counts.join(smallest[columns[4:]]).reset_index())[columns]


def partial_view(slug: str, frame: pd.DataFrame) -> View:
    """Show the rows of `partial_collapse`."""
    columns = (
        Column.optimizer(), Column.count("runs"),
        Column.count("good", "NC1, NC2 good"), Column.count("partial", "of these partial"),
        Column.metric("nc1", "smallest NC1", best=True), Column.metric("nc2", "its NC2"),
        Column.metric("nc0_over_start", "its NC0 / start"), Column.metric("nc3", "its NC3"),
        Column.text("settings"),
    )  # fmt: skip
    caption = (
        "Good: NC1 and NC2 are both in the better half of the runs that reached the threshold. Partial: good runs "
        "whose NC0 did not fall or whose NC3 is in the worse half. The columns on the right describe the run with the "
        "smallest NC1."
    )
    return View(f"partial-{slug}", caption, columns, frame)


def accuracy_against_collapse(slug: str, runs: pd.DataFrame, selection: Selection, names: Sequence[str]) -> Drawing:
    """Draw validation accuracy over each of these final metrics, of the runs that reached the threshold."""
    eligible = selection.eligible(runs).dropna(subset=["val_accuracy"])
    return draw_accuracy(f"accuracy-{slug}", eligible, names, selection.threshold)


def metric_pairs(slug: str, runs: pd.DataFrame, selection: Selection, pairs: Sequence[tuple[str, str]]) -> Drawing:
    """Draw one metric over another, for some of the pairs of `PARTIAL`, of all runs that ended well."""
    return draw_pairs(f"partial-{slug}", runs[runs.status == "done"], pairs, selection.threshold)
