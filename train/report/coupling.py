"""Runs that differ only in their coupling, the share of the weight decay that is added to the gradient."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.plot.coupling_lines import SHARES, coupled_lines, draw_coupling, medians_over_seeds
from ncollapse.plot.style import Drawing
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.view import Column, View

__all__ = ["SHARES", "interpolations", "interpolations_view", "metrics_over_coupling"]


def interpolations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return the runs that ended well and differ only in their coupling, as `coupled_lines` does."""
    return coupled_lines(runs, selection.threshold)


def interpolations_view(slug: str, runs: pd.DataFrame) -> View:
    """Show the points of the figure: the rows of `interpolations`, those that differ only in the seed as one."""
    shown = [*NC, "train_accuracy", "val_accuracy"]
    frame = medians_over_seeds(runs, shown)
    kept = ["optimizer", "settings", "coupling", *shown, "reached", "id"]
    columns = [Column.optimizer(), Column.text("settings"), Column.setting("coupling")]
    caption = "The runs of the figure."
    if (frame.seeds > 1).any():
        kept += ["seeds", *(f"{name}_{end}" for name in shown for end in ("low", "high"))]
        columns.append(Column.count("seeds"))
        caption = "The points of the figure: the median over the seeds, below it their range."
    columns += [*(Column.metric(name) for name in NC), Column.share("val_accuracy", "val. acc.")]
    return View(f"coupling-{slug}", caption, columns, frame[kept])


def metrics_over_coupling(slug: str, runs: pd.DataFrame, names: Sequence[str]) -> Drawing:
    """Draw final metrics, five at most, over the coupling, a line per setting of `interpolations`."""
    return draw_coupling(f"coupling-{slug}", runs, names)
