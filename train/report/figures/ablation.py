"""Figures of runs that differ in one setting alone: the coupled share of the weight decay, and momentum."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ncollapse.train.optimizers import LABELS
from ncollapse.train.report.figures.style import (
    COLOURS,
    GROUND,
    Drawing,
    line,
    lines_legend,
    one_legend,
    panels,
    scale,
    styled,
)

if TYPE_CHECKING:
    from ncollapse.train.report.figures.style import Axes

#: Lines of one colour are told apart by these.
_MARKERS = "osD^vP"
#: Lines beyond which they are thin, with their median.
_APART = 40


def coupling(slug: str, runs: pd.DataFrame, names: Sequence[str]) -> Drawing:
    """These metrics, five at most, at the end over the coupled share; a line per group of `interpolations`."""
    groups = [group for _, group in runs.groupby("group")]
    told = len(groups) <= len(_MARKERS)
    with styled():
        figure, grid = panels(2, 3, (9.6, 5.7), gaps=(0.55, 0.8))
        for axes, name in zip(grid.flat, names, strict=False):
            values = 100 * runs[name] if name == "val_accuracy" else runs[name]
            scale(axes, "y", values)
            for k, group in enumerate(groups):
                colour, own = COLOURS[group.optimizer.iloc[0]], values[group.index]
                style = {"color": colour, "marker": _MARKERS[k] if told else "", "alpha": 1.0 if told else 0.4}
                label = f"{LABELS[group.optimizer.iloc[0]]} {group.settings.iloc[0]}"
                axes.plot(group.coupling, own, **style, label=label if told else None)
                missed = group[~group.reached]
                axes.plot(missed.coupling, own[missed.index], _MARKERS[k] if told else "o", color=colour, mfc=GROUND)
            if name == "val_accuracy":
                _at_least_wide(axes, 2.0)
            axes.set_title("validation accuracy, %" if name == "val_accuracy" else name.upper())
            axes.set_xlabel("coupled share c of the decay")
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        if not told:
            lines_legend(grid[0, 0], [(name, 1.0) for name in dict.fromkeys(runs.optimizer)])
        grid[1, 2].legend(*grid[0, 0].get_legend_handles_labels(), loc="center left")
    hollow = "" if runs.reached.all() else " Hollow: the run missed the training-accuracy threshold."
    caption = (
        "Final metrics over the coupled share c of the weight decay: c·λ·w goes into the gradient, (1 − c)·λ straight "
        f"to the weights. Each line joins runs that differ in c alone.{hollow}"
    )
    return Drawing(f"coupling-{slug}", caption, figure)


def momentum(slug: str, readings: pd.DataFrame, names: Sequence[str]) -> Drawing:
    """These metrics at equal training loss over momentum; a line per group of `at_equal_loss`."""
    momenta = np.sort(readings.momentum.unique())
    groups = [group for _, group in readings.groupby("group")]
    told = len(groups) <= _APART
    style = {"marker": "o", "markersize": 3.5, "alpha": 0.8, "lw": 1.3} if told else {"alpha": 0.25, "lw": 0.7}
    with styled():
        figure, grid = panels(2, 2, (7.6, 6.0), gaps=(0.6, 0.8))
        for axes, name in zip(grid.flat, names, strict=False):
            scale(axes, "y", readings[name])
            for group in groups:
                own = line(group.optimizer.iloc[0], group.coupling.iloc[0])
                axes.plot(np.searchsorted(momenta, group.momentum), group[name], **own, **style)
            for _, rows in () if told else readings.groupby(["optimizer", "coupling"]):
                own, median = (
                    line(rows.optimizer.iloc[0], rows.coupling.iloc[0]),
                    rows.groupby("momentum")[name].median(),
                )
                axes.plot(np.searchsorted(momenta, median.index), median, **own)
            axes.set_title(name.upper())
            _categories(axes, momenta)
            axes.set_xlabel("momentum β")
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        used = readings.drop_duplicates("optimizer")
        lines_legend(grid[0, 0], zip(used.optimizer, used.coupling, strict=True))
        one_legend(figure, grid[0, 0], 6)
    caption = (
        "NC0–NC3 over momentum at equal training loss. Each line joins runs that differ in momentum alone; each is "
        "read at its first evaluated epoch whose training loss is not above the lowest that all of the line reach. "
        f"Solid: weight decay coupled into the gradient; dashed: decoupled.{'' if told else ' Thick: the median.'}"
    )
    return Drawing(f"momentum-{slug}", caption, figure)


def _at_least_wide(axes: "Axes", span: float) -> None:
    """Show no less than a span of values, or noise would look like an effect."""
    low, high = axes.get_ylim()
    more = max(0.0, span - (high - low)) / 2
    axes.set_ylim(low - more, high + more)


def _categories(axes: "Axes", values: "np.ndarray[Any, Any]") -> None:
    """Evenly spaced: what matters of momentum is 1 − β, which spans decades, and 0 is among them."""
    axes.set_xticks(range(len(values)), [f"{v:g}" for v in values])
    axes.set_xlim(-0.3, len(values) - 0.7)
