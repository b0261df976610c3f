"""Metrics over momentum at equal training loss."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ncollapse.train.report.figures import style

#: Lines beyond which they are thin, with their median.
_MANY_LINES = 40


def metrics_over_momentum(slug: str, readings: pd.DataFrame, names: Sequence[str]) -> style.Drawing:
    """Draw metrics, four at most, over momentum: a panel per metric, a line per group.

    Args:
        readings: from `tables.momentum.at_equal_loss`.
    """
    momenta = np.sort(readings.momentum.unique())
    groups = [group for _, group in readings.groupby("group")]
    few = len(groups) <= _MANY_LINES
    look = {"marker": "o", "markersize": 3.5, "alpha": 0.8, "lw": 1.3} if few else {"alpha": 0.25, "lw": 0.7}
    with style.styled():
        figure, grid = style.panels(2, 2, (7.6, 6.0), gaps=(0.6, 0.8))
        for axes, name in zip(grid.flat, names, strict=False):
            style.scale(axes, "y", readings[name])
            for group in groups:
                colour = style.line(group.optimizer.iloc[0], group.coupling.iloc[0])
                axes.plot(np.searchsorted(momenta, group.momentum), group[name], **colour, **look)
            for _, rows in () if few else readings.groupby(["optimizer", "coupling"]):
                median = rows.groupby("momentum")[name].median()
                colour = style.line(rows.optimizer.iloc[0], rows.coupling.iloc[0])
                axes.plot(np.searchsorted(momenta, median.index), median, **colour)
            axes.set_title(name.upper())
            axes.set_xlabel("momentum β")
            # At places 0, 1, …: 1 − β spans decades, and 0 is among the momenta, so no scale suits.
            axes.set_xticks(range(len(momenta)), [f"{v:g}" for v in momenta])
            axes.set_xlim(-0.3, len(momenta) - 0.7)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        used = readings.drop_duplicates("optimizer")
        style.legend_entries(grid[0, 0], zip(used.optimizer, used.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 6)
    caption = (
        "NC0–NC3 over momentum at equal training loss. Each line joins runs that differ only in momentum; each run is "
        "read at its first evaluated epoch whose training loss is at most the lowest that all runs of its line reach. "
        f"Solid: weight decay coupled into the gradient; dashed: decoupled.{'' if few else ' Thick: the median.'}"
    )
    return style.Drawing(f"momentum-{slug}", caption, figure)
