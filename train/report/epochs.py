"""Metrics over epochs of each optimizer's best run: NC0 with its exact prediction, NC1–NC3, and those of the user's."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.looks import about_lines, look_of
from ncollapse.plot.over_epochs import PHASES, Thick, curves_measured, draw_curves, draw_phase
from ncollapse.plot.style import GROUND
from ncollapse.train.report.best import best_settings
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.columns import OwnMetrics

#: Least distance between two labels at the ends of the lines, as a share of the axes' height.
_LABEL_DISTANCE = 0.055
#: Characters of a label that the usual margin has room for, and inches for each more.
_SHORT, _PER_LETTER = 8, 0.085
#: Panels of the figure of metrics of the user's, at most, and of a row of them.
_MOST_PANELS, _IN_A_ROW = 12, 3
#: Approximate number of circles per prediction.
_CIRCLES = 14


def nc0_over_epochs(slug: str, best: pd.DataFrame, histories: pd.DataFrame) -> style.Drawing:
    """Draw NC0 over epochs, a line per run of `best`, with the exact prediction for SGD and SGDW as circles."""
    with style.styled():
        right = 0.85 + _PER_LETTER * max(0, *(len(look_of(name).label) - _SHORT for name in best.optimizer))
        figure, grid = style.panels(1, 1, (6.75 + right, 4.2), margins=(0.65, right, 0.5, 0.1))
        axes: style.Axes = grid[0, 0]
        style.scale(axes, "y", histories.nc0)
        style.run_lines(axes, best, histories, "epoch", "nc0")
        # Fix the range before the predictions are drawn: they may be smaller than float32 can measure.
        axes.set_ylim(axes.get_ylim())
        predicted = False
        ends: list[tuple[float, str]] = []
        for _, run in best.iterrows():
            history = histories[histories.run == run["id"]].dropna(subset=["nc0"])
            ends += [(float(value), run.optimizer) for value in history.nc0.tail(1)]
            prediction = predicted_nc0(run)
            if prediction is not None and len(history):
                # At evaluated epochs only, since the line between them is not measured.
                at = history.epoch.to_numpy()[:: max(1, len(history) // _CIRCLES)]
                axes.plot(at, prediction[at], "o", mfc=GROUND, mec=look_of(run.optimizer).colour)
                predicted = True
        axes.set_xlabel("epoch")
        axes.set_ylabel("NC0 = ‖Wᵀ1‖²")
        axes.set_xlim(0, float(best.epochs.max()) * 1.005)
        _label_ends(axes, ends)
        style.legend_entries(
            axes, zip(best.optimizer, best.coupling, strict=True), hollow="exact prediction" if predicted else ""
        )
        style.one_legend(figure, axes, 7)
    circles = " Circles: the exact recursion of the row sum under SGD and SGDW, from the run's measured start."
    caption = (
        "NC0 = ‖Wᵀ1‖², the squared row sum of the last layer's weights, over epochs of each optimizer's best run. "
        f"Collapse needs NC0 → 0. {about_lines(best.optimizer)}{circles if predicted else ''}"
    )
    return style.Drawing(f"nc0-{slug}", caption, figure)


def _label_ends(axes: "style.Axes", ends: list[tuple[float, str]]) -> None:
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


def nc123_over_epochs(slug: str, best: pd.DataFrame, histories: pd.DataFrame, names: Sequence[str]) -> style.Drawing:
    """Draw the metrics in `names`, of NC1, NC2 and NC3, over epochs: a panel per metric, a line per run."""
    with style.styled():
        figure, grid = style.panels(1, len(names), (max(4.8, 3.2 * len(names)), 3.4))
        for axes, name in zip(grid[0], names, strict=True):
            style.scale(axes, "y", histories[name])
            style.run_lines(axes, best, histories, "epoch", name)
            axes.set_title(name.upper())
            axes.set_xlabel("epoch")
            axes.set_xlim(0, float(best.epochs.max()))
        style.legend_entries(grid[0, 0], zip(best.optimizer, best.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 8 if len(names) > 1 else 4)
    caption = (
        "NC1 = tr(Σ_W Σ_B⁺)/K, the scatter within classes relative to that between them; NC2 and NC3, the distances "
        f"of the class means M and of the product W·Mᵀ from a simplex; over epochs of the same runs. "
        f"{about_lines(best.optimizer)}"
    )
    return style.Drawing(f"nc123-{slug}", caption, figure)


def own_over_epochs(slug: str, best: pd.DataFrame, histories: pd.DataFrame, own: OwnMetrics) -> style.Drawing:
    """Draw metrics of the user's, of which `histories` has values, over epochs: a panel per metric, a line per run."""
    names = list(own)[:_MOST_PANELS]
    columns = min(len(names), _IN_A_ROW)
    rows = -(-len(names) // columns)
    with style.styled():
        figure, grid = style.panels(rows, columns, (max(4.8, 3.2 * columns), 0.5 + 2.9 * rows), gaps=(0.65, 0.8))
        for axes, name in zip(grid.flat, names, strict=False):
            style.scale(axes, "y", histories[name])
            style.run_lines(axes, best, histories, "epoch", name)
            axes.set_title(name)
            axes.set_xlabel("epoch")
            axes.set_xlim(0, float(best.epochs.max()))
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        style.legend_entries(grid[0, 0], zip(best.optimizer, best.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 8 if columns > 1 else 4)
    more = f" {len(own) - len(names)} more are in the tables." if len(own) > len(names) else ""
    about = "; ".join(name if own[name] in ("", name) else f"{name}: {own[name]}" for name in names)
    caption = f"Metrics of your own over epochs of the same runs: {about}.{more} {about_lines(best.optimizer)}"
    return style.Drawing(f"own-{slug}", caption, figure)


def metrics_over_epochs(slug: str, runs: pd.DataFrame, histories: pd.DataFrame, selection: Selection) -> style.Drawing:
    """Draw NC0–NC4, training loss and training error over epochs, of all these runs: `ncollapse.plot.curves`."""
    names = curves_measured(histories)
    return draw_curves(f"curves-{slug}", runs, histories, names, _thick(runs, selection))


def phase_portrait(
    slug: str, runs: pd.DataFrame, histories: pd.DataFrame, selection: Selection | None = None
) -> style.Drawing:
    """Draw NC1 against NC0 and against NC3 over epochs, of all these runs: `ncollapse.plot.phase`."""
    return draw_phase(f"phase-{slug}", runs, histories, PHASES, _thick(runs, selection or Selection()))


def _thick(runs: pd.DataFrame, selection: Selection) -> Thick:
    return Thick(best_settings(runs, selection).id, "the best setting of each optimizer")
