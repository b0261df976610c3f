"""Read a results folder as DataFrames: finished or not, also while a sweep writes to it, and also of older versions."""

import contextlib
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.results import columns, schema

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
    ends = query(
        folder,
        "WITH ends(run, epoch) AS (SELECT id, (SELECT MIN(epoch) FROM metrics WHERE run = id) FROM runs "
        "UNION SELECT id, (SELECT MAX(epoch) FROM metrics WHERE run = id) FROM runs) "
        "SELECT metrics.* FROM ends JOIN metrics USING (run, epoch) ORDER BY run, epoch",
        columns.EPOCH_COLUMNS,
    ).groupby("run")
    # `first` and `last` would skip NaN.
    start, last = (rows.set_index("run")[list(columns.METRICS)] for rows in (ends.head(1), ends.tail(1)))
    return _typed(runs.join(last).join(start.add_suffix("_start")).reset_index(drop=True), columns.RUN_COLUMNS)


def load_metrics(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run and evaluated epoch; NaN where a metric is undefined or was not measured.

    The columns are `columns.EPOCH_COLUMNS`, each with the same dtype whatever is missing; errors as in `load_runs`.
    """
    return query(folder, "SELECT * FROM metrics ORDER BY run, epoch", columns.EPOCH_COLUMNS)


def load_layers(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run, evaluated epoch and block, of the runs with `layers` = "all"; NaN where undefined.

    The columns are `columns.LAYER_COLUMNS`, each with the same dtype whatever is missing; errors as in `load_runs`.
    """
    return query(folder, "SELECT * FROM layers ORDER BY run, epoch, position", columns.LAYER_COLUMNS)


def _typed(frame: "pd.DataFrame", wanted: Iterable[columns.ResultColumn]) -> "pd.DataFrame":
    types = columns.dtypes(wanted)
    return frame[list(types)].astype(types)


def load_sessions(folder: Path | str) -> list[dict[str, Any]]:
    """Load each start of the sweep, oldest first: id, started, command, and versions, commit and device."""
    rows = query(folder, "SELECT * FROM sessions ORDER BY id").to_dict("records")
    return [{**json.loads(row["provenance"]), **{k: row[k] for k in ("id", "started", "command")}} for row in rows]


def load_meta(folder: Path | str) -> dict[str, str]:
    """Load the grid's name and description, the plan of its stacks, and the fingerprints of its data sets."""
    return {row["key"]: row["value"] for row in query(folder, "SELECT * FROM meta").to_dict("records")}


def query(folder: Path | str, sql: str, wanted: Iterable[columns.ResultColumn] = ()) -> "pd.DataFrame":
    """Run a query on the folder's database, in which every column of this version exists; errors as in `load_runs`.

    Returns:
        The columns `wanted`, each with its dtype; all, as SQLite has them, where none is given.
    """
    import pandas as pd

    folder, file = Path(folder), Path(folder, schema.FILE)
    if not file.is_file():
        raise NoResultsError(
            f"no results in {folder}: {file.name} is not there; make some with ncollapse sweep … --out {folder}"
        )
    try:
        with contextlib.closing(schema.connect(folder, create=False)) as connection:
            schema.check_version(connection, folder)
            schema.show_missing_columns(connection)
            frame = pd.read_sql_query(sql, connection)
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return _typed(frame, wanted) if wanted else frame
