"""Read a results folder as DataFrames: finished or not, also while a sweep writes to it, and also of older versions."""

import contextlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.train.results import columns, schema
from ncollapse.train.results.storage_errors import cannot_read, damaged
from ncollapse.train.results.validation import (
    check_not_lost,
    check_plan,
    check_settings,
    check_tables,
    no_results,
    session_facts,
)

if TYPE_CHECKING:
    import pandas as pd


def load_runs(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run: settings, status, and each metric at its start (`nc0_start` …) and end (`nc0` …).

    The columns are `columns.RUN_COLUMNS`, each with the same dtype whatever is missing. A setting that the version
    which wrote the folder did not have is at its default, a metric that it did not measure is NaN.

    Raises:
        NoResultsError: no results there, or none yet.
        DamageError: no database, or one with contents that no sweep has written.
        UserError: results of another format, or settings that this version does not know.
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
    runs = runs.join(last).join(start.add_suffix("_start")).reset_index(drop=True)
    runs = _typed(runs, columns.RUN_COLUMNS, Path(folder))
    check_settings(runs, Path(folder))
    return runs


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


def _typed(frame: "pd.DataFrame", wanted: Iterable[columns.ResultColumn], folder: Path) -> "pd.DataFrame":
    import numpy as np

    types = columns.dtypes(wanted)
    frame = frame[list(types)]
    try:
        with np.errstate(invalid="ignore"):  # what is no integer is found below
            typed = frame.astype(types)
    except (ValueError, TypeError, OverflowError) as error:
        raise damaged(folder / schema.FILE, f"a number is none: {str(error)[:100]}") from None
    for name, dtype in types.items():
        # pandas cuts what is no integer.
        if dtype == "int64" and frame[name].dtype.kind != "i" and (frame[name] != typed[name]).any():
            raise damaged(folder / schema.FILE, f"{name} is not an integer everywhere")
        # An object column holds text or bytes, of which pandas makes text or numbers.
        if frame[name].dtype == object and dtype != "string" and frame[name].map(type).isin((str, bytes)).any():
            raise damaged(folder / schema.FILE, f"{name} is not a number everywhere")
    return typed


def load_sessions(folder: Path | str) -> list[dict[str, Any]]:
    """Load each start of the sweep, oldest first: id, started, command, and versions, commit and device."""
    rows = query(folder, "SELECT * FROM sessions ORDER BY id").to_dict("records")
    return [session_facts(row, Path(folder)) for row in rows]


def load_meta(folder: Path | str) -> dict[str, str]:
    """Load the grid's name and description, the plan of its stacks, and the fingerprints of its data sets."""
    meta = {row["key"]: row["value"] for row in query(folder, "SELECT * FROM meta").to_dict("records")}
    if "grid" not in meta or not all(isinstance(text, str) for pair in meta.items() for text in pair):
        raise damaged(Path(folder, schema.FILE), "the grid's name or another text is missing")
    return meta


def query(folder: Path | str, sql: str, wanted: Iterable[columns.ResultColumn] = ()) -> "pd.DataFrame":
    """Run a query on the folder's database, in which every column of this version exists; errors as in `load_runs`.

    Returns:
        The columns `wanted`, each with its dtype; all, as SQLite has them, where none is given.
    """
    import pandas as pd

    folder, file = Path(folder), Path(folder, schema.FILE)
    if not file.is_file():
        raise no_results(folder)
    try:
        with contextlib.closing(schema.connect(folder, create=False)) as connection:
            if schema.is_empty(connection):
                check_not_lost(folder)
            schema.check_version(connection, folder)
            check_tables(connection, folder)
            check_plan(connection, folder)
            schema.show_missing_columns(connection)
            frame = pd.read_sql_query(sql, connection)
    except (sqlite3.Error, pd.errors.DatabaseError, OverflowError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, sqlite3.Error) else error
        raise cannot_read(file, cause) from None
    return _typed(frame, wanted, folder) if wanted else frame
