"""The store: one SQLite file per results folder, a set of runs; written while they train, in transactions.

An event of a stack costs the same however many runs the folder has: which runs have ended, and which checkpoints there
are, is read once, since one process at a time owns the folder.

Checkpoints of stacks are files beside it, named in the table `stacks`. The row of a checkpoint is committed after its
file is complete; a file without a row does not count.
"""

import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ncollapse.formatting import read_json
from ncollapse.train.config import RunConfig, make_run
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results import schema
from ncollapse.train.results.atomic_write import write_whole
from ncollapse.train.results.checkpoint_file import file_name, seal
from ncollapse.train.results.columns import LAYER_METRICS, METRICS, OwnMetrics
from ncollapse.train.results.own_metrics import take_metrics
from ncollapse.train.results.ownership import own_folder
from ncollapse.train.results.run_rows import add_runs, failure_file, reset_runs
from ncollapse.train.results.schema import ENDED, SETTINGS, quoted
from ncollapse.train.results.storage_errors import damaged, user_errors
from ncollapse.train.results.transactions import Database
from ncollapse.train.results.validation import check_not_lost, check_plan, check_tables, run_digest

if TYPE_CHECKING:
    from ncollapse.train.results.record import Evaluation

#: Seconds between transactions that only record the progress of stacks.
_PROGRESS_SECONDS = 1.0
#: Characters of a traceback that are kept, from its end.
_LONGEST_LOG = 100_000
#: The folder in `checkpoints` for those that could not be used.
ASIDE = "unusable"
#: The files of `checkpoints` that are the store's: only these are ever deleted.
_CHECKPOINT = re.compile(r"[0-9]+-[0-9]+\.pt(\.partial)?")


@dataclasses.dataclass(frozen=True)
class PlannedStack:
    """Runs that train side by side, in order; they continue from `checkpoint`, of an epoch, if there is one.

    Attributes:
        branches: each is a program of its own, a branch of one CUDA graph; else all are one program.
    """

    id: int
    runs: tuple[RunConfig, ...]
    checkpoint: Path | None = None
    epoch: int | None = None
    branches: bool = False


class Store:
    """A folder of runs, of which those of a grid are to be trained; a context manager that holds the folder's lock.

    Args:
        folder: made if missing. A database of an older version gets the columns that it lacks.
        grid: runs that the folder does not have yet are added to it; what is in the folder stays.
        say: takes a sentence for the user, as when another program holds the database.
        metrics: those of the user's that every evaluation has beside ncollapse's: name -> meaning. Runs that the folder
            has already, and later ones without a metric, have NaN.

    Raises:
        UserError: a metric has a name that it cannot have; the folder holds settings that this version does not have,
            is in use by another process, has another format, or cannot be written. Every method raises it where
            something cannot be written: a full disk, a deleted folder, ….
        DamageError: the folder holds what no sweep has written, or its database is missing beside files of runs.

    Attributes:
        before, added: number of runs that the folder held when it was opened, and that the grid has added.
    """

    def __init__(
        self, folder: Path, grid: Grid, say: Callable[[str], None] = lambda text: None,
        metrics: OwnMetrics = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.folder, self.grid = folder, grid
        self._own, self._known_own = tuple(metrics), frozenset[str]()  # of this sweep, of the folder
        self._configs = {run.id: run for run in grid.runs}
        self._wanted = frozenset(self._configs)
        self.before = self.added = 0
        self._checkpoints = folder / "checkpoints"
        self._progress: dict[int, int] = {}  # stack -> epoch; not written yet
        self._written = time.monotonic()
        with ExitStack() as undo:
            undo.enter_context(own_folder(folder))
            self._database = undo.enter_context(Database(folder, say))
            self._db = self._database.connection
            with user_errors(folder):
                self._open_or_create(metrics)
            self._finished = dict(self._database.rows(f"SELECT id, status FROM runs WHERE status IN ({ENDED})"))
            self._kept: dict[int, str] = {}  # stack -> the name of its checkpoint's file
            self._tidy()
            self._exits = undo.pop_all()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exits.__exit__(*exc)

    def _open_or_create(self, metrics: OwnMetrics) -> None:
        with self._database.transaction():
            if schema.is_empty(self._db):
                check_not_lost(self.folder)
                schema.create_tables(self._db)
                self._insert_one("meta", key="grid", value=self.grid.name)
                self._insert_one("meta", key="description", value=self.grid.description)
        schema.check_version(self._db, self.folder)
        check_tables(self._db, self.folder)
        check_plan(self._db, self.folder)
        schema.check_unknown_settings(self._db, self.folder)
        with self._database.transaction():
            self._known_own = take_metrics(self._db, self.folder, metrics)
            schema.add_missing_columns(self._db, self._known_own)
            schema.create_indexes(self._db)
            self.before, self.added = add_runs(self._database, self.folder, self.grid)

    def meta(self, key: str) -> str | None:
        """Return what `keep` has kept under a key; None where it has nothing."""
        found: str | None = self._database.value("SELECT value FROM meta WHERE key = ?", key)
        return found

    def keep(self, key: str, text: str) -> None:
        """Keep a text in the table `meta`, in place of what was there under its key."""
        with self._database.transaction():
            self._set_meta(key, text)

    def _set_meta(self, key: str, text: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, text))

    def _insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        places = ", ".join("?" * len(columns))
        self._db.executemany(f"INSERT INTO {table} ({quoted(columns)}) VALUES ({places})", rows)

    def _insert_one(self, table: str, **values: Any) -> int:
        """Insert a row and return its number."""
        places = ", ".join("?" * len(values))
        row = self._db.execute(f"INSERT INTO {table} ({quoted(values)}) VALUES ({places})", tuple(values.values()))
        assert row.lastrowid is not None
        return row.lastrowid

    def _tidy(self) -> None:
        """Remove what a killed sweep has left: files without a row, checkpoints of stacks whose runs have all ended."""
        with self._database.transaction():
            self._db.execute(
                "UPDATE stacks SET checkpoint = NULL, checkpoint_epoch = NULL WHERE checkpoint IS NOT NULL "
                f"AND id NOT IN (SELECT stack FROM runs WHERE stack IS NOT NULL AND status NOT IN ({ENDED}))"
            )
        self._kept = dict(self._database.rows("SELECT id, checkpoint FROM stacks WHERE checkpoint IS NOT NULL"))
        known = set(self._kept.values())
        left = [path for path in self._checkpoints.glob("*") if _CHECKPOINT.fullmatch(path.name)]
        with user_errors(self.folder):
            for path in (*left, *(self.folder / "weights").glob("*.pt.partial")):
                if path.name not in known and path.is_file():
                    path.unlink()

    def begin_session(self, command: str, provenance: Mapping[str, Any]) -> int:
        """Record the start of a sweep and return its number; runs that a killed one left running are pending again."""
        self._database.let_others_read()
        with self._database.transaction():
            self._db.execute("UPDATE runs SET status = 'pending' WHERE status = 'running'")
            return self._insert_one("sessions", started=_now(), command=command, provenance=json.dumps(provenance))

    def check_data(self, name: str, fingerprint: str) -> None:
        """Raise `UserError` where earlier runs of the folder were trained on data with another fingerprint."""
        key = f"data {name}"
        with self._database.transaction():
            self._db.execute("INSERT OR IGNORE INTO meta (key, value) VALUES (?, ?)", (key, fingerprint))
            known = self._database.value("SELECT value FROM meta WHERE key = ?", key)
        if known != fingerprint:
            raise UserError(
                f"{self.folder}: the data set {name} is not the one that its earlier runs were trained on "
                f"({fingerprint} now, {known} then); give that one with --data-dir, or choose another --out"
            )

    def finished(self) -> Mapping[str, str]:
        """Return id -> status of the runs that have ended; a view, which grows with them."""
        return MappingProxyType(self._finished)

    # The plan: which runs train together. It is kept, since the last digits of a run's numbers depend on it.

    def stacks(self) -> list[PlannedStack]:
        """Return the stacks with runs of the grid that have not ended, in order; empty before there is a plan.

        A stack may also hold runs of the folder that are not of the grid.
        """
        return self._stacks(f"stack IN (SELECT stack FROM runs WHERE status NOT IN ({ENDED}))")

    def stack(self, number: int) -> PlannedStack:
        """Return a stack with runs of the grid that have not ended, as it is now, with its last checkpoint."""
        (stack,) = self._stacks("stack = ?", number)
        return stack

    def _stacks(self, which: str, *parameters: int) -> list[PlannedStack]:
        rows = self._database.rows(
            "SELECT stack, checkpoint, checkpoint_epoch, branches, runs.id, status "
            "FROM runs JOIN stacks ON stacks.id = stack "
            f"WHERE {which} ORDER BY stack, runs.id",
            *parameters,
        )
        stacks = []
        for (stack, file, epoch, branches), group in itertools.groupby(rows, key=lambda row: row[:4]):
            members = [row[4:] for row in group]
            if any(run in self._wanted and status not in schema.FINISHED for run, status in members):
                runs = tuple(self._config(run) for run, _ in members)
                checkpoint = self._checkpoints / file if file else None
                stacks.append(PlannedStack(stack, runs, checkpoint, epoch, bool(branches)))
        return stacks

    def _config(self, run: str) -> RunConfig:
        """Return the settings of a run of the folder, which may not be of the grid."""
        if run not in self._configs:
            (row,) = self._database.rows(f"SELECT {quoted(SETTINGS, 'runs')} FROM runs WHERE id = ?", run)
            self._configs[run] = make_run(dict(zip(SETTINGS, row, strict=True)), f"{self.folder}, run {run}")
        return self._configs[run]

    def reset(self, runs: Iterable[str]) -> None:
        """Make these runs of the folder pending again, and delete what was measured of them and their files.

        Raises:
            UserError: one of them is in a stack that is still to be trained, which has to stay the same program.
        """
        for run in reset_runs(self._database, self.folder, runs, self._finished):
            self._finished.pop(run, None)

    def begun(self) -> set[int]:
        """Return the stacks whose plan has to stay: those with a run that has ended, or with a checkpoint."""
        rows = self._database.rows(
            f"SELECT stack FROM runs WHERE status IN ({ENDED}) UNION SELECT id FROM stacks WHERE checkpoint IS NOT NULL"
        )
        return {stack for (stack,) in rows}

    def set_plan(
        self, stacks: Sequence[Sequence[RunConfig]], engine: Mapping[str, Any] | None = None,
        checkpoints: Sequence[tuple[int, bytes] | None] = (), branches: Sequence[bool] = (),
    ) -> list[int]:  # fmt: skip
        """Move runs into new stacks and return their numbers.

        Args:
            engine: is kept; it says how the runs train and why.
            checkpoints: for each of the first stacks, its epoch and the state of its training; None: it has none.
            branches: for each of the first stacks, whether its runs are branches; see `PlannedStack`.
        """
        with self._database.transaction():
            forms = [*branches, *(False for _ in stacks[len(branches) :])]
            numbers = [
                self._insert_one("stacks", size=len(runs), branches=int(of))
                for runs, of in zip(stacks, forms, strict=True)
            ]
            for number, kept in zip(numbers, checkpoints, strict=False):
                if kept is not None:
                    self._write_checkpoint(number, *kept)
                    rows = [(file_name(number, kept[0]), kept[0], number)]
                    self._update("stacks", "checkpoint = ?, checkpoint_epoch = ?", rows)
            moved = [(number, run.id) for number, runs in zip(numbers, stacks, strict=True) for run in runs]
            self._update("runs", "stack = ?, status = 'pending'", moved)
            self._db.execute("DELETE FROM stacks WHERE id NOT IN (SELECT stack FROM runs WHERE stack IS NOT NULL)")
            if engine is not None:
                self._set_meta("engine", json.dumps(engine))
        replaced = set(self._kept.values())
        self._kept = dict(self._database.rows("SELECT id, checkpoint FROM stacks WHERE checkpoint IS NOT NULL"))
        for name in replaced - set(self._kept.values()):
            self._unlink(name)
        return numbers

    def engine(self) -> dict[str, Any] | None:
        """Return what the last `set_plan` kept of how the runs are trained; None before there is a plan.

        Raises:
            DamageError: it cannot be read.
        """
        text = self.meta("engine")
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
        kept = stack.epoch if resume and stack.epoch is not None else -1
        start, now = max(kept, 0), _now()

        def change() -> None:
            for table in schema.MEASURED:
                where = f"run IN (SELECT id FROM runs WHERE {unfinished}) AND epoch > ?"
                self._db.execute(f"DELETE FROM {table} WHERE {where}", (stack.id, kept))
            self._db.execute(
                f"UPDATE runs SET status = 'running', session = ?, train_samples = ? WHERE {unfinished}",
                (session, train_samples, stack.id),
            )
            self._db.execute(
                "UPDATE stacks SET session = ?, updated = ?, begun_epoch = ?, epoch = ? WHERE id = ?",
                (session, now, start, start, stack.id),
            )

        self._database.soon(change)
        return start

    def record(self, stack: PlannedStack, evaluation: "Evaluation") -> dict[str, str]:
        """Add an evaluated epoch of the runs of a stack; return id -> status of the runs that end with it.

        A run that had already ended is left as it is: a stack that starts again trains its finished runs too, so that
        it stays the same program. NaN is stored as NULL.
        """
        epoch = evaluation.epoch
        new = [(n, i, run) for n, i in enumerate(evaluation.rows) if (run := stack.runs[i].id) not in self._finished]
        ended = {run: evaluation.ended[i] for _, i, run in new if i in evaluation.ended}
        for _, i, run in new:
            if i in evaluation.weights:  # before the row says that the run has ended
                self._write("weights", f"{run}.pt", evaluation.weights[i])
        names = (*METRICS, *self._own)
        rows = [(run, epoch, *(evaluation.values[name][n] for name in names)) for n, _, run in new]
        layers = [
            (run, epoch, position, layer, *(values[name][n] for name in LAYER_METRICS))
            for n, _, run in new
            for position, (layer, values) in enumerate(evaluation.layers.items())
        ]
        geometry = [(run, epoch, shown) for _, i, run in new if (shown := evaluation.snapshots.get(i)) is not None]
        self._progress[stack.id] = epoch
        progress = self._take_progress()

        def change() -> None:
            self._insert("metrics", ("run", "epoch", *names), rows)
            self._insert("layers", ("run", "epoch", "position", "layer", *LAYER_METRICS), layers)
            self._insert("geometry", ("run", "epoch", "content"), geometry)
            ends = [(end.status, end.diverged_epoch, end.seconds, self._digest(run), run) for run, end in ended.items()]
            self._update("runs", "status = ?, diverged_epoch = ?, seconds = ?, digest = ?", ends)
            progress()

        self._database.soon(change)
        statuses = {run: end.status for run, end in ended.items()}
        self._finished |= statuses
        return statuses

    def fail(self, stack: PlannedStack, run: str, text: str, log: str) -> None:
        """Record that a run has ended since code of the user's raised an error; one that had ended stays as it is.

        Args:
            text: names the line and the error.
            log: the traceback; the folder keeps both in `failures/RUN.txt`.
        """
        if run not in {one.id for one in stack.runs}:
            raise ValueError(f"run {run} is not in stack {stack.id}")
        if run in self._finished:
            return
        self._write(
            "failures",
            failure_file(self.folder, run).name,
            f"{text}\n\n{log[-_LONGEST_LOG:]}".encode("utf-8", "backslashreplace"),
        )
        self._database.soon(
            lambda: self._update("runs", "status = 'failed', digest = ?", [(self._digest(run), run)]),
        )
        self._finished[run] = "failed"

    def _digest(self, run: str) -> str:
        return run_digest(self._db, run, self._known_own)

    def progress(self, stack: PlannedStack, epoch: int) -> None:
        """Record the progress of a stack, in epochs; written once a second, so that `ncollapse status` can show it."""
        self._progress[stack.id] = epoch
        if time.monotonic() - self._written > _PROGRESS_SECONDS:
            self._database.soon(self._take_progress())

    def _take_progress(self) -> Callable[[], None]:
        """Return the change that writes the progress of all stacks so far."""
        rows = [(epoch, _now(), stack) for stack, epoch in self._progress.items()]
        self._progress.clear()
        self._written = time.monotonic()
        return lambda: self._update("stacks", "epoch = ?, updated = ?", rows)

    def _update(self, table: str, what: str, rows: Iterable[Sequence[Any]]) -> None:
        self._db.executemany(f"UPDATE {table} SET {what} WHERE id = ?", rows)

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
        with user_errors(self.folder):
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
        old = self._kept.pop(stack, None)
        if name is not None:
            self._kept[stack] = name
        if old == name:
            return
        rows = [(name, epoch, stack)]
        self._database.soon(
            lambda: self._update("stacks", "checkpoint = ?, checkpoint_epoch = ?", rows),
            # Only after the row is committed: until then the stack would go on from the older file.
            lambda: self._unlink(old),
        )

    def _unlink(self, checkpoint: str | None) -> None:
        if checkpoint is not None and _CHECKPOINT.fullmatch(checkpoint):
            with user_errors(self.folder):
                (self._checkpoints / checkpoint).unlink(missing_ok=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
