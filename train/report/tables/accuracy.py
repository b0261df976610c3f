"""Rank correlations of validation accuracy with the metrics."""

import pandas as pd

from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import tried
from ncollapse.train.report.tables.view import Column, View


def rank_correlations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return Spearman's rank correlation of validation accuracy with each metric, over the eligible runs.

    A row per optimizer and metric, the optimizer "all" first. Columns: optimizer, metric, correlation (NaN where either
    does not vary), runs.
    """
    eligible = selection.eligible(runs).dropna(subset=["val_accuracy"])
    rows = []
    for optimizer in ("all", *tried(eligible)):
        part = eligible if optimizer == "all" else eligible[eligible.optimizer == optimizer]
        for name in NC:
            both = part[[name, "val_accuracy"]].dropna().rank()
            varies = (both.nunique() > 1).all()
            rows.append((optimizer, name, both[name].corr(both.val_accuracy) if varies else float("nan"), len(both)))
    return pd.DataFrame(rows, columns=["optimizer", "metric", "correlation", "runs"])


def correlations_view(slug: str, runs: pd.DataFrame, selection: Selection) -> View:
    """Show `rank_correlations`, a row per optimizer."""
    frame = rank_correlations(runs, selection)
    wide = frame.pivot(index="optimizer", columns="metric", values="correlation").reset_index()
    wide["runs"] = wide.optimizer.map(frame.groupby("optimizer").runs.max())
    wide = wide.set_index("optimizer").loc[list(dict.fromkeys(frame.optimizer))].reset_index()
    columns = (Column.optimizer(), Column.count("runs"), *(Column.metric(name) for name in NC))
    caption = (
        "Spearman's rank correlation of validation accuracy with each metric: −1 where more collapse (a smaller "
        "metric) always goes with a higher accuracy, 0 where they are unrelated."
    )
    return View(f"accuracy-{slug}", caption, columns, wide)
