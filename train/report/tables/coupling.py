"""Runs that differ only in their coupling, the share of the weight decay that is added to the gradient."""

import pandas as pd

from ncollapse.train.optimizers import FAMILY
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import alike, described, in_order
from ncollapse.train.report.tables.view import Column, View

#: The fewest couplings that show more than the two ends.
SHARES = 3


def interpolations(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return the runs that ended well and differ only in their coupling, in groups of three couplings or more.

    A row per run. Columns: group (a number), settings (common to the group), reached (the threshold), and those of
    `runs`; `optimizer` is the update rule, so adamw with coupling 1 counts as adam.
    """
    done = runs[runs.status == "done"]
    done = done.assign(optimizer=done.optimizer.map(FAMILY))
    done["group"] = alike(done, ignore=("coupling",))
    done["settings"] = described(done, ignore=("coupling",))
    done["reached"] = done.id.isin(selection.eligible(done).id)
    done = done.drop_duplicates(["group", "coupling"])
    shares = done.groupby("group").coupling.transform("nunique")
    return in_order(done[shares >= SHARES].sort_values(["group", "coupling"]))


def interpolations_view(slug: str, runs: pd.DataFrame) -> View:
    """Show the rows of `interpolations`."""
    columns = (
        Column.optimizer(),
        Column.text("settings"),
        Column.setting("coupling"),
        *(Column.metric(name) for name in NC),
        Column.share("val_accuracy", "val. acc."),
    )
    kept = ["optimizer", "settings", "coupling", *NC, "train_accuracy", "val_accuracy", "reached", "id"]
    return View(f"coupling-{slug}", "The runs of the figure.", columns, runs[kept])
