"""Runs that differ only in momentum, compared at equal training loss."""

import pandas as pd

from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import alike, described, in_order
from ncollapse.train.report.tables.view import Column, View


def at_equal_loss(runs: pd.DataFrame, results: Results, selection: Selection) -> pd.DataFrame:
    """Return the runs that reached the threshold and differ only in momentum, each at the common loss of its group.

    The common loss is the lowest training loss that all runs of the group reach; a run is read at its first evaluated
    epoch with at most that loss. Columns: group (a number), optimizer, coupling, settings (common to the group),
    momentum, loss (of the group), epoch, train_loss and NC0–NC3 at that epoch, run.
    """
    eligible = selection.eligible(runs)
    eligible = eligible.assign(
        group=alike(eligible, ignore=("momentum",)), settings=described(eligible, ignore=("momentum",))
    )
    eligible = eligible[eligible.groupby("group").momentum.transform("nunique") > 1]
    lowest = eligible.id.map(results.lowest_loss(eligible.id)).astype(float)
    eligible = eligible.assign(loss=lowest.groupby(eligible.group).transform("max"))
    epochs = results.first_at(dict(zip(eligible.id, eligible.loss, strict=True)))
    columns = ["id", "group", "optimizer", "coupling", "settings", "momentum", "loss"]
    frame = eligible[columns].merge(epochs[["run", "epoch", "train_loss", *NC]], left_on="id", right_on="run")
    return in_order(frame.drop(columns="id").sort_values(["group", "momentum"]))


def momentum_steps(readings: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of more momentum at equal loss: a row per optimizer and step from one momentum to the next.

    Args:
        readings: from `at_equal_loss`.

    Returns:
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
