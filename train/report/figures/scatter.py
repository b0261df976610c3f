"""Figures with a run a point: validation accuracy against the metrics, and collapse that is partial."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ncollapse.train.report.figures.style import Drawing, marker, one_legend, panels, points_legend, scale, styled
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.tables.comparisons import NC
from ncollapse.train.report.tables.main import tried

#: What is told of partial collapse: metrics across and up.
PARTIAL = (("nc1", "nc0"), ("nc2", "nc3"), ("train_accuracy", "nc4"))
_ABOUT = {
    "nc0": "NC0 over NC1: features can collapse (NC1 small) while NC0 does not.",
    "nc3": "NC3 over NC2: class means can form a simplex (NC2 small) while the classifier does not align with them.",
    "nc4": "NC4, the share of samples not classified as their nearest class mean, over training accuracy.",
}
#: Points that are drawn smaller.
_MANY = 300
_ASIDE = "#8a8f95"
_SHAPES = "Discs: weight decay coupled into the gradient; diamonds: decoupled."


def accuracy_against_collapse(slug: str, runs: pd.DataFrame, selection: Selection, names: Sequence[str]) -> Drawing:
    """Validation accuracy over each of these final metrics, of the runs that reached the threshold."""
    eligible = selection.eligible(runs).dropna(subset=["val_accuracy"])
    with styled():
        figure, grid = panels(2, 2, (7.6, 5.6), sharey=True, gaps=(0.25, 0.5), margins=(0.65, 0.15, 0.5, 0.1))
        drawing = Drawing(f"accuracy-{slug}", "", figure)
        groups = _groups(eligible, selection)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            scale(axes, "x", eligible[name])
            for own, style in groups:
                drawing.points(axes, own[name], 100 * own.val_accuracy, own.id, **style)
            axes.set_xlabel(name.upper())
        for axes in grid[:, 0]:
            axes.set_ylabel("validation accuracy, %")
        points_legend(grid[0, 0], _used(eligible))
        one_legend(figure, grid[0, 0], 6)
    drawing.caption = (
        "Validation accuracy over each final metric, a point a run that reached the training-accuracy threshold. "
        f"{_SHAPES}"
    )
    return drawing


def partial_collapse(slug: str, runs: pd.DataFrame, selection: Selection, pairs: Sequence[tuple[str, str]]) -> Drawing:
    """Pairs of `PARTIAL`, of all runs that ended well."""
    done = runs[runs.status == "done"]
    missed = len(selection.eligible(done)) < len(done)
    with styled():
        size = max(4.8, 3.2 * len(pairs)), 3.5
        figure, grid = panels(1, len(pairs), size, gaps=(0.65, 0), margins=(0.65, 0.15, 0.5, 0.1))
        drawing, groups = Drawing(f"partial-{slug}", "", figure), _groups(done, selection)
        for axes, (x, y) in zip(grid[0], pairs, strict=True):
            share = y == "nc4"
            if not share:
                scale(axes, "x", done[x])
                scale(axes, "y", done[y])
            for own, style in groups:
                factor = 100 if share else 1
                drawing.points(axes, factor * own[x], factor * own[y], own.id, **style)
            axes.set_xlabel("training accuracy, %" if share else x.upper())
            axes.set_ylabel("NC4, % of the samples" if share else y.upper())
            if y == "nc0" and (start := float(done.nc0_start.median())) > 0:
                axes.axhline(start, color=_ASIDE, lw=1, ls=":")
                at = {"xy": (0.99, start), "xycoords": ("axes fraction", "data")}
                axes.annotate("start", **at, ha="right", va="bottom", color=_ASIDE, fontsize=8)
        points_legend(grid[0, 0], _used(done), missed=missed)
        one_legend(figure, grid[0, 0], 8 if len(pairs) > 1 else 4)
    hollow = " Hollow: the run missed the training-accuracy threshold." if missed else ""
    about = " ".join(_ABOUT[y] for _, y in pairs)
    drawing.caption = f"{about} A point a run that ended well. {_SHAPES}{hollow}"
    return drawing


def _groups(runs: pd.DataFrame, selection: Selection) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Runs that are drawn alike, those that missed the threshold first, with their style."""
    runs = runs[["id", "optimizer", "coupling", *NC, "nc4", "train_accuracy", "val_accuracy"]].assign(
        reached=runs.id.isin(selection.eligible(runs).id), coupled=runs.coupling > 0
    )
    groups = runs.groupby(["reached", "optimizer", "coupled"])
    size = {"markersize": 3.0} if len(runs) > _MANY else {}
    return [(own, marker(*_kind(own), reached=bool(own.reached.iloc[0])) | size) for _, own in groups]


def _kind(alike: pd.DataFrame) -> tuple[str, float]:
    return alike.optimizer.iloc[0], float(alike.coupled.iloc[0])


def _used(runs: pd.DataFrame) -> list[tuple[str, float]]:
    """Optimizers, apart where decay is coupled and where it is not."""
    return [
        (name, float(coupled))
        for name in tried(runs)
        for coupled in (True, False)
        if ((runs.coupling[runs.optimizer == name] > 0) == coupled).any()
    ]
