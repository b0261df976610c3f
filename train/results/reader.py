"""Read a results folder as DataFrames: finished or not, also while a sweep writes to it, and also of older versions."""

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.train.results import columns, schema
from ncollapse.train.results.frames import blocks, joined, with_constants
from ncollapse.train.results.own_metrics import read_metrics
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

    from ncollapse.snapshot import Snapshot


def load_runs(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run: settings, status, and each metric at its start (`nc0_start` …) and end (`nc0` …).

    The columns are those of `columns.run_columns`, each with the same dtype whatever is missing; metrics of the user's
    follow ncollapse's. A setting that the version which wrote the folder did not have is at its default, a metric that
    was not measured is NaN.

    Raises:
        NoResultsError: no results there, or none yet.
        DamageError: no database, or one with contents that no sweep has written.
        UserError: results of another format, or settings that this version does not know.
    """
    with open_results(folder) as connection:
        return read_runs(connection, Path(folder))


def read_runs(connection: sqlite3.Connection, folder: Path) -> "pd.DataFrame":
    """Read what `load_runs` loads, by a connection of `open_results`."""
    own = read_metrics(connection, folder)
    wanted = columns.run_columns(own)
    # Most settings are the same in all runs, and need not be read 100,000 times.
    same = _constants(connection)
    stored = [column.name for column in wanted if column.name in schema.TABLES["runs"] and column.name not in same]
    ends = [
        f'{which}."{name}" AS "{name}{suffix}"'
        for which, suffix in (("last", ""), ("start", "_start"))
        for name in (*columns.METRICS, *own)
    ]
    joins = [
        f"LEFT JOIN metrics AS {which} "
        f"ON {which}.run = runs.id AND {which}.epoch = (SELECT {end}(epoch) FROM metrics WHERE run = runs.id)"
        for which, end in (("last", "MAX"), ("start", "MIN"))
    ]
    # In the order of the key of `metrics`: SQLite then reads each page once, of which a large sweep has a million.
    sql = f"SELECT {schema.quoted(stored, 'runs')}, {', '.join(ends)} FROM runs {' '.join(joins)} ORDER BY runs.id"
    read = [column for column in wanted if column.name not in same]
    runs = joined(list(blocks(connection.execute(sql), read, folder))).sort_values("position", ignore_index=True)
    runs = with_constants(runs, same, wanted, folder)
    check_settings(runs, folder)
    return runs


def _constants(connection: sqlite3.Connection) -> dict[str, Any]:
    """Return the settings that have one value in all runs, with it."""
    names = [schema.quoted([name], "runs") for name in schema.SETTINGS]
    differ = ", ".join(f"max({name} IS NOT (SELECT {name} FROM runs LIMIT 1))" for name in names)
    different = connection.execute(f"SELECT {differ} FROM runs").fetchone()
    first = connection.execute(f"SELECT {', '.join(names)} FROM runs LIMIT 1").fetchone() or ()
    return {n: value for n, value, other in zip(schema.SETTINGS, first, different, strict=False) if other == 0}


def load_metrics(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run and evaluated epoch; NaN where a metric is undefined or was not measured.

    The columns are those of `columns.epoch_columns`, each with the same dtype whatever is missing; errors as in
    `load_runs`. A row takes 0.2 kB of memory: `iter_metrics` reads a sweep that is too large for that.
    """
    return joined(list(iter_metrics(folder)))


def iter_metrics(folder: Path | str) -> Iterator["pd.DataFrame"]:
    """Yield the rows of `load_metrics` in blocks of some ten thousand rows, at least one; run by run, in order.

    All blocks are of the same moment, also while a sweep writes.
    """
    with open_results(folder) as connection:
        wanted = columns.epoch_columns(read_metrics(connection, Path(folder)))
        yield from blocks(connection.execute("SELECT * FROM metrics ORDER BY run, epoch"), wanted, Path(folder))


def load_layers(folder: Path | str) -> "pd.DataFrame":
    """Load one row per run, evaluated epoch and block, of the runs with `layers` = "all"; NaN where undefined.

    The columns are `columns.LAYER_COLUMNS`, each with the same dtype whatever is missing; errors as in `load_runs`.
    """
    return joined(list(iter_layers(folder)))


def iter_layers(folder: Path | str) -> Iterator["pd.DataFrame"]:
    """Yield the rows of `load_layers` as `iter_metrics` does."""
    with open_results(folder) as connection:
        rows = connection.execute("SELECT * FROM layers ORDER BY run, epoch, position")
        yield from blocks(rows, columns.LAYER_COLUMNS, Path(folder))


def load_geometry(folder: Path | str, runs: Iterable[str] | None = None) -> "dict[str, dict[int, Snapshot]]":
    """Load the geometry of runs: id -> epoch -> `Snapshot`, in the order of the epochs.

    It is kept at the start, at the evaluated epochs nearest to each quarter of all, and at a run's end, unless its
    weights are not finite. Folders of versions that kept none have none. Errors as in `load_runs`.

    Args:
        runs: their ids; None: all. Those without geometry are left out.
    """
    with open_results(folder) as connection:
        return read_geometry(connection, Path(folder), runs)


def read_geometry(
    connection: sqlite3.Connection, folder: Path, runs: Iterable[str] | None = None
) -> "dict[str, dict[int, Snapshot]]":
    """Read what `load_geometry` loads, by a connection of `open_results`."""
    from ncollapse.snapshot import Snapshot

    of_runs = "" if runs is None else "WHERE run IN (SELECT value FROM json_each(?))"
    rows = connection.execute(
        f"SELECT run, epoch, content FROM geometry {of_runs} ORDER BY run, epoch",
        () if runs is None else (json.dumps(list(runs)),),
    )
    found: dict[str, dict[int, Snapshot]] = {}
    for run, epoch, content in rows:
        if not isinstance(run, str) or type(epoch) is not int:
            raise damaged(folder / schema.FILE, "the geometry of a run is of no run or epoch")
        try:
            found.setdefault(run, {})[epoch] = Snapshot.from_bytes(content)
        except ValueError as error:
            raise damaged(folder / schema.FILE, f"the geometry of run {run} at epoch {epoch}: {error}") from None
    return found


def load_own_metrics(folder: Path | str) -> columns.OwnMetrics:
    """Load the metrics of the user's that a folder has: name -> meaning; errors as in `load_runs`."""
    with open_results(folder) as connection:
        return read_metrics(connection, Path(folder))


def load_sessions(folder: Path | str) -> list[dict[str, Any]]:
    """Load each start of the sweep, oldest first: id, started, command, and versions, commit and device."""
    with open_results(folder) as connection:
        return read_sessions(connection, Path(folder))


def read_sessions(connection: sqlite3.Connection, folder: Path) -> list[dict[str, Any]]:
    """Read what `load_sessions` loads, by a connection of `open_results`."""
    found = connection.execute("SELECT * FROM sessions ORDER BY id")
    names = [column[0] for column in found.description]
    return [session_facts(dict(zip(names, row, strict=True)), folder) for row in found]


def load_meta(folder: Path | str) -> dict[str, str]:
    """Load the grid's name and description, the plan of its stacks, what its data and code were, and its metrics."""
    with open_results(folder) as connection:
        return read_meta(connection, Path(folder))


def read_meta(connection: sqlite3.Connection, folder: Path) -> dict[str, str]:
    """Read what `load_meta` loads, by a connection of `open_results`."""
    meta = dict(connection.execute("SELECT key, value FROM meta"))
    if "grid" not in meta or not all(isinstance(text, str) for pair in meta.items() for text in pair):
        raise damaged(folder / schema.FILE, "the grid's name or another text is missing")
    return meta


def query(
    folder: Path | str, sql: str, wanted: Collection[columns.ResultColumn] = (), parameters: Sequence[Any] = ()
) -> "pd.DataFrame":
    """Run a query on the folder's database, in which every column of this version exists; errors as in `load_runs`.

    Returns:
        The columns `wanted`, each with its dtype; all, as SQLite has them, where none is given.
    """
    import pandas as pd

    with open_results(folder) as connection:
        if wanted:
            return joined(list(blocks(connection.execute(sql, parameters), wanted, Path(folder))))
        found = connection.execute(sql, parameters)
        return pd.DataFrame.from_records(found.fetchall(), columns=[column[0] for column in found.description])


@contextlib.contextmanager
def open_results(folder: Path | str) -> Iterator[sqlite3.Connection]:
    """Open the folder's database for reading, in which every column of this version exists; errors as in `load_runs`.

    All queries see the same moment, also while a sweep writes.
    """
    folder, file = Path(folder), Path(folder, schema.FILE)
    if not file.is_file():
        raise no_results(folder)
    try:
        with contextlib.closing(schema.connect(folder, create=False)) as connection:
            connection.execute("BEGIN")
            if schema.is_empty(connection):
                check_not_lost(folder)
            schema.check_version(connection, folder)
            check_tables(connection, folder)
            check_plan(connection, folder)
            schema.show_missing_columns(connection, read_metrics(connection, folder))
            yield connection
    except (sqlite3.Error, OverflowError) as error:
        raise cannot_read(file, error) from None
