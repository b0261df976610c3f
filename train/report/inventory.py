"""What was run: runs by optimizer and by how they ended, and the values of every setting."""

from typing import Any

import pandas as pd

from ncollapse.plot.settings import USUAL_LOSS, in_order, written
from ncollapse.train.config import DESCRIPTIONS, FIELDS
from ncollapse.train.formatting import duration
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.view import Cell, Column, View
from ncollapse.train.results.schema import FINISHED

#: Values of a setting beyond which only their number, the first and the last are shown.
_LISTED = 12


def what_was_run(runs: pd.DataFrame, selection: Selection) -> pd.DataFrame:
    """Return a row per model, data set, loss and optimizer: runs by status, those that reached the threshold, seconds.

    Without the loss where all have cross-entropy.
    """
    keys = [name for name in ("model", "data", "loss") if name != "loss" or (runs.loss != USUAL_LOSS).any()]
    runs = runs.assign(reached=runs.id.isin(selection.eligible(runs).id))
    for status in FINISHED:
        runs[status] = runs.status == status
    runs["unfinished"] = ~runs.status.isin(FINISHED)
    counted = ["reached", *FINISHED, "unfinished"]
    groups = runs.groupby([*keys, "optimizer"], sort=False)
    frame = groups[counted].sum().assign(runs=groups.size(), seconds=groups.seconds.sum()).reset_index()
    frame["place"] = frame.groupby(keys, sort=False).ngroup()
    frame = in_order(frame).sort_values("place", kind="stable")
    return frame[[*keys, "optimizer", "runs", *FINISHED, "unfinished", "reached", "seconds"]]


def runs_view(runs: pd.DataFrame, selection: Selection) -> View:
    """Show `what_was_run`."""
    frame = what_was_run(runs, selection)
    columns = (
        *(Column.text(name) for name in ("model", "data", "loss") if name in frame),
        Column.optimizer(),
        *(Column.count(name) for name in ("runs", *FINISHED, "unfinished")),
        Column.count("reached", "reached the threshold"),
        Column("time", lambda row: Cell(duration(row.seconds), value=float(row.seconds))),
    )
    caption = (
        "Diverged: the loss was not finite. Degenerate: features or weights vanished. Hopeless: ended early by "
        "--stop-hopeless, since the training loss had not left chance level. Failed: code of your own raised an error, "
        "whose traceback is in failures/ in the results folder. The threshold is "
        f"{selection.percent} training accuracy. Time: training and evaluation, each run's share of its stack's time."
    )
    return View("runs-by-optimizer", caption, columns, frame)


def settings_view(runs: pd.DataFrame) -> View:
    """Show every setting with its values in these runs and its meaning."""
    rows = [(f.name, _values(runs[f.name]), DESCRIPTIONS[f.name]) for f in FIELDS if f.name in runs]
    frame = pd.DataFrame(rows, columns=["setting", "values", "meaning"])
    columns = (Column.text("setting"), Column.text("values"), Column.text("meaning", "what it is"))
    return View("grid", "Every setting with the values that it took.", columns, frame)


def _values(column: "pd.Series[Any]") -> str:
    values = list(column.dropna().unique())
    if pd.api.types.is_numeric_dtype(column.dtype):
        values.sort()
    texts = [written(v) for v in values] + ["none"] * bool(column.isna().any())
    if len(texts) <= _LISTED:
        return ", ".join(texts)
    return f"{len(texts)} values, {texts[0]} … {texts[-1]}"
