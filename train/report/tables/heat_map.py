"""The cells of the heat maps: final metrics over weight decay and learning rate or momentum."""

import pandas as pd

from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import in_order

#: Setting on the vertical axis -> its name in texts.
AXES = {"lr": "learning rate", "momentum": "momentum β"}


def cells(runs: pd.DataFrame, axis: str, selection: Selection) -> pd.DataFrame:
    """Return final metrics over weight decay and the setting `axis`: a row per optimizer and cell with a finished run.

    The value of a cell is the smallest of its runs that reached the threshold; where none did, of all its runs that
    ended well. Columns: optimizer, weight_decay, `axis`, done, reached, missed (counts), NC0–NC3.
    """
    runs = runs[runs.status.isin(("done", "diverged", "degenerate"))]
    done = runs.status == "done"
    reached = runs.id.isin(selection.eligible(runs).id)
    keys = ["optimizer", "weight_decay", axis]
    groups = runs.assign(done=done, reached=reached, missed=~reached).groupby(keys)
    frame = groups[["done", "reached", "missed"]].sum()
    best = runs[reached].groupby(keys)[list(NC)].min()
    others = runs[done].groupby(keys)[list(NC)].min()
    frame[list(NC)] = best.reindex(frame.index).where(frame.reached > 0, others.reindex(frame.index))
    return in_order(frame.reset_index())
