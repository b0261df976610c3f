"""Runs that differ only in momentum, compared at equal training loss."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.plot.momentum_lines import draw_momentum, readings_at_equal_loss
from ncollapse.plot.settings import in_order
from ncollapse.plot.style import Drawing
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import Column, View


def at_equal_loss(runs: pd.DataFrame, results: Results, selection: Selection) -> pd.DataFrame:
    """Return the runs that reached the threshold and differ only in momentum, each at the common loss of its group.

    The columns are those of `readings_at_equal_loss`; only the epochs that are needed are read.
    """
    return readings_at_equal_loss(runs, selection.threshold, results.lowest_loss, results.first_at)


def momentum_steps(readings: pd.DataFrame) -> pd.DataFrame:
    """Return the effect of more momentum at equal loss: a row per optimizer and step from one momentum to the next.

    Columns: optimizer, lower, higher (momenta), pairs, and for each of NC0–NC3 the median over pairs of its value
    at the higher momentum divided by that at the lower one. A pair is of one seed; several seeds are one pair, with
    the median of their ratios.
    """
    ordered = readings.sort_values(["group", "momentum"])
    before = ordered.groupby("group")[["momentum", *NC]].shift()
    steps = ordered[["optimizer", "line"]].assign(lower=before.momentum, higher=ordered.momentum)
    for name in NC:
        steps[name] = ordered[name] / before[name]
    keys = ["optimizer", "lower", "higher"]
    pairs = steps.dropna(subset=["lower"]).groupby([*keys, "line"])[list(NC)].median()
    groups = pairs.groupby(keys)
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
    if readings.group.nunique() > readings.line.nunique():
        caption += " Pairs that differ only in the seed count once, with their median."
    return View(f"momentum-{slug}", caption, columns, momentum_steps(readings))


def metrics_over_momentum(slug: str, readings: pd.DataFrame, names: Sequence[str]) -> Drawing:
    """Draw metrics, four at most, over momentum, a line per setting of `at_equal_loss`."""
    return draw_momentum(f"momentum-{slug}", readings, names)
