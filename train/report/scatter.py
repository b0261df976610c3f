"""Scatter plots, each point a run, and their tables: validation accuracy over the metrics, and partial collapse."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.looks import about_points
from ncollapse.plot.settings import described, in_order, tried
from ncollapse.plot.style import Drawing
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import Column, View

#: Pairs of metrics that show partial collapse: horizontal, vertical.
PARTIAL = (("nc1", "nc0"), ("nc2", "nc3"), ("train_accuracy", "nc4"))
_CAPTIONS = {
    "nc0": "NC0 over NC1: features can collapse (NC1 small) while NC0 does not.",
    "nc3": "NC3 over NC2: class means can form a simplex (NC2 small) while the classifier does not align with them.",
    "nc4": "NC4, the share of samples not classified as their nearest class mean, over training accuracy.",
}
#: Runs beyond which points are smaller.
_MANY_POINTS = 300
_START_COLOUR = "#8a8f95"


def rank_correlations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return Spearman's rank correlation of validation accuracy with each metric, over the eligible runs.

    A row per optimizer and metric, the optimizer "all" first. Columns: optimizer, metric, correlation (NaN where either
    does not vary), runs.
    """
    eligible = selection.eligible(runs).dropna(subset=["val_accuracy"])
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
    with style.styled():
        figure, grid = style.panels(2, 2, (7.6, 5.6), sharey=True, gaps=(0.25, 0.5), margins=(0.65, 0.15, 0.5, 0.1))
        drawing = Drawing(f"accuracy-{slug}", "", figure)
        groups = _groups(eligible, selection)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            style.scale(axes, "x", eligible[name])
            drawing.points(axes, [(g[name], 100 * g.val_accuracy, g.id, look) for g, look in groups])
            axes.set_xlabel(name.upper())
        for axes in grid[:, 0]:
            axes.set_ylabel("validation accuracy, %")
        style.legend_entries(grid[0, 0], _used(eligible), points=True)
        style.one_legend(figure, grid[0, 0], 6)
    drawing.caption = (
        "Validation accuracy over each final metric. Each point is a run that reached the training-accuracy threshold. "
        f"{about_points(eligible.optimizer)}{drawing.note}"
    )
    return drawing


def metric_pairs(slug: str, runs: pd.DataFrame, selection: Selection, pairs: Sequence[tuple[str, str]]) -> Drawing:
    """Draw one metric over another, for some of the pairs of `PARTIAL`, of all runs that ended well."""
    done = runs[runs.status == "done"]
    missed = len(selection.eligible(done)) < len(done)
    with style.styled():
        size = max(4.8, 3.2 * len(pairs)), 3.5
        figure, grid = style.panels(1, len(pairs), size, gaps=(0.65, 0), margins=(0.65, 0.15, 0.5, 0.1))
        drawing, groups = Drawing(f"partial-{slug}", "", figure), _groups(done, selection)
        for axes, (x, y) in zip(grid[0], pairs, strict=True):
            percent = y == "nc4"
            if not percent:
                style.scale(axes, "x", done[x])
                style.scale(axes, "y", done[y])
            factor = 100 if percent else 1
            drawing.points(axes, [(factor * g[x], factor * g[y], g.id, look) for g, look in groups])
            axes.set_xlabel("training accuracy, %" if percent else x.upper())
            axes.set_ylabel("NC4, % of the samples" if percent else y.upper())
            if y == "nc0" and (start := float(done.nc0_start.median())) > 0:
                axes.axhline(start, color=_START_COLOUR, lw=1, ls=":")
                at = {"xy": (0.99, start), "xycoords": ("axes fraction", "data")}
                axes.annotate("start", **at, ha="right", va="bottom", color=_START_COLOUR, fontsize=8)
        style.legend_entries(grid[0, 0], _used(done), points=True, hollow="missed the threshold" if missed else "")
        style.one_legend(figure, grid[0, 0], 8 if len(pairs) > 1 else 4)
    hollow = " Hollow: the run missed the training-accuracy threshold." if missed else ""
    about = " ".join(_CAPTIONS[y] for _, y in pairs)
    drawing.caption = (
        f"{about} Each point is a run that ended well. {about_points(done.optimizer)}{hollow}{drawing.note}"
    )
    return drawing


def _groups(runs: pd.DataFrame, selection: Selection) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Group runs by the style in which they are drawn; those that missed the threshold come first, below the others."""
    runs = runs[["id", "optimizer", "coupling", *NC, "nc4", "train_accuracy", "val_accuracy"]].assign(
        reached=runs.id.isin(selection.eligible(runs).id), coupled=runs.coupling > 0
    )
    size = {"markersize": 3.0} if len(runs) > _MANY_POINTS else {}
    return [
        (group, style.marker(group.optimizer.iloc[0], float(bool(coupled)), reached=bool(reached)) | size)
        for (reached, _, coupled), group in runs.groupby(["reached", "optimizer", "coupled"])
    ]


def _used(runs: pd.DataFrame) -> list[tuple[str, float]]:
    """Return the optimizers for the legend, once where decay is coupled and once where it is not."""
    used = set(zip(runs.optimizer, runs.coupling > 0, strict=True))
    return [(name, float(coupled)) for name in tried(runs) for coupled in (True, False) if (name, coupled) in used]
