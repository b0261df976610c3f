"""Runs that differ only in momentum, compared at equal training loss."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.looks import about_lines
from ncollapse.plot.settings import alike, described, in_order
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import Column, View

#: Lines beyond which they are thin, with their median, and beyond which only the median and a band are drawn.
_MANY_LINES, _MOST_LINES = 40, 400
#: Ticks of the axis of momenta, at most.
_TICKS = 12


def at_equal_loss(runs: pd.DataFrame, results: Results, selection: Selection) -> pd.DataFrame:
    """Return the runs that reached the threshold and differ only in momentum, each at the common loss of its group.

    The common loss is the lowest training loss that all runs of the group reach; a run is read at its first evaluated
    epoch with at most that loss. Columns: group (a number), optimizer, coupling, settings (common to the group),
    momentum, loss (of the group), epoch, train_loss and NC0–NC3 at that epoch, run.
    """
    eligible = selection.eligible(runs)
    eligible = eligible.assign(group=alike(eligible, ["momentum"]), settings=described(eligible, ["momentum"]))
    eligible = eligible[eligible.groupby("group").momentum.transform("nunique") > 1]
    lowest = eligible.id.map(results.lowest_loss(eligible.id)).astype(float)
    eligible = eligible.assign(loss=lowest.groupby(eligible.group).transform("max"))
    epochs = results.first_at(dict(zip(eligible.id, eligible.loss, strict=True)))
    columns = ["id", "group", "optimizer", "coupling", "settings", "momentum", "loss"]
    frame = eligible[columns].merge(epochs[["run", "epoch", "train_loss", *NC]], left_on="id", right_on="run")
    return in_order(frame.drop(columns="id").sort_values(["group", "momentum"]))


def momentum_steps(readings: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of more momentum at equal loss: a row per optimizer and step from one momentum to the next.

    Columns: optimizer, lower, higher (momenta), pairs, and for each of NC0–NC3 the median over pairs of its value
    at the higher momentum divided by that at the lower one.
    """
    ordered = readings.sort_values(["group", "momentum"])
    before = ordered.groupby("group")[["momentum", *NC]].shift()
    steps = ordered[["optimizer"]].assign(lower=before.momentum, higher=ordered.momentum)
    for name in NC:
        steps[name] = ordered[name] / before[name]
    groups = steps.dropna(subset=["lower"]).groupby(["optimizer", "lower", "higher"])
    return in_order(groups[list(NC)].median().assign(pairs=groups.size()).reset_index())


def momentum_view(slug: str, readings: pd.DataFrame) -> View:
    """Show `momentum_steps`."""
    columns = (
        Column.optimizer(),
        Column.setting("lower", "from β"),
        Column.setting("higher", "to β"),
        Column.count("pairs"),
        *(Column.metric(name, f"{name.upper()} ratio") for name in NC),
    )
    caption = "Median of the metric at the higher momentum divided by that at the lower one; below 1, momentum helps."
    return View(f"momentum-{slug}", caption, columns, momentum_steps(readings))


def metrics_over_momentum(slug: str, readings: pd.DataFrame, names: Sequence[str]) -> style.Drawing:
    """Draw metrics, four at most, over momentum: a panel per metric, a line per group of `at_equal_loss`."""
    momenta = np.sort(readings.momentum.unique())
    lines = readings.group.nunique()
    few, too_many = lines <= _MANY_LINES, lines > _MOST_LINES
    groups = [] if too_many else [group for _, group in readings.groupby("group")]
    look = {"marker": "o", "markersize": 3.5, "alpha": 0.8, "lw": 1.3} if few else {"alpha": 0.25, "lw": 0.7}
    with style.styled():
        figure, grid = style.panels(2, 2, (7.6, 6.0), gaps=(0.6, 0.8))
        for axes, name in zip(grid.flat, names, strict=False):
            style.scale(axes, "y", readings[name])
            for group in groups:
                colour = style.line(group.optimizer.iloc[0], group.coupling.iloc[0])
                axes.plot(np.searchsorted(momenta, group.momentum), group[name], **colour, **look)
            if not few:
                style.medians(axes, readings, "momentum", name, momenta, band=too_many)
            axes.set_title(name.upper())
            axes.set_xlabel("momentum β")
            # At places 0, 1, …: 1 − β spans decades, and 0 is among the momenta, so no scale suits.
            ticks = range(0, len(momenta), -(-len(momenta) // _TICKS))
            axes.set_xticks(ticks, [f"{momenta[i]:g}" for i in ticks])
            axes.set_xlim(-0.3, len(momenta) - 0.7)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        used = readings.drop_duplicates("optimizer")
        style.legend_entries(grid[0, 0], zip(used.optimizer, used.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 6)
    what = "Each line joins runs that differ only in momentum"
    if too_many:
        what = (
            f"The median, and a band from the 10th to the 90th percentile, of {lines:,} groups of runs that differ "
            "only in momentum, which are too many to draw"
        )
    caption = (
        f"NC0–NC3 over momentum at equal training loss. {what}; each run is read at its first evaluated epoch whose "
        f"training loss is at most the lowest that all runs of its {'group' if too_many else 'line'} reach. "
        f"{about_lines(readings.optimizer)}"
        f"{'' if few or too_many else ' Thick: the median.'}"
    )
    return style.Drawing(f"momentum-{slug}", caption, figure)
