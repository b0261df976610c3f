"""How far NC1 and NC2 collapse without NC0 and NC3."""

import pandas as pd

from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import described, tried
from ncollapse.train.report.tables.view import Column, View


def partial_collapse(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return a row per optimizer, over its runs that reached the threshold.

    Columns: optimizer, runs, good (runs whose NC1 and NC2 are both in the better half of all runs), partial (good runs
    whose NC0 did not fall or whose NC3 is in the worse half), and of the run with the smallest NC1 its NC1, NC2, NC0
    over its start, NC3, settings and id.
    """
    eligible = selection.eligible(runs)
    settings = described(runs).set_axis(runs.id)
    middle = eligible[list(NC)].median()
    good = (eligible.nc1 <= middle.nc1) & (eligible.nc2 <= middle.nc2)
    fails = (eligible.nc0 >= eligible.nc0_start) | (eligible.nc3 > middle.nc3)
    rows = []
    for optimizer in tried(eligible):
        part = eligible[eligible.optimizer == optimizer]
        row = {
            "optimizer": optimizer,
            "runs": len(part),
            "good": int(good[part.index].sum()),
            "partial": int((good & fails)[part.index].sum()),
        }
        if part.nc1.notna().any():
            run = part.iloc[part.nc1.argmin()]
            row |= {"run": run["id"], "settings": settings[run["id"]], "nc1": run.nc1, "nc2": run.nc2}
            row |= {"nc0_over_start": run.nc0 / run.nc0_start, "nc3": run.nc3}
        rows.append(row)
    columns = ["optimizer", "runs", "good", "partial", "nc1", "nc2", "nc0_over_start", "nc3", "settings", "run"]
    return pd.DataFrame(rows, columns=columns)


def partial_view(slug: str, frame: pd.DataFrame) -> View:
    """Show the rows of `partial_collapse`."""
    columns = (
        Column.optimizer(),
        Column.count("runs"),
        Column.count("good", "NC1, NC2 good"),
        Column.count("partial", "of these partial"),
        Column.metric("nc1", "smallest NC1", best=True),
        Column.metric("nc2", "its NC2"),
        Column.metric("nc0_over_start", "its NC0 / start"),
        Column.metric("nc3", "its NC3"),
        Column.text("settings"),
    )
    caption = (
        "Good: NC1 and NC2 are both in the better half of the runs that reached the threshold. Partial: good runs "
        "whose NC0 did not fall or whose NC3 is in the worse half. The columns on the right describe the run with the "
        "smallest NC1."
    )
    return View(f"partial-{slug}", caption, columns, frame)
