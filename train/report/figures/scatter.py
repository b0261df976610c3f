"""Scatter plots, each point a run: validation accuracy over the metrics, and partial collapse."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ncollapse.train.report.figures import style
from ncollapse.train.report.figures.style import Drawing
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import tried

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
_SHAPES = "Discs: weight decay coupled into the gradient; diamonds: decoupled."


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
            for group, look in groups:
                drawing.points(axes, group[name], 100 * group.val_accuracy, group.id, **look)
            axes.set_xlabel(name.upper())
        for axes in grid[:, 0]:
            axes.set_ylabel("validation accuracy, %")
        style.legend_entries(grid[0, 0], _used(eligible), points=True)
        style.one_legend(figure, grid[0, 0], 6)
    drawing.caption = (
        "Validation accuracy over each final metric. Each point is a run that reached the training-accuracy threshold. "
        f"{_SHAPES}"
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
            for group, look in groups:
                factor = 100 if percent else 1
                drawing.points(axes, factor * group[x], factor * group[y], group.id, **look)
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
    drawing.caption = f"{about} Each point is a run that ended well. {_SHAPES}{hollow}"
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
    return [
        (name, float(coupled))
        for name in tried(runs)
        for coupled in (True, False)
        if ((runs.coupling[runs.optimizer == name] > 0) == coupled).any()
    ]
