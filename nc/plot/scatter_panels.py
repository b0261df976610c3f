"""Scatter plots of final values, each point a run: validation accuracy over the metrics, and pairs of metrics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.frames import by_seed, complete, over_seeds, reached
from ncollapse.plot.looks import about_points, look_of, shown
from ncollapse.plot.settings import tried
from ncollapse.plot.style import Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Axes, Figure

#: Metrics that validation accuracy is drawn over, where they are measured.
OVER = ("nc0", "nc1", "nc2", "nc3")
#: Pairs of metrics that show partial collapse: horizontal, vertical.
PARTIAL = (("nc1", "nc0"), ("nc2", "nc3"), ("train_accuracy", "nc4"))
_CAPTIONS = {
    ("nc1", "nc0"): "NC0 over NC1: features can collapse (NC1 small) while NC0 does not.",
    ("nc2", "nc3"): "NC3 over NC2: class means can form a simplex (NC2 small) while the classifier does not align with "
    "them.",
    ("train_accuracy", "nc4"): "NC4, the share of samples not classified as their nearest class mean, over training "
    "accuracy.",
}
#: Runs beyond which points are smaller, and beyond which seeds are not joined.
_MANY_POINTS, _MOST_JOINED = 300, 2_000
_START_COLOUR = "#8a8f95"
_IN_A_ROW = 3


def validation_accuracy(
    runs: pd.DataFrame, metrics: Sequence[str] | None = None, *, threshold: float = 0.999
) -> "Figure":
    """Draw validation accuracy over each of these final metrics, a point per run that reached the threshold.

    Runs that differ only in the seed are joined with their median. Where no run reached the threshold, all that ended
    well are drawn, as hollow points.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: optimizer, val_accuracy, `metrics`. Used
            where they are there: coupling; status and train_accuracy; the settings and seed, for the seeds.
        metrics: columns of `runs`; by default NC0–NC3, those that are there.
        threshold: training accuracy that runs must reach.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("accuracy.png")`. `figure.get_label()` says
        what it shows.

    Raises:
        ValueError: a missing column, or no run that ended well with a validation accuracy.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.validation_accuracy(load_runs("results"), ["nc1", "nc3"], threshold=0.99).savefig("accuracy.png")
    """
    runs = complete("validation_accuracy", runs, ("val_accuracy", *(metrics or ())))
    names = list(metrics) if metrics else [name for name in OVER if name in runs and runs[name].notna().any()]
    if not names:
        raise ValueError(f"plot.validation_accuracy: runs has no number in any of the columns {', '.join(OVER)}")
    done = runs[(runs.status == "done") & runs.val_accuracy.notna()]
    if done.empty:
        raise ValueError(f"plot.validation_accuracy: none of the {len(runs)} runs ended well with a val_accuracy")
    fit = done[reached(done, threshold)]
    with shown(runs.optimizer):
        return draw_accuracy("validation_accuracy", done if fit.empty else fit, names, threshold).labelled()


def metric_pairs(
    runs: pd.DataFrame, pairs: Sequence[tuple[str, str]] | None = None, *, threshold: float = 0.999
) -> "Figure":
    """Draw one final metric over another, a panel per pair, a point per run that ended well.

    Runs that differ only in the seed are joined with their median. Points are hollow where the run missed the
    threshold.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: optimizer and the metrics of `pairs`.
            Used where they are there: coupling; status and train_accuracy; the settings and seed, for the seeds;
            NAME_start of a vertical metric, whose median is a line.
        pairs: columns of `runs`: horizontal, vertical. By default those that show partial collapse: NC0 over NC1, NC3
            over NC2 and NC4 over training accuracy, where they are there.
        threshold: training accuracy below which points are hollow.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("pairs.png")`. `figure.get_label()` says what
        it shows.

    Raises:
        ValueError: a missing column, or no run that ended well.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.metric_pairs(load_runs("results"), [("nc1", "nc2_weight")]).savefig("pairs.png")
    """
    runs = complete("metric_pairs", runs, list(dict.fromkeys(name for pair in pairs or () for name in pair)))
    chosen = list(pairs) if pairs else [pair for pair in PARTIAL if set(pair) <= set(runs)]
    if not chosen:
        texts = ", ".join(f"{x} and {y}" for x, y in PARTIAL)
        raise ValueError(f"plot.metric_pairs: runs has none of the pairs of columns {texts}; name others in pairs")
    done = runs[runs.status == "done"]
    if done.empty:
        raise ValueError(f"plot.metric_pairs: none of the {len(runs)} runs ended well")
    with shown(runs.optimizer):
        return draw_pairs("metric_pairs", done, chosen, threshold).labelled()


def draw_accuracy(name: str, runs: pd.DataFrame, metrics: Sequence[str], threshold: float) -> Drawing:
    """Draw validation accuracy, a column of these runs, over each of the metrics."""
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // columns)
    with style.styled():
        size = max(4.8, 3.8 * columns), 0.4 + 2.6 * rows
        figure, grid = style.panels(rows, columns, size, sharey=True, gaps=(0.25, 0.5), margins=(0.65, 0.15, 0.5, 0.1))
        drawing = Drawing(name, "", figure)
        groups = _groups(runs, [*metrics, "val_accuracy"], threshold)
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        joined = False
        for axes, metric in zip(grid.flat, metrics, strict=False):
            style.scale(axes, "x", style.factor_of(metric) * runs[metric])
            joined |= _join_seeds(axes, runs, metric, "val_accuracy")
            drawing.points(axes, _points(groups, metric, "val_accuracy"))
            axes.set_xlabel(style.title_of(metric))
        for axes in grid[:, 0]:
            axes.set_ylabel("validation accuracy, %")
        missed = not reached(runs, threshold).any()
        hollow = "missed the threshold" if missed else ""
        style.legend_entries(grid[0, 0], _used(runs), points=True, hollow=hollow)
        style.one_legend(figure, grid[0, 0], 6)
    which = "that reached the training-accuracy threshold"
    if missed:
        which = f"that ended well; none reached {100 * threshold:g} % training accuracy, so they are hollow"
    drawing.caption = (
        f"Validation accuracy over each final metric. Each point is a run {which}. {about_points(runs.optimizer)}"
        f"{_JOINED * joined}{drawing.note}"
    )
    return drawing


def draw_pairs(name: str, runs: pd.DataFrame, pairs: Sequence[tuple[str, str]], threshold: float) -> Drawing:
    """Draw one metric over another, of these runs, for each of the pairs."""
    missed = not reached(runs, threshold).all()
    columns = min(len(pairs), _IN_A_ROW)
    rows = -(-len(pairs) // columns)
    with style.styled():
        size = max(4.8, 3.2 * columns), 0.4 + 3.1 * rows
        figure, grid = style.panels(rows, columns, size, gaps=(0.65, 0.6), margins=(0.65, 0.15, 0.5, 0.1))
        drawing, joined = Drawing(name, "", figure), False
        groups = _groups(runs, [metric for pair in pairs for metric in pair], threshold)
        for axes in grid.flat[len(pairs) :]:
            axes.set_axis_off()
        for axes, (x, y) in zip(grid.flat, pairs, strict=False):
            # Shares have a linear axis: many are exactly 0.
            if y != "nc4":
                style.scale(axes, "x", style.factor_of(x) * runs[x])
                style.scale(axes, "y", style.factor_of(y) * runs[y])
            joined |= _join_seeds(axes, runs, x, y)
            drawing.points(axes, _points(groups, x, y))
            axes.set_xlabel(style.title_of(x))
            axes.set_ylabel(style.title_of(y))
            if y == "nc0" and "nc0_start" in runs and (start := float(runs.nc0_start.median())) > 0:
                axes.axhline(start, color=_START_COLOUR, lw=1, ls=":")
                at: dict[str, Any] = {"xy": (0.99, start), "xycoords": ("axes fraction", "data")}
                axes.annotate("start", **at, ha="right", va="bottom", color=_START_COLOUR, fontsize=8)
        hollow = "missed the threshold" if missed else ""
        style.legend_entries(grid[0, 0], _used(runs), points=True, hollow=hollow)
        style.one_legend(figure, grid[0, 0], 8 if len(pairs) > 1 else 4)
    about = " ".join(_CAPTIONS.get((x, y), f"{style.title_of(y)} over {style.title_of(x)}.") for x, y in pairs)
    drawing.caption = (
        f"{about} Each point is a run that ended well. {about_points(runs.optimizer)}"
        f"{' Hollow: the run missed the training-accuracy threshold.' * missed}{_JOINED * joined}{drawing.note}"
    )
    return drawing


_JOINED = " Thin lines join the runs that differ only in the seed with their median."


def _join_seeds(axes: "Axes", runs: pd.DataFrame, x: str, y: str) -> bool:
    """Draw a line from each run to the median of its setting; return whether a setting has several seeds."""
    setting = by_seed(runs)
    several = runs[setting.groupby(setting).transform("size") > 1]
    if several.empty or len(runs) > _MOST_JOINED:
        return False
    several = several.assign(setting=setting)
    middles = over_seeds(several, ["setting"], list(dict.fromkeys((x, y)))).set_index("setting")
    factors = style.factor_of(x), style.factor_of(y)
    for name, part in several.groupby("optimizer"):
        middle = middles.loc[part.setting]
        # A run, its median, a gap.
        at = [
            np.stack([part[column], middle[column], np.full(len(part), np.nan)], axis=1).astype(float).ravel() * factor
            for column, factor in zip((x, y), factors, strict=True)
        ]
        axes.plot(*at, color=look_of(str(name)).colour, lw=0.7, alpha=0.45, zorder=1.5)
    return True


def _groups(runs: pd.DataFrame, names: Sequence[str], threshold: float) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Group runs by the style in which they are drawn; those that missed the threshold come first, below the others."""
    kept = runs[["id", "optimizer", "coupling", *dict.fromkeys(names)]]
    kept = kept.assign(reached=reached(runs, threshold), coupled=runs.coupling > 0)
    size = {"markersize": 3.0} if len(runs) > _MANY_POINTS else {}
    return [
        (group, style.marker(group.optimizer.iloc[0], float(bool(coupled)), reached=bool(passed)) | size)
        for (passed, _, coupled), group in kept.groupby(["reached", "optimizer", "coupled"])
    ]


def _points(
    groups: Sequence[tuple[pd.DataFrame, dict[str, Any]]], x: str, y: str
) -> list[tuple[Any, Any, "pd.Series[str]", dict[str, Any]]]:
    return [(style.factor_of(x) * g[x], style.factor_of(y) * g[y], g["id"], look) for g, look in groups]


def _used(runs: pd.DataFrame) -> list[tuple[str, float]]:
    """Return the optimizers for the legend, once where decay is coupled and once where it is not."""
    used = set(zip(runs.optimizer, runs.coupling > 0, strict=True))
    return [(name, float(coupled)) for name in tried(runs) for coupled in (True, False) if (name, coupled) in used]
