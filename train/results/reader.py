"""What a results folder holds, as DataFrames; finished or not, also while a sweep writes to it."""

import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.results.columns import (
    METRICS,
    epoch_columns,
    epoch_dtypes,
    layer_columns,
    layer_dtypes,
    run_columns,
    run_dtypes,
)
from ncollapse.train.results.schema import FILE, check_version, connect

if TYPE_CHECKING:
    import pandas as pd


def load_runs(folder: Path | str) -> "pd.DataFrame":
    """One row per run: settings, status, and each metric at its start (`nc0_start` …) and last evaluation (`nc0` …).

    The columns are those of `columns.run_columns`, each with the same dtype whatever is missing.

    Raises:
        NoResultsError: no results there, or none yet.
        UserError: results of another version, or no database.
    """
    runs = query(folder, "SELECT * FROM runs ORDER BY position").set_index("id", drop=False)
    # A large sweep has a million rows of metrics: SQLite finds the two that are wanted of each run by their key.
    ends = select_metrics(
        folder,
        "WITH ends(run, epoch) AS (SELECT id, (SELECT MIN(epoch) FROM metrics WHERE run = id) FROM runs "
        "UNION SELECT id, (SELECT MAX(epoch) FROM metrics WHERE run = id) FROM runs) "
        "SELECT metrics.* FROM ends JOIN metrics USING (run, epoch) ORDER BY run, epoch",
    ).groupby("run")
    # head and tail, not first and last, which would pass over NaN.
    start, last = (rows.set_index("run")[list(METRICS)] for rows in (ends.head(1), ends.tail(1)))
    frame = runs.join(last).join(start.add_suffix("_start")).reset_index(drop=True)
    return frame[list(run_columns())].astype(run_dtypes())


def load_metrics(folder: Path | str) -> "pd.DataFrame":
    """One row per run and evaluated epoch; NaN where a metric is undefined.

    The columns are those of `columns.epoch_columns`, each with the same dtype whatever is missing.
    """
    return select_metrics(folder, "SELECT * FROM metrics ORDER BY run, epoch")


def select_metrics(folder: Path | str, sql: str) -> "pd.DataFrame":
    """Those rows of `load_metrics` that a query gives."""
    return query(folder, sql)[list(epoch_columns())].astype(epoch_dtypes())


def load_layers(folder: Path | str) -> "pd.DataFrame":
    """One row per run, evaluated epoch and block, of the runs with `layers` = "all"; NaN where a metric is undefined.

    The columns are those of `columns.layer_columns`, each with the same dtype whatever is missing.
    """
    return select_layers(folder, "SELECT * FROM layers ORDER BY run, epoch, position")


def select_layers(folder: Path | str, sql: str) -> "pd.DataFrame":
    """Those rows of `load_layers` that a query gives."""
    return query(folder, sql)[list(layer_columns())].astype(layer_dtypes())


def load_sessions(folder: Path | str) -> list[dict[str, Any]]:
    """Each start of the sweep, oldest first: number, when, command and what it ran on."""
    frame = query(folder, "SELECT * FROM sessions ORDER BY id")
    rows = frame.to_dict("records")
    return [{**json.loads(row["provenance"]), **{k: row[k] for k in ("id", "started", "command")}} for row in rows]


def load_meta(folder: Path | str) -> dict[str, str]:
    """The grid's name and description, how it is trained, and the fingerprints of its data sets."""
    return {row["key"]: row["value"] for row in query(folder, "SELECT * FROM meta").to_dict("records")}


def query(folder: Path | str, sql: str) -> "pd.DataFrame":
    """What a query of the folder's database gives; see `load_runs` for errors."""
    import pandas as pd

    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise NoResultsError(
            f"no results in {folder}: {FILE} is not there; make some with ncollapse sweep … --out {folder}"
        )
    try:
        connection = connect(folder, create=False)
        try:
            check_version(connection, folder)
            return pd.read_sql_query(sql, connection)
        finally:
            connection.close()
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        raise UserError(f"cannot read {folder / FILE}: {error}") from None
