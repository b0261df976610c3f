"""Metrics over momentum, runs that differ only in it compared at equal training loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ncollapse.plot import style
from ncollapse.plot.frames import complete, over_seeds, plain, reached
from ncollapse.plot.looks import about_lines, shown
from ncollapse.plot.settings import alike, described, in_order
from ncollapse.plot.style import Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Figure

#: The metrics that are read at equal loss.
READ = ("nc0", "nc1", "nc2", "nc3")
#: Lines beyond which they are thin, with their median, and beyond which only the median and a band are drawn.
_MANY_LINES, _MOST_LINES = 40, 400
#: Ticks of the axis of momenta, at most.
_TICKS = 12


def over_momentum(runs: pd.DataFrame, epochs: pd.DataFrame, *, threshold: float = 0.999) -> "Figure":
    """Draw NC0–NC3 over momentum at equal training loss, a panel each.

    A line joins runs that differ in momentum only. Each is read at its first evaluated epoch whose training loss is at
    most the lowest that all of them reach. The lines of several seeds are one, their median, with a band over their
    range.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: id, optimizer, momentum. Used where they
            are there: coupling; the other settings and seed, which tell what a line is; status and train_accuracy.
        epochs: a row per run and evaluated epoch, as `load_metrics` returns it. Needed: run, epoch, train_loss, nc0,
            nc1, nc2, nc3.
        threshold: training accuracy that runs must reach to count.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("momentum.png")`. `figure.get_label()` says
        what it shows.

    Raises:
        ValueError: a missing column, or no two runs that reached the threshold and differ in momentum only.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.over_momentum(load_runs("results"), load_metrics("results"), threshold=0.99).savefig("momentum.png")
    """
    epochs = plain("over_momentum", "epochs", epochs, ("run", "epoch", "train_loss", *READ))
    runs = complete("over_momentum", runs, ("id", "momentum"))
    epochs = epochs[epochs.run.isin(runs["id"])].sort_values("epoch")

    def lowest_loss(ids: Iterable[str]) -> "pd.Series[float]":
        return epochs[epochs.run.isin(list(ids))].groupby("run").train_loss.min()

    def first_at(losses: Mapping[str, float]) -> pd.DataFrame:
        return epochs[epochs.train_loss <= epochs.run.map(losses).astype(float)].drop_duplicates("run")

    readings = readings_at_equal_loss(runs, threshold, lowest_loss, first_at)
    if readings.empty:
        raise ValueError(
            f"plot.over_momentum: no two of the {len(runs)} runs reached {100 * threshold:g} % training accuracy and "
            "differ in nothing but their momentum"
        )
    with shown(readings.optimizer):
        return draw_momentum("over_momentum", readings, READ).labelled()


def readings_at_equal_loss(
    runs: pd.DataFrame, threshold: float, lowest_loss: Callable[[Iterable[str]], "pd.Series[float]"],
    first_at: Callable[[Mapping[str, float]], pd.DataFrame],
) -> pd.DataFrame:  # fmt: skip
    """Return the runs that reached the threshold and differ only in momentum, each at the common loss of its group.

    The common loss is the lowest training loss that all runs of the group reach; a run is read at its first evaluated
    epoch with at most that loss. Columns: group (a number), line (a number: groups that differ only in the seed share
    one), optimizer, coupling, settings (common to the group), momentum, loss (of the group), epoch, train_loss and
    NC0–NC3 at that epoch, run.

    Args:
        lowest_loss: returns the smallest training loss of runs, indexed by run.
        first_at: returns the rows of the first epoch of each run whose training loss is at most the given one.
    """
    fit = runs[reached(runs, threshold)]
    fit = fit.assign(
        group=alike(fit, ["momentum"]), line=alike(fit, ["momentum", "seed"]), settings=described(fit, ["momentum"])
    )
    fit = fit[fit.groupby("group").momentum.transform("nunique") > 1]
    lowest = fit.id.map(lowest_loss(fit.id)).astype(float)
    fit = fit.assign(loss=lowest.groupby(fit.group).transform("max"))
    epochs = first_at(dict(zip(fit.id, fit.loss, strict=True)))
    columns = ["id", "group", "line", "optimizer", "coupling", "settings", "momentum", "loss"]
    frame = fit[columns].merge(epochs[["run", "epoch", "train_loss", *READ]], left_on="id", right_on="run")
    return in_order(frame.drop(columns="id").sort_values(["group", "momentum"]))


def draw_momentum(name: str, readings: pd.DataFrame, metrics: Sequence[str]) -> Drawing:
    """Draw metrics, four at most, over momentum: a panel per metric, a line per setting of `readings_at_equal_loss`."""
    rows = in_order(over_seeds(readings.sort_values(["line", "momentum"]), ["line", "momentum"], metrics))
    momenta = np.sort(rows.momentum.unique())
    lines, several = rows.line.nunique(), bool((rows.seeds > 1).any())
    few, too_many = lines <= _MANY_LINES, lines > _MOST_LINES
    groups = [] if too_many else [group for _, group in rows.groupby("line", sort=False)]
    look: dict[str, Any] = {"alpha": 0.25, "lw": 0.7}
    if few:
        look = {"marker": "o", "markersize": 3.5, "alpha": 0.8, "lw": 1.3}
    with style.styled():
        figure, grid = style.panels(2, 2, (7.6, 6.0), gaps=(0.6, 0.8))
        for axes, metric in zip(grid.flat, metrics, strict=False):
            style.scale(axes, "y", rows[metric])
            for group in groups:
                line = style.line(group.optimizer.iloc[0], group.coupling.iloc[0])
                at = np.searchsorted(momenta, group.momentum)
                axes.plot(at, group[metric], **line, **look)
                if several and few:
                    low, high = group[f"{metric}_low"], group[f"{metric}_high"]
                    axes.fill_between(at, low, high, color=line["color"], alpha=0.12, linewidth=0)
            if not few:
                style.medians(axes, rows, "momentum", metric, momenta, band=too_many)
            axes.set_title(style.title_of(metric))
            axes.set_xlabel("momentum β")
            # At places 0, 1, …: 1 − β spans decades, and 0 is among the momenta, so no scale suits.
            ticks = range(0, len(momenta), -(-len(momenta) // _TICKS))
            axes.set_xticks(ticks, [f"{momenta[i]:g}" for i in ticks])
            axes.set_xlim(-0.3, len(momenta) - 0.7)
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        used = rows.assign(coupled=rows.coupling > 0).drop_duplicates(["optimizer", "coupled"])
        style.legend_entries(grid[0, 0], zip(used.optimizer, used.coupling, strict=True))
        style.one_legend(figure, grid[0, 0], 6)
    return Drawing(name, _caption(rows, few=few, too_many=too_many, several=several), figure)


def _caption(rows: pd.DataFrame, *, few: bool, too_many: bool, several: bool) -> str:
    what = "Each line joins runs that differ only in momentum"
    if several:
        what = "Each line joins settings that differ only in momentum: the median over their seeds"
        what += ", with a band over the range of the seeds" * few
    if too_many:
        medians = ", medians over seeds," if several else ""
        what = (
            f"The median, and a band from the 10th to the 90th percentile, of {rows.line.nunique():,} groups of runs "
            f"that differ only in momentum{medians or ','} which are too many to draw"
        )
    of_all = "group" if too_many else "line, with the same seed," if several else "line"
    return (
        f"NC0–NC3 over momentum at equal training loss. {what}; each run is read at its first evaluated epoch whose "
        f"training loss is at most the lowest that all runs of its {of_all} reach. {about_lines(rows.optimizer)}"
        f"{'' if few or too_many else ' Thick: the median.'}"
    )
