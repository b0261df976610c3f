"""The store: one SQLite file per results folder, written as runs go, in transactions.

Tables: `runs`, one row per run of the grid with its settings and status; `metrics`, one row per run and evaluated
epoch; `sessions`, one row per start of a sweep with command, versions, commit and device; `meta`. A run's status is
pending or running until it ends as done, diverged (NaN or inf) or degenerate (features or weights have vanished).
"""

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from nc.train.config import FIELDS, RunConfig
from nc.train.errors import UserError
from nc.train.grid import Grid

if TYPE_CHECKING:
    import pandas as pd

FILE = "runs.sqlite"
SCHEMA_VERSION = 1

#: Columns of `metrics`, beside run and epoch; definitions in `nc.metrics`. Norms are Frobenius, of W and of μ_k − μ_G.
METRICS = (
    *("nc0", "nc1", "nc1_trace_ratio", "nc2", "nc2_equinorm", "nc2_equiangularity", "nc3", "nc3_difference", "nc4"),
    *("train_loss", "train_accuracy", "val_loss", "val_accuracy", "weight_norm", "feature_norm", "degenerate"),
)
FINISHED = ("done", "diverged", "degenerate")

_SETTINGS = tuple(field.name for field in FIELDS)
# Quoted: `limit` is a word of SQL.
_SETTING_COLUMNS = ", ".join(f'"{name}"' for name in _SETTINGS)

_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (id INTEGER PRIMARY KEY, started TEXT NOT NULL, command TEXT NOT NULL, provenance TEXT NOT NULL);
CREATE TABLE runs (
    id TEXT PRIMARY KEY, position INTEGER NOT NULL, status TEXT NOT NULL, {_SETTING_COLUMNS},
    session INTEGER REFERENCES sessions, stack_size INTEGER, train_samples INTEGER, seconds REAL, diverged_epoch INTEGER
);
CREATE TABLE metrics (
    run TEXT NOT NULL REFERENCES runs, epoch INTEGER NOT NULL, {", ".join(f"{name} REAL" for name in METRICS)},
    PRIMARY KEY (run, epoch)
) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
"""


class Store:
    """The runs of one grid in one folder; a context manager that holds the folder's lock.

    Args:
        folder: made if missing.
        grid: what the folder is for.

    Raises:
        UserError: the folder holds another grid (the message names the differences), is in use by another process, was
            written by a newer version, or cannot be written.
    """

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid
        with self._telling():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"{folder} is in use by another process; wait for it, or choose another --out"
                ) from None
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            with self._telling():
                self._db = _connect(folder, create=True)
                undo.callback(self._db.close)
                self._open_or_create()
            self._close = undo.pop_all().close

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _open_or_create(self) -> None:
        with self._transaction():
            if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('grid', ?)", (self.grid.name,))
                self._db.execute("INSERT INTO meta VALUES ('description', ?)", (self.grid.description,))
                rows = [(run.id, i, "pending", *run.as_dict().values()) for i, run in enumerate(self.grid.runs)]
                places = ", ".join("?" * (3 + len(_SETTINGS)))
                self._db.executemany(
                    f"INSERT INTO runs (id, position, status, {_SETTING_COLUMNS}) VALUES ({places})", rows
                )
        _check_version(self._db, self.folder)
        stored = {row[0]: row[1:] for row in self._db.execute(f"SELECT id, {_SETTING_COLUMNS} FROM runs")}
        wanted = {run.id: tuple(run.as_dict().values()) for run in self.grid.runs}
        if stored != wanted:
            raise UserError(
                f"{self.folder} was made by another grid ({len(stored)} runs there, {len(wanted)} now): "
                f"{_difference(list(stored.values()), list(wanted.values()))}. "
                "Choose another --out, or go back to the grid that made it"
            )

    def begin_session(self, started: str, command: str, provenance: Mapping[str, Any]) -> int:
        """Record the start of a sweep; returns the session's number, for `begin`."""
        with self._transaction():
            row = (started, command, json.dumps(provenance))
            cursor = self._db.execute("INSERT INTO sessions (started, command, provenance) VALUES (?, ?, ?)", row)
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def check_data(self, name: str, fingerprint: str) -> None:
        """Raise UserError unless the data set is the one that the folder's earlier runs were trained on."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (f"data {name}", fingerprint))
        known = self._db.execute("SELECT value FROM meta WHERE key = ?", (f"data {name}",)).fetchone()[0]
        if known != fingerprint:
            raise UserError(
                f"{self.folder}: the data set {name} is not the one that its earlier runs were trained on "
                f"({fingerprint} now, {known} then); give that one with --data-dir, or choose another --out"
            )

    def finished(self) -> set[str]:
        """Identities of the runs that have ended."""
        marks = ", ".join("?" * len(FINISHED))
        return {row[0] for row in self._db.execute(f"SELECT id FROM runs WHERE status IN ({marks})", FINISHED)}

    def begin(self, runs: Sequence[RunConfig], session: int, train_samples: int) -> None:
        """Mark runs as running, and forget what an earlier attempt at them left."""
        with self._transaction():
            self._db.executemany("DELETE FROM metrics WHERE run = ?", [(run.id,) for run in runs])
            self._db.executemany(
                "UPDATE runs SET status = 'running', session = ?, stack_size = ?, train_samples = ? WHERE id = ?",
                [(session, len(runs), train_samples, run.id) for run in runs],
            )

    def record(self, runs: Sequence[RunConfig], epoch: int, values: Mapping[str, Sequence[float]]) -> None:
        """Add one evaluated epoch of each run: metric name -> a value per run. NaN is stored as NULL."""
        rows = [(run.id, epoch, *(values[name][i] for name in METRICS)) for i, run in enumerate(runs)]
        with self._transaction():
            self._db.executemany(f"INSERT INTO metrics VALUES ({', '.join('?' * (2 + len(METRICS)))})", rows)

    def finish(self, runs: Sequence[RunConfig], statuses: Sequence[tuple[str, int | None]], seconds: float) -> None:
        """End runs: a status of `FINISHED` and the epoch of divergence for each; `seconds` is one run's share."""
        with self._transaction():
            self._db.executemany(
                "UPDATE runs SET status = ?, diverged_epoch = ?, seconds = ? WHERE id = ?",
                [(status, epoch, seconds, run.id) for run, (status, epoch) in zip(runs, statuses, strict=True)],
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._telling():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"cannot write to {self.folder.resolve()}: {error}. Every finished run in it is kept; make room or "
                "make it writable, then give the same command again"
            ) from error


def load_runs(folder: Path) -> "pd.DataFrame":
    """One row per run: settings, status, and each metric at its start (`nc0_start` …) and last evaluation (`nc0` …)."""
    runs = _query(folder, "SELECT * FROM runs ORDER BY position").set_index("id", drop=False)
    metrics = load_metrics(folder).sort_values("epoch").groupby("run")
    # head and tail, not first and last, which would pass over NaN.
    start, last = (rows.set_index("run")[list(METRICS)] for rows in (metrics.head(1), metrics.tail(1)))
    return runs.join(last).join(start.add_suffix("_start")).reset_index(drop=True)


def load_metrics(folder: Path) -> "pd.DataFrame":
    """One row per run and evaluated epoch; NaN where a metric is undefined."""
    frame = _query(folder, "SELECT * FROM metrics ORDER BY run, epoch")
    return frame.astype(dict.fromkeys(METRICS, float))


def load_sessions(folder: Path) -> list[dict[str, Any]]:
    """Provenance of each start of the sweep, oldest first."""
    frame = _query(folder, "SELECT * FROM sessions ORDER BY id")
    rows = frame.to_dict("records")
    return [{"started": row["started"], "command": row["command"], **json.loads(row["provenance"])} for row in rows]


def load_meta(folder: Path) -> dict[str, str]:
    """The grid's name and description, and the fingerprints of its data sets."""
    return {row["key"]: row["value"] for row in _query(folder, "SELECT * FROM meta").to_dict("records")}


def _query(folder: Path, sql: str) -> "pd.DataFrame":
    import pandas as pd

    if not (folder / FILE).is_file():
        raise UserError(f"no results in {folder}: {FILE} is not there; make some with ncollapse sweep … --out {folder}")
    try:
        connection = _connect(folder, create=False)
        try:
            _check_version(connection, folder)
            return pd.read_sql_query(sql, connection)
        finally:
            connection.close()
    except (sqlite3.Error, pd.errors.DatabaseError) as error:
        raise UserError(f"cannot read {folder / FILE}: {error}") from None


def _connect(folder: Path, *, create: bool) -> sqlite3.Connection:
    # Never opened read-only: after a crash even a reader has to roll the last transaction back.
    uri = f"{(folder / FILE).resolve().as_uri()}?mode={'rwc' if create else 'rw'}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
    try:
        connection.execute("PRAGMA synchronous = FULL")  # reads the file: it may be no database
    except BaseException:
        connection.close()
        raise
    return connection


def _check_version(connection: sqlite3.Connection, folder: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder / FILE} has format {version}, this ncollapse reads {SCHEMA_VERSION}; "
            "use the version that wrote it"
        )


def _difference(stored: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> str:
    """The settings whose values differ between two lists of runs."""
    parts = []
    for i, name in enumerate(_SETTINGS):
        was, now = ({row[i] for row in rows} for rows in (stored, wanted))
        if was != now:
            parts.append(f"{name} was {_listing(was)}, is {_listing(now)}")
    return "; ".join(parts) or "the same values, combined otherwise"


def _listing(values: set[Any]) -> str:
    ordered = sorted(values, key=lambda v: (v is None, v if not isinstance(v, float) or math.isfinite(v) else 0))
    return ", ".join("none" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in ordered)
