"""The format of a results folder's database, and how it grows.

Tables: `runs`, one row per run of the grid with its settings and status; `metrics`, one row per run and evaluated
epoch; `layers`, the same per block, of runs with `layers` = "all"; `geometry`, the bytes of a `Snapshot` per run and
epoch of `shown_epochs`; `stacks`, the runs that train side by side, with their progress; `sessions`, one row per
start of a sweep with command, versions, commit and device; `meta`.

A column can be added in any version: it has a default or may be NULL; a table too, which `LATER` names. A database
that lacks it is completed when a sweep opens it, and read as if it were there; the table is then empty.
`SCHEMA_VERSION` rises only for changes that this cannot express. The columns of settings are those of `runs` without a
declared type. `metrics` also has a column for each metric of the user's that `meta` names (`own_metrics`).
"""

import sqlite3
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ncollapse.formatting import setting_value
from ncollapse.train.config import FIELDS
from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.results.columns import LAYER_METRICS, METRICS

FILE = "runs.sqlite"
SCHEMA_VERSION = 3

#: The statuses of a run that has ended (diverged: NaN or inf; degenerate: features or weights have vanished; hopeless:
#: ended by `--stop-hopeless`, its training loss had not left chance level; failed: code of the user's raised an error),
#: and all.
FINISHED = ("done", "diverged", "degenerate", "hopeless", "failed")
STATUSES = (*FINISHED, "running", "pending")
#: `FINISHED` in SQL.
ENDED = ", ".join(f"'{status}'" for status in FINISHED)
SETTINGS = tuple(field.name for field in FIELDS)


def quoted(names: Iterable[str], table: str = "") -> str:
    """Return the names of columns as SQL.

    Args:
        table: qualifies the names. SQLite takes an unknown name in double quotes for a string, but not a qualified one.
    """
    prefix = f'"{table}".' if table else ""
    return ", ".join(prefix + '"' + name.replace('"', '""') + '"' for name in names)


def _literal(value: Any) -> str:
    """Return the default of a setting as SQL."""
    if value is None:
        return "NULL"
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


_RUN = {"run": "TEXT NOT NULL REFERENCES runs", "epoch": "INTEGER NOT NULL"}

#: Table -> column -> declaration. The default of a setting is that of older runs, which were trained with it.
TABLES: dict[str, dict[str, str]] = {
    "meta": {"key": "TEXT PRIMARY KEY", "value": "TEXT NOT NULL"},
    "sessions": {
        "id": "INTEGER PRIMARY KEY",
        **dict.fromkeys(("started", "command", "provenance"), "TEXT NOT NULL"),
    },
    "stacks": {
        "id": "INTEGER PRIMARY KEY",
        "size": "INTEGER NOT NULL",
        "branches": "INTEGER NOT NULL DEFAULT 0",
        "session": "INTEGER REFERENCES sessions",
        "updated": "TEXT",
        "begun_epoch": "INTEGER NOT NULL DEFAULT 0",
        "epoch": "INTEGER NOT NULL DEFAULT 0",
        "checkpoint": "TEXT",
        "checkpoint_epoch": "INTEGER",
    },
    "runs": {
        "id": "TEXT PRIMARY KEY",
        "position": "INTEGER NOT NULL",
        "status": "TEXT NOT NULL",
        **{field.name: f"DEFAULT {_literal(field.default)}" for field in FIELDS},
        "stack": "INTEGER REFERENCES stacks",
        "session": "INTEGER REFERENCES sessions",
        "train_samples": "INTEGER",
        "seconds": "REAL",
        "diverged_epoch": "INTEGER",
        "digest": "TEXT",
    },
    "metrics": {**_RUN, **dict.fromkeys(METRICS, "REAL")},
    "layers": {
        **_RUN,
        "position": "INTEGER NOT NULL",
        "layer": "TEXT NOT NULL",
        **dict.fromkeys(LAYER_METRICS, "REAL"),
    },
    "geometry": {**_RUN, "content": "BLOB NOT NULL"},
}
#: The tables that not every database of this format has.
LATER = ("geometry",)
#: The tables of what was measured of runs: their rows come and go with those of `metrics`.
MEASURED = ("metrics", "layers", "geometry")
#: Without it every stack that begins would read all runs.
_INDEXES = {"runs_by_stack": "runs (stack)"}
_KEYS = {
    "metrics": "PRIMARY KEY (run, epoch)",
    "layers": "PRIMARY KEY (run, epoch, position)",
    "geometry": "PRIMARY KEY (run, epoch)",
}
#: Their rows lie in the order of the key; one of more than a kilobyte would take a page more there.
_IN_ORDER = ("metrics", "layers")


def connect(folder: Path, *, create: bool) -> sqlite3.Connection:
    """Connect to the folder's database."""
    # Never opened read-only: after a crash even a reader has to roll the last transaction back. In a folder that may
    # not be written to, SQLite itself falls back to reading.
    uri = (folder / FILE).resolve().as_uri()
    connection = _connect(f"{uri}?mode={'rwc' if create else 'rw'}")
    try:
        # A committed transaction survives a loss of power. This reads the file, which may be no database.
        connection.execute("PRAGMA synchronous = EXTRA")
    except sqlite3.OperationalError as error:
        connection.close()
        # A database that logs ahead, whose log is gone, in a folder where none can be made: nobody writes to it.
        cannot_log = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if create or not cannot_log or not (folder / FILE).is_file() or (folder / f"{FILE}-wal").exists():
            raise
        connection = _connect(f"{uri}?mode=ro&immutable=1")
    except UnicodeDecodeError as error:  # of the message with which SQLite refuses a damaged table
        connection.close()
        raise sqlite3.DatabaseError(f"Could not decode to UTF-8: {error}") from None
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)


def tables_with(own: Collection[str]) -> dict[str, dict[str, str]]:
    """Return `TABLES` with the columns of these metrics of the user's."""
    return {**TABLES, "metrics": {**TABLES["metrics"], **dict.fromkeys(own, "REAL")}}


def create_tables(connection: sqlite3.Connection, own: Collection[str] = ()) -> None:
    """Create all tables of an empty database, with the columns of these metrics of the user's."""
    for table, columns in tables_with(own).items():
        _create_table(connection, table, columns)
    create_indexes(connection)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _create_table(connection: sqlite3.Connection, table: str, columns: dict[str, str]) -> None:
    parts = [f"{quoted([name])} {declaration}" for name, declaration in columns.items()]
    rows = ", ".join([*parts, _KEYS[table]] if table in _KEYS else parts)
    connection.execute(f"CREATE TABLE {table} ({rows})" + (" WITHOUT ROWID" if table in _IN_ORDER else ""))


def create_indexes(connection: sqlite3.Connection) -> None:
    """Create the indexes that the database lacks; any version of this package can read it with and without them."""
    for name, what in _INDEXES.items():
        connection.execute(f"CREATE INDEX IF NOT EXISTS {name} ON {what}")


def is_empty(connection: sqlite3.Connection) -> bool:
    """Return whether nothing was ever committed: a sweep is just starting there, or was killed as it started."""
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def check_version(connection: sqlite3.Connection, folder: Path) -> None:
    """Raise `NoResultsError` for a database with nothing in it yet, `UserError` for one of another format."""
    if is_empty(connection):
        raise NoResultsError(
            f"no results in {folder} yet: the sweep that makes them is just starting; if it was stopped as it started, "
            "the same command starts it again"
        )
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder / FILE} has format {version}, this ncollapse reads {SCHEMA_VERSION}; "
            "use the version that wrote it"
        )


def add_missing_columns(connection: sqlite3.Connection, own: Collection[str] = ()) -> None:
    """Add what a database lacks: tables; settings with their default; metrics, also those in `own`, as NULL."""
    tables = tables_with(own)
    for table, missing in _missing_columns(connection, tables):
        if len(missing) == len(tables[table]):
            _create_table(connection, table, tables[table])
            continue
        for name in missing:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {quoted([name])} {tables[table][name]}")


def show_missing_columns(connection: sqlite3.Connection, own: Collection[str] = ()) -> None:
    """Let the connection's queries see what `add_missing_columns` would add; the file stays as it is."""
    tables = tables_with(own)
    for table, missing in _missing_columns(connection, tables):
        columns = [
            f"{_default(declaration) if name in missing else quoted([name], table)} AS {quoted([name])}"
            for name, declaration in tables[table].items()
        ]
        # A temporary view hides the table of its name. It names the columns, since a sweep may add them meanwhile.
        rows = f"FROM main.{table}" if len(missing) < len(columns) else "WHERE false"
        connection.execute(f"CREATE TEMP VIEW {table} AS SELECT {', '.join(columns)} {rows}")


def _missing_columns(connection: sqlite3.Connection, tables: dict[str, dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Return pairs of a table and those of its columns that the database lacks: all of one in `LATER`."""
    found = []
    for table, columns in tables.items():
        stored = stored_columns(connection, table)
        missing = [name for name in columns if name not in stored]
        if missing and (stored or table in LATER):
            found.append((table, missing))
    return found


def stored_columns(connection: sqlite3.Connection, table: str) -> set[str]:
    """Return the names of the columns that the database has; empty without the table."""
    return {name for name, _, _ in _declared_columns(connection, table)}


def _declared_columns(connection: sqlite3.Connection, table: str) -> list[tuple[str, str, str | None]]:
    """Return name, type and default, as SQL, of each column that the database has; empty without the table."""
    return connection.execute("SELECT name, type, dflt_value FROM pragma_table_info(?, 'main')", (table,)).fetchall()


def _default(declaration: str) -> str:
    return declaration.partition("DEFAULT ")[2] or "NULL"


def check_unknown_settings(connection: sqlite3.Connection, folder: Path) -> None:
    """Raise `UserError` where a setting that a newer version has added, unknown here, is not at its default."""
    parts = []
    for name, kind, default in _declared_columns(connection, "runs"):
        if name not in TABLES["runs"] and not kind:
            column = quoted([name], "runs")
            rows = connection.execute(f"SELECT DISTINCT {column} FROM runs WHERE {column} IS NOT ({default or 'NULL'})")
            if values := {value for (value,) in rows}:
                parts.append(f"{name} = {_listing(values)}")
    if parts:
        raise UserError(
            f"{folder} was made by a newer ncollapse, with settings that this version does not have: "
            f"{'; '.join(parts)}. Use the version that wrote it, or choose another --out"
        )


def _listing(values: set[Any]) -> str:
    def key(value: Any) -> tuple[bool, str, Any]:  # a damaged store may hold values of several types
        number = isinstance(value, (int, float))
        return value is None, "" if number else type(value).__name__, 0 if value is None or value != value else value

    ordered = sorted(values, key=key)
    return ", ".join(map(setting_value, ordered))
