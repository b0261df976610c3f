"""The store: one SQLite file per results folder, written in transactions while runs train; `reader` reads it.

Checkpoints of stacks are files beside it, named in the table `stacks`. The row of a checkpoint is committed after its
file is complete; a file without a row does not count.
"""

import dataclasses
import itertools
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ncollapse.train.config import RunConfig
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results import schema
from ncollapse.train.results.atomic_write import write_whole
from ncollapse.train.results.checkpoint_file import file_name, seal
from ncollapse.train.results.columns import LAYER_METRICS, METRICS
from ncollapse.train.results.schema import ENDED, SETTINGS, quoted
from ncollapse.train.results.storage_errors import cannot_write, damaged, is_busy
from ncollapse.train.results.validation import check_not_lost, check_plan, check_tables, read_json, run_digest

if TYPE_CHECKING:
    from ncollapse.train.results.record import Evaluation

LOCK = ".lock"
#: Seconds between transactions that only record the progress of stacks.
_PROGRESS_SECONDS = 1.0
#: Seconds for which a transaction waits while another program holds the database; SQLite itself waits half a minute.
_PATIENCE = 600.0
#: The folder in `checkpoints` for those that could not be used.
ASIDE = "unusable"
#: The files of `checkpoints` that are the store's: only these are ever deleted.
_CHECKPOINT = re.compile(r"[0-9]+-[0-9]+\.pt(\.partial)?")


@dataclasses.dataclass(frozen=True)
class PlannedStack:
    """Runs that train as one program, in order; they continue from `checkpoint`, of an epoch, if there is one."""

    id: int
    runs: tuple[RunConfig, ...]
    checkpoint: Path | None = None
    epoch: int | None = None


class Store:
    """The runs of one grid in one folder; a context manager that holds the folder's lock.

    Args:
        folder: made if missing. A database of an older version gets the columns that it lacks.
        grid: the runs of the folder.
        say: takes a sentence for the user, as when another program holds the database.

    Raises:
        UserError: the folder holds another grid (the message names the differences) or settings that this version does
            not have, is in use by another process, has another format, or cannot be written. Every method raises it
            where something cannot be written: a full disk, a deleted folder, ….
        DamageError: the folder holds what no sweep has written, or its database is missing beside files of runs.
    """

    def __init__(self, folder: Path, grid: Grid, say: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.grid, self._say = folder, grid, say
        self._checkpoints = folder / "checkpoints"
        self._progress: dict[int, int] = {}  # stack -> epoch; not written yet
        self._written = time.monotonic()
        with ExitStack() as undo, self._user_errors():
            folder.mkdir(parents=True, exist_ok=True)
            for name in (LOCK, "checkpoints", "weights"):
                if (folder / name).is_symlink():
                    raise UserError(f"{folder / name} is a symbolic link: a results folder holds its own files only")
            try:
                undo.enter_context(FileLock(folder / LOCK, timeout=0))
            except Timeout:
                raise UserError(
                    f"{folder} is in use by another process; wait for it, or choose another --out"
                ) from None
            if not (folder / schema.FILE).exists():
                check_not_lost(folder)
            self._db = undo.enter_context(closing(schema.connect(folder, create=True)))
            self._open_or_create()
            self._close = undo.pop_all().close

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _open_or_create(self) -> None:
        with self._transaction():
            if schema.is_empty(self._db):
                check_not_lost(self.folder)
                schema.create_tables(self._db)
                self._insert_one("meta", key="grid", value=self.grid.name)
                self._insert_one("meta", key="description", value=self.grid.description)
                rows = [(run.id, i, "pending", *run.as_dict().values()) for i, run in enumerate(self.grid.runs)]
                self._insert("runs", ("id", "position", "status", *SETTINGS), rows)
        schema.check_version(self._db, self.folder)
        check_tables(self._db, self.folder)
        check_plan(self._db, self.folder)
        schema.check_unknown_settings(self._db, self.folder)
        with self._transaction():  # rolled back where the grid is another one
            schema.add_missing_columns(self._db)
            self._check_grid()
        self._tidy()

    def _check_grid(self) -> None:
        stored = {row[0]: row[1:] for row in self._db.execute(f"SELECT id, {quoted(SETTINGS, 'runs')} FROM runs")}
        wanted = {run.id: tuple(run.as_dict().values()) for run in self.grid.runs}
        if stored.keys() == wanted.keys() and (changed := [run for run in wanted if stored[run] != wanted[run]]):
            raise damaged(self.folder / schema.FILE, f"the settings of run {changed[0]} are not those of its id")
        if stored != wanted:
            raise UserError(
                f"{self.folder} was made by another grid ({len(stored)} runs there, {len(wanted)} now): "
                f"{schema.difference(stored.values(), wanted.values())}. "
                "Choose another --out, or go back to the grid that made it"
            )

    def _insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        places = ", ".join("?" * len(columns))
        self._db.executemany(f"INSERT INTO {table} ({quoted(columns)}) VALUES ({places})", rows)

    def _insert_one(self, table: str, **values: Any) -> int:
        """Insert a row and return its number."""
        places = ", ".join("?" * len(values))
        row = self._db.execute(f"INSERT INTO {table} ({quoted(values)}) VALUES ({places})", tuple(values.values()))
        assert row.lastrowid is not None
        return row.lastrowid

    def _value(self, sql: str, *parameters: Any) -> Any:
        """Return the first value of the first row that a query finds; None where it finds none."""
        rows = self._rows(sql, *parameters)
        return rows[0][0] if rows else None

    def _rows(self, sql: str, *parameters: Any) -> list[Any]:
        with self._user_errors():
            return self._db.execute(sql, parameters).fetchall()

    def _tidy(self) -> None:
        """Remove what a killed sweep has left: files without a row, checkpoints of stacks whose runs have all ended."""
        with self._transaction():
            self._db.execute(
                "UPDATE stacks SET checkpoint = NULL, checkpoint_epoch = NULL WHERE checkpoint IS NOT NULL "
                f"AND id NOT IN (SELECT stack FROM runs WHERE stack IS NOT NULL AND status NOT IN ({ENDED}))"
            )
        known = {name for (name,) in self._rows("SELECT checkpoint FROM stacks")}
        left = [path for path in self._checkpoints.glob("*") if _CHECKPOINT.fullmatch(path.name)]
        for path in (*left, *(self.folder / "weights").glob("*.pt.partial")):
            if path.name not in known and path.is_file():
                path.unlink()

    def begin_session(self, command: str, provenance: Mapping[str, Any]) -> int:
        """Record the start of a sweep and return its number; runs that a killed one left running are pending again."""
        with self._transaction():
            self._db.execute("UPDATE runs SET status = 'pending' WHERE status = 'running'")
            return self._insert_one("sessions", started=_now(), command=command, provenance=json.dumps(provenance))

    def check_data(self, name: str, fingerprint: str) -> None:
        """Raise `UserError` where earlier runs of the folder were trained on data with another fingerprint."""
        key = f"data {name}"
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO meta (key, value) VALUES (?, ?)", (key, fingerprint))
            known = self._value("SELECT value FROM meta WHERE key = ?", key)
        if known != fingerprint:
            raise UserError(
                f"{self.folder}: the data set {name} is not the one that its earlier runs were trained on "
                f"({fingerprint} now, {known} then); give that one with --data-dir, or choose another --out"
            )

    def finished(self) -> dict[str, str]:
        """Return id -> status of the runs that have ended."""
        return dict(self._rows(f"SELECT id, status FROM runs WHERE status IN ({ENDED})"))

    # The plan: which runs train together. It is kept, since the last digits of a run's numbers depend on it.

    def stacks(self) -> list[PlannedStack]:
        """Return the stacks with runs that have not ended, in order; empty before there is a plan."""
        by_id = {run.id: run for run in self.grid.runs}
        rows = self._rows(
            "SELECT stack, checkpoint, checkpoint_epoch, runs.id FROM runs LEFT JOIN stacks ON stacks.id = stack "
            f"WHERE stack IN (SELECT stack FROM runs WHERE status NOT IN ({ENDED})) ORDER BY stack, runs.id"
        )
        return [
            PlannedStack(
                stack, tuple(by_id[run] for *_, run in members), self._checkpoints / file if file else None, epoch
            )
            for (stack, file, epoch), members in itertools.groupby(rows, key=lambda row: row[:3])
        ]

    def begun(self) -> set[int]:
        """Return the stacks whose plan has to stay: those with a run that has ended, or with a checkpoint."""
        rows = self._rows(
            f"SELECT stack FROM runs WHERE status IN ({ENDED}) UNION SELECT id FROM stacks WHERE checkpoint IS NOT NULL"
        )
        return {stack for (stack,) in rows}

    def set_plan(
        self, stacks: Sequence[Sequence[RunConfig]], engine: Mapping[str, Any] | None = None,
        checkpoints: Sequence[tuple[int, bytes] | None] = (),
    ) -> list[int]:  # fmt: skip
        """Move runs into new stacks and return their numbers.

        Args:
            engine: is kept; it says how the runs train and why.
            checkpoints: for each of the first stacks, its epoch and the state of its training; None: it has none.
        """
        replaced = {name for (name,) in self._rows("SELECT checkpoint FROM stacks WHERE checkpoint IS NOT NULL")}
        with self._transaction():
            numbers = [self._insert_one("stacks", size=len(runs)) for runs in stacks]
            for number, kept in zip(numbers, checkpoints, strict=False):
                if kept is not None:
                    self._write_checkpoint(number, *kept)
                    row = (file_name(number, kept[0]), kept[0], number)
                    self._db.execute("UPDATE stacks SET checkpoint = ?, checkpoint_epoch = ? WHERE id = ?", row)
            self._db.executemany(
                "UPDATE runs SET stack = ?, status = 'pending' WHERE id = ?",
                [(number, run.id) for number, runs in zip(numbers, stacks, strict=True) for run in runs],
            )
            self._db.execute("DELETE FROM stacks WHERE id NOT IN (SELECT stack FROM runs WHERE stack IS NOT NULL)")
            if engine is not None:
                text = json.dumps(engine)
                self._db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('engine', ?)", (text,))
        known = {name for (name,) in self._rows("SELECT checkpoint FROM stacks")}
        for name in replaced - known:
            self._unlink(name)
        return numbers

    def engine(self) -> dict[str, Any] | None:
        """Return what the last `set_plan` kept of how the runs are trained; None before there is a plan.

        Raises:
            DamageError: it cannot be read.
        """
        text = self._value("SELECT value FROM meta WHERE key = 'engine'")
        kept = read_json(text)
        if text is not None and not isinstance(kept, dict):
            raise damaged(self.folder / schema.FILE, "the plan of its stacks cannot be read")
        return kept

    # The events of a stack in training.

    def begin(self, stack: PlannedStack, session: int, train_samples: int, *, resume: bool) -> int:
        """Record that a stack starts and return the epoch at which it does: its checkpoint's to resume, else 0.

        Evaluations of its unfinished runs after that epoch are deleted.
        """
        unfinished = f"stack = ? AND status NOT IN ({ENDED})"
        with self._transaction():
            kept = self._value("SELECT checkpoint_epoch FROM stacks WHERE id = ?", stack.id) if resume else -1
            start = max(kept, 0)
            for table in ("metrics", "layers"):
                where = f"run IN (SELECT id FROM runs WHERE {unfinished}) AND epoch > ?"
                self._db.execute(f"DELETE FROM {table} WHERE {where}", (stack.id, kept))
            self._db.execute(
                f"UPDATE runs SET status = 'running', session = ?, train_samples = ? WHERE {unfinished}",
                (session, train_samples, stack.id),
            )
            self._db.execute(
                "UPDATE stacks SET session = ?, updated = ?, begun_epoch = ?, epoch = ? WHERE id = ?",
                (session, _now(), start, start, stack.id),
            )
        return start

    def record(self, stack: PlannedStack, evaluation: "Evaluation") -> dict[str, str]:
        """Add an evaluated epoch of the runs of a stack; return id -> status of the runs that end with it.

        A run that had already ended is left as it is: a stack that starts again trains its finished runs too, so that
        it stays the same program. NaN is stored as NULL.
        """
        finished, epoch = self.finished(), evaluation.epoch
        new = [(n, i, stack.runs[i].id) for n, i in enumerate(evaluation.rows) if stack.runs[i].id not in finished]
        ended = {run: evaluation.ended[i] for _, i, run in new if i in evaluation.ended}
        for _, i, run in new:
            if i in evaluation.weights:  # before the row says that the run has ended
                self._write("weights", f"{run}.pt", evaluation.weights[i])
        rows = [(run, epoch, *(evaluation.values[name][n] for name in METRICS)) for n, _, run in new]
        layers = [
            (run, epoch, position, layer, *(values[name][n] for name in LAYER_METRICS))
            for n, _, run in new
            for position, (layer, values) in enumerate(evaluation.layers.items())
        ]
        self._progress[stack.id] = epoch
        with self._transaction():
            self._insert("metrics", ("run", "epoch", *METRICS), rows)
            self._insert("layers", ("run", "epoch", "position", "layer", *LAYER_METRICS), layers)
            self._db.executemany(
                "UPDATE runs SET status = ?, diverged_epoch = ?, seconds = ?, digest = ? WHERE id = ?",
                [
                    (end.status, end.diverged_epoch, end.seconds, run_digest(self._db, run), run)
                    for run, end in ended.items()
                ],
            )
            self._write_progress()
        return {run: end.status for run, end in ended.items()}

    def progress(self, stack: PlannedStack, epoch: int) -> None:
        """Record the progress of a stack, in epochs; written once a second, so that `ncollapse status` can show it."""
        self._progress[stack.id] = epoch
        if time.monotonic() - self._written > _PROGRESS_SECONDS:
            with self._transaction():
                self._write_progress()

    def _write_progress(self) -> None:
        self._db.executemany(
            "UPDATE stacks SET epoch = ?, updated = ? WHERE id = ?",
            [(epoch, _now(), stack) for stack, epoch in self._progress.items()],
        )
        self._progress.clear()
        self._written = time.monotonic()

    def save_checkpoint(self, stack: PlannedStack, epoch: int, content: bytes) -> None:
        """Replace the checkpoint of a stack; all evaluations up to its epoch must be recorded."""
        self._write_checkpoint(stack.id, epoch, content)
        self._set_checkpoint(stack.id, file_name(stack.id, epoch), epoch)

    def _write_checkpoint(self, stack: int, epoch: int, content: bytes) -> None:
        self._write("checkpoints", file_name(stack, epoch), seal(content, epoch))

    def set_aside(self, stack: PlannedStack) -> Path:
        """Keep the file of a checkpoint that cannot be used in the folder `ASIDE`; the stack has none then."""
        assert stack.checkpoint is not None
        aside = self._checkpoints / ASIDE / stack.checkpoint.name
        with self._user_errors():
            aside.parent.mkdir(exist_ok=True)
            if stack.checkpoint.is_file():
                stack.checkpoint.replace(aside)
        self._set_checkpoint(stack.id, None, None)
        return aside

    def _write(self, kind: str, name: str, content: bytes) -> None:
        """Write a file into a folder of the results folder, which must still be there."""
        if not (self.folder / schema.FILE).is_file():
            raise UserError(
                f"{self.folder.resolve()} was deleted or moved while the sweep ran: put it back to continue, or give "
                "the same command again to begin anew"
            )
        write_whole(self.folder / kind / name, content)

    def end(self, stack: PlannedStack) -> None:
        """Delete the checkpoint of a stack, whose runs have all ended."""
        self._set_checkpoint(stack.id, None, None)

    def _set_checkpoint(self, stack: int, name: str | None, epoch: int | None) -> None:
        old = self._value("SELECT checkpoint FROM stacks WHERE id = ?", stack)
        if old == name:
            return
        row = (name, epoch, stack)
        with self._transaction():
            self._db.execute("UPDATE stacks SET checkpoint = ?, checkpoint_epoch = ? WHERE id = ?", row)
        if old is not None:
            self._unlink(old)

    def _unlink(self, checkpoint: str) -> None:
        if _CHECKPOINT.fullmatch(checkpoint):
            with self._user_errors():
                (self._checkpoints / checkpoint).unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._user_errors():
            self._patiently("BEGIN IMMEDIATE")
            try:
                yield
                self._patiently("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _patiently(self, statement: str) -> None:
        """Begin or commit a transaction; wait while another program holds the database."""
        until, said = time.monotonic() + _PATIENCE, False
        while True:
            try:
                self._db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error) or time.monotonic() >= until:
                    raise
                if not said:
                    self._say(
                        f"another program holds {self.folder / schema.FILE} ({error}); waiting until it closes it"
                    )
                said = True

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise cannot_write(self.folder, error) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
