"""The format of a results folder's database.

Tables: `runs`, one row per run of the grid with its settings and status; `metrics`, one row per run and evaluated
epoch; `layers`, the same for each block of those that ask for it; `stacks`, the runs that train as one program, with
how far they are; `sessions`, one row per start of a sweep with command, versions, commit and device; `meta`. A run's
status is pending or running until it ends as done, diverged (NaN or inf) or degenerate (features or weights have
vanished).
"""

import math
import sqlite3
from pathlib import Path
from typing import Any

from ncollapse.train.config import FIELDS
from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.results.columns import LAYER_METRICS, METRICS

FILE = "runs.sqlite"
SCHEMA_VERSION = 3

FINISHED = ("done", "diverged", "degenerate")
ENDED = ", ".join(f"'{status}'" for status in FINISHED)
SETTINGS = tuple(field.name for field in FIELDS)
# Quoted: `limit` is a word of SQL.
SETTING_COLUMNS = ", ".join(f'"{name}"' for name in SETTINGS)

SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (id INTEGER PRIMARY KEY, started TEXT NOT NULL, command TEXT NOT NULL, provenance TEXT NOT NULL);
CREATE TABLE stacks (
    id INTEGER PRIMARY KEY, size INTEGER NOT NULL, session INTEGER REFERENCES sessions, updated TEXT,
    begun_epoch INTEGER NOT NULL DEFAULT 0, epoch INTEGER NOT NULL DEFAULT 0, checkpoint TEXT, checkpoint_epoch INTEGER
);
CREATE TABLE runs (
    id TEXT PRIMARY KEY, position INTEGER NOT NULL, status TEXT NOT NULL, {SETTING_COLUMNS},
    stack INTEGER REFERENCES stacks, session INTEGER REFERENCES sessions, train_samples INTEGER, seconds REAL,
    diverged_epoch INTEGER
);
CREATE TABLE metrics (
    run TEXT NOT NULL REFERENCES runs, epoch INTEGER NOT NULL, {", ".join(f"{name} REAL" for name in METRICS)},
    PRIMARY KEY (run, epoch)
) WITHOUT ROWID;
CREATE TABLE layers (
    run TEXT NOT NULL REFERENCES runs, epoch INTEGER NOT NULL, position INTEGER NOT NULL, layer TEXT NOT NULL,
    {", ".join(f"{name} REAL" for name in LAYER_METRICS)},
    PRIMARY KEY (run, epoch, position)
) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""


def connect(folder: Path, *, create: bool) -> sqlite3.Connection:
    """A connection to the folder's database."""
    # Never opened read-only: after a crash even a reader has to roll the last transaction back.
    uri = f"{(folder / FILE).resolve().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
    try:
        # What is committed survives a loss of power. It reads the file, too, which may be no database.
        connection.execute("PRAGMA synchronous = EXTRA")
    except BaseException:
        connection.close()
        raise
    return connection


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether nothing was ever committed: a sweep is just starting there, or was killed as it started."""
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def check_version(connection: sqlite3.Connection, folder: Path) -> None:
    """Raise UserError unless the database has the format that this version reads; NoResultsError: nothing in it yet."""
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


def difference(stored: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> str:
    """The settings whose values differ between two lists of runs."""
    parts = []
    for i, name in enumerate(SETTINGS):
        was, now = ({row[i] for row in rows} for rows in (stored, wanted))
        if was != now:
            parts.append(f"{name} was {_listing(was)}, is {_listing(now)}")
    return "; ".join(parts) or "the same values, combined otherwise"


def _listing(values: set[Any]) -> str:
    ordered = sorted(values, key=lambda v: (v is None, v if not isinstance(v, float) or math.isfinite(v) else 0))
    return ", ".join("none" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in ordered)
