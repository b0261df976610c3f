"""Metrics over epochs of a few runs, each labelled: NC0 with its prediction, and others, a panel each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ncollapse.plot import style
from ncollapse.plot.frames import complete, plain
from ncollapse.plot.looks import about_lines, look_of, shown
from ncollapse.plot.style import GROUND, Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Axes, Figure

#: Runs that `row_sum` labels, at most.
_MOST_RUNS = 20
#: Least distance between two labels at the ends of the lines, as a share of the axes' height.
_LABEL_DISTANCE = 0.055
#: Characters of a label that the usual margin has room for, and inches for each more.
_SHORT, _PER_LETTER = 8, 0.085
_IN_A_ROW = 3
#: Approximate number of circles per prediction.
_CIRCLES = 14


def row_sum(
    runs: pd.DataFrame, epochs: pd.DataFrame, predictions: Mapping[str, NDArray[np.float64]] | None = None
) -> "Figure":
    """Draw NC0 over epochs, a line per run with its optimizer's name at the end, predictions as circles.

    Args:
        runs: a row per run, 20 at most, as `ncollapse.train.load_runs` returns it. Needed: id, optimizer. Used where it
            is there: coupling.
        epochs: a row per run and evaluated epoch, as `load_metrics` returns it. Needed: run, epoch, nc0.
        predictions: id of a run -> NC0 after each epoch, `[epochs + 1]`, for instance its start times the squared
            factors of `ncollapse.ufm.row_sum_factor`.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("nc0.png")`. `figure.get_label()` says what it
        shows.

    Raises:
        ValueError: a missing column, no run or too many, epochs of none of the runs, or a prediction that ends before
            the run.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> runs = load_runs("results").nsmallest(6, "nc0")
        >>> plot.row_sum(runs, load_metrics("results")).savefig("nc0.png")
    """
    epochs = plain("row_sum", "epochs", epochs, ("run", "epoch", "nc0"))
    runs = complete("row_sum", runs, ("id",))
    epochs = epochs[epochs.run.isin(runs["id"])].sort_values("epoch")
    if epochs.empty or len(runs) > _MOST_RUNS:
        what = f"epochs has no row whose run is the id of one of the {len(runs)} runs"
        many = f"{len(runs)} runs are too many to label each, {_MOST_RUNS} at most; plot.curves draws any number"
        raise ValueError(f"plot.row_sum: {what if epochs.empty else many}")
    last = epochs.groupby("run").epoch.max()
    predicted = {run: np.asarray(prediction, dtype=float) for run, prediction in (predictions or {}).items()}
    for run, prediction in predicted.items():
        if run in last and len(prediction) <= last[run]:
            raise ValueError(
                f"plot.row_sum: the prediction of {run} has {len(prediction)} values, one for each of the "
                f"epochs 0 … {last[run]} is needed"
            )
    with shown(runs.optimizer):
        return draw_row_sum("row_sum", runs, epochs, predicted).labelled()


def draw_row_sum(
    name: str, runs: pd.DataFrame, epochs: pd.DataFrame, predictions: Mapping[str, NDArray[np.float64]]
) -> Drawing:
    """Draw what `row_sum` returns, with its caption."""
    with style.styled():
        right = 0.85 + _PER_LETTER * max(0, *(len(look_of(name).label) - _SHORT for name in runs.optimizer))
        figure, grid = style.panels(1, 1, (6.75 + right, 4.2), margins=(0.65, right, 0.5, 0.1))
        axes: Axes = grid[0, 0]
        style.scale(axes, "y", epochs.nc0)
        style.run_lines(axes, runs, epochs, "epoch", "nc0")
        # Fix the range before the predictions are drawn: they may be smaller than float32 can measure.
        axes.set_ylim(axes.get_ylim())
        predicted = False
        ends: list[tuple[float, str]] = []
        for _, run in runs.iterrows():
            history = epochs[epochs.run == run["id"]].dropna(subset=["nc0"])
            ends += [(float(value), run.optimizer) for value in history.nc0.tail(1)]
            prediction = predictions.get(run["id"])
            if prediction is not None and len(history):
                # At evaluated epochs only, since the line between them is not measured.
                at = history.epoch.to_numpy()[:: max(1, len(history) // _CIRCLES)]
                axes.plot(at, prediction[at], "o", mfc=GROUND, mec=look_of(run.optimizer).colour)
                predicted = True
        style.epochs_below(axes)
        axes.set_ylabel("NC0 = ‖Wᵀ1‖²")
        axes.set_xlim(0, _last(runs, epochs) * 1.005)
        _label_ends(axes, ends)
        used = runs.assign(coupled=runs.coupling > 0).drop_duplicates(["optimizer", "coupled"])
        style.legend_entries(
            axes, zip(used.optimizer, used.coupling, strict=True), hollow="exact prediction" if predicted else ""
        )
        style.one_legend(figure, axes, 7)
    circles = " Circles: the exact recursion of the row sum under SGD and SGDW, from the run's measured start."
    caption = (
        "NC0 = ‖Wᵀ1‖², the squared row sum of the last layer's weights, over epochs. Collapse needs NC0 → 0. "
        f"{about_lines(runs.optimizer)}{circles if predicted else ''}"
    )
    return Drawing(name, caption, figure)


def _last(runs: pd.DataFrame, epochs: pd.DataFrame) -> float:
    """Return the last epoch of the axis, at least 1."""
    planned = float(runs.epochs.max()) if "epochs" in runs else 0.0
    return max(planned, float(epochs.epoch.max()), 1.0)


def _label_ends(axes: "Axes", ends: list[tuple[float, str]]) -> None:
    """Write the optimizers' names at the right ends of their lines, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    shown = sorted((value, name) for value, name in ends if value > 0 or axes.get_yscale() != "log")
    heights = [float(to_axes.transform((0, value))[1]) for value, _ in shown]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _LABEL_DISTANCE)
    top = 1.0
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top)
        top = heights[i] - _LABEL_DISTANCE
    for height, (_, name) in zip(heights, shown, strict=True):
        look = look_of(name)
        axes.text(1.01, height, look.label, color=look.colour, transform=axes.transAxes, va="center", weight="bold")


def draw_panels(name: str, runs: pd.DataFrame, epochs: pd.DataFrame, metrics: Sequence[str], caption: str) -> Drawing:
    """Draw metrics over epochs: a panel per metric, a line per run.

    Args:
        caption: what the metrics are; what the kinds of lines mean is added.
    """
    columns = min(len(metrics), _IN_A_ROW)
    rows = -(-len(metrics) // columns)
    with style.styled():
        figure, grid = style.panels(rows, columns, (max(4.8, 3.2 * columns), 0.5 + 2.9 * rows), gaps=(0.65, 0.8))
        for axes, metric in zip(grid.flat, metrics, strict=False):
            style.scale(axes, "y", epochs[metric])
            style.run_lines(axes, runs, epochs, "epoch", metric)
            axes.set_title(metric.upper() if metric in ("nc1", "nc2", "nc3") else metric)
            style.epochs_below(axes)
            axes.set_xlim(0, _last(runs, epochs))
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        used = runs.assign(coupled=runs.coupling > 0).drop_duplicates(["optimizer", "coupled"])
        style.legend_entries(grid[0, 0], zip(used.optimizer, used.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 8 if columns > 1 else 4)
    return Drawing(name, f"{caption} {about_lines(runs.optimizer)}", figure)
