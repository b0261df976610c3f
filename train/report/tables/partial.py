"""How far NC1 and NC2 collapse without NC0 and NC3."""

import pandas as pd

from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.settings import described, tried
from ncollapse.train.report.tables.view import View, count_column, metric_column, optimizer_column, text_column


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
        optimizer_column(),
        count_column("runs"),
        count_column("good", "NC1, NC2 good"),
        count_column("partial", "of these partial"),
        metric_column("nc1", "smallest NC1", best=True),
        metric_column("nc2", "its NC2"),
        metric_column("nc0_over_start", "its NC0 / start"),
        metric_column("nc3", "its NC3"),
        text_column("settings"),
    )
    caption = (
        "Good: NC1 and NC2 are both in the better half of the runs that reached the threshold. Partial: good runs "
        "whose NC0 did not fall or whose NC3 is in the worse half. The columns on the right describe the run with the "
        "smallest NC1."
    )
    return View(f"partial-{slug}", caption, columns, frame)
