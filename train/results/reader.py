"""Read a results folder as DataFrames: finished or not, also while a sweep writes to it, and also of older versions."""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.results.columns import (
    EPOCH_COLUMNS,
    LAYER_COLUMNS,
    METRICS,
    RUN_COLUMNS,
    ResultColumn,
    dtypes,
)
from ncollapse.train.results.schema import FILE, check_version, connect, show_missing_columns

if TYPE_CHECKING:
    import pandas as pd


def load_runs(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run: settings, status, and each metric at its start (`nc0_start` …) and end (`nc0` …).

    The columns are `columns.RUN_COLUMNS`, each with the same dtype whatever is missing. A setting that the version
    which wrote the folder did not have is at its default, a metric that it did not measure is NaN.

    Raises:
        NoResultsError: no results there, or none yet.
        UserError: results of another format, or no database.
    """
    runs = query(folder, "SELECT * FROM runs ORDER BY position").set_index("id", drop=False)
    # A large sweep has a million rows of metrics: SQLite finds the first and the last of each run by their key.
    ends = select_metrics(
        folder,
        "WITH ends(run, epoch) AS (SELECT id, (SELECT MIN(epoch) FROM metrics WHERE run = id) FROM runs "
        "UNION SELECT id, (SELECT MAX(epoch) FROM metrics WHERE run = id) FROM runs) "
        "SELECT metrics.* FROM ends JOIN metrics USING (run, epoch) ORDER BY run, epoch",
    ).groupby("run")
    # `first` and `last` would skip NaN.
    start, last = (rows.set_index("run")[list(METRICS)] for rows in (ends.head(1), ends.tail(1)))
    return _typed(runs.join(last).join(start.add_suffix("_start")).reset_index(drop=True), RUN_COLUMNS)


def load_metrics(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run and evaluated epoch; NaN where a metric is undefined or was not measured.

    The columns are `columns.EPOCH_COLUMNS`, each with the same dtype whatever is missing; errors as in `load_runs`.
    """
    return select_metrics(folder, "SELECT * FROM metrics ORDER BY run, epoch")


def select_metrics(folder: Path | str, sql: str) -> "pd.DataFrame":
    """Load the rows of `load_metrics` that a query selects."""
    return _typed(query(folder, sql), EPOCH_COLUMNS)


def load_layers(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run, evaluated epoch and block, of the runs with `layers` = "all"; NaN where undefined.

    The columns are `columns.LAYER_COLUMNS`, each with the same dtype whatever is missing; errors as in `load_runs`.
    """
    return select_layers(folder, "SELECT * FROM layers ORDER BY run, epoch, position")


def select_layers(folder: Path | str, sql: str) -> "pd.DataFrame":
    """Load the rows of `load_layers` that a query selects."""
    return _typed(query(folder, sql), LAYER_COLUMNS)


def _typed(frame: "pd.DataFrame", columns: Iterable[ResultColumn]) -> "pd.DataFrame":
    types = dtypes(columns)
    return frame[list(types)].astype(types)


def load_sessions(folder: Path | str) -> list[dict[str, Any]]:
    """Load each start of the sweep, oldest first: id, started, command, and versions, commit and device."""
    frame = query(folder, "SELECT * FROM sessions ORDER BY id")
    rows = frame.to_dict("records")
    return [{**json.loads(row["provenance"]), **{k: row[k] for k in ("id", "started", "command")}} for row in rows]


def load_meta(folder: Path | str) -> dict[str, str]:
    """Load the grid's name and description, the plan of its stacks, and the fingerprints of its data sets."""
    return {row["key"]: row["value"] for row in query(folder, "SELECT * FROM meta").to_dict("records")}


def query(folder: Path | str, sql: str) -> "pd.DataFrame":
    """Run a query on the folder's database, in which every column of this version exists; errors as in `load_runs`."""
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
            show_missing_columns(connection)
            return pd.read_sql_query(sql, connection)
        finally:
            connection.close()
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        raise UserError(f"cannot read {folder / FILE}: {error}") from None
