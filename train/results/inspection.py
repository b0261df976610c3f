"""What of a results folder is whole and what is damaged: `ncollapse check`. Only reads, row by row and file by file."""

import contextlib
import dataclasses
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ncollapse.formatting import read_json
from ncollapse.train.config import MOST, RunConfig, make_run, short
from ncollapse.train.errors import CheckpointError, DamageError, UserError
from ncollapse.train.results import schema
from ncollapse.train.results.checkpoint_file import check_archive, file_name, read_checkpoint
from ncollapse.train.results.own_code import code_key, code_problem
from ncollapse.train.results.own_metrics import readable_metrics
from ncollapse.train.results.storage_errors import cannot_read, is_busy
from ncollapse.train.results.validation import (
    check_not_lost,
    check_tables,
    no_results,
    plan_problems,
    run_digest,
    session_facts,
)


@dataclasses.dataclass(frozen=True)
class Inspected:
    """A thing in a results folder, and what is wrong with it; empty where it is whole."""

    what: str
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """A run as a damaged database may hold it.

    Attributes:
        row: column -> value.
        config: its settings; None where they are not those that its id is the hash of.
        epochs: its evaluations, as far as they can be read.
        problem: what is wrong; empty where it is whole.
    """

    row: dict[str, Any]
    config: RunConfig | None
    epochs: tuple[int, ...]
    problem: str

    @property
    def finished(self) -> bool:
        """Whether it has ended, as its row says."""
        return self.row["status"] in schema.FINISHED


def inspect_folder(folder: Path) -> Iterator[Inspected]:
    """Yield what a results folder holds, and what is wrong with it.

    Raises:
        NoResultsError: no results there, or none yet.
        UserError: results of another format, or a database that another program holds.
    """
    try:
        with open_damaged(folder) as connection:
            yield from _inspect_database(connection, folder)
            yield from _inspect_files(connection, folder)
    except DamageError as error:
        yield Inspected(schema.FILE, str(error).partition(". `ncollapse check")[0])


@contextlib.contextmanager
def open_damaged(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open a database that may be damaged: text that is no UTF-8 is read with replacements.

    Raises:
        DamageError: nothing of it can be read.
        UserError: it is of another format, or another program holds it.
    """
    if not (folder / schema.FILE).is_file():
        raise no_results(folder)
    try:
        with contextlib.closing(schema.connect(folder, create=False)) as connection:
            connection.text_factory = lambda text: text.decode("utf-8", "replace")
            if schema.is_empty(connection):
                check_not_lost(folder)
            schema.check_version(connection, folder)
            check_tables(connection, folder)
            schema.show_missing_columns(connection, readable_metrics(connection)[0])
            yield connection
    except sqlite3.Error as error:
        raise cannot_read(folder / schema.FILE, error) from None


def _inspect_database(connection: sqlite3.Connection, folder: Path) -> Iterator[Inspected]:
    problems = [row[0] for row in _readable(connection.execute("PRAGMA integrity_check(5)"))]
    yield Inspected(schema.FILE, "" if problems == ["ok"] else "; ".join(map(str, problems)) or "its pages are damaged")
    with contextlib.suppress(sqlite3.DatabaseError):
        for problem in plan_problems(connection):
            yield Inspected("the plan", problem)
    meta = dict(_readable(connection.execute("SELECT key, value FROM meta")))
    if not isinstance(meta.get("grid"), str):
        yield Inspected("the grid's name", "it is missing")
    if "engine" in meta and not isinstance(read_json(meta["engine"]), dict):
        yield Inspected("the plan", "it cannot be read")
    for row in read_rows(connection, "sessions"):
        try:
            session_facts(row, folder)
        except DamageError:
            yield Inspected(f"session {short(row['id'])}", "its command, time or versions cannot be read")
    with contextlib.suppress(sqlite3.DatabaseError):
        for problem in readable_metrics(connection)[1]:
            yield Inspected("the metrics", problem)
    for key, text in meta.items():
        if code_key(key) and code_problem(text):
            yield Inspected(short(key), code_problem(text))
    runs = list(read_runs(connection))
    for run in runs:
        yield Inspected(f"run {short(run.row['id'])}", run.problem)
    known = {run.row["id"] for run in runs}
    for run_id, problem in _geometry_problems(connection):
        yield Inspected(f"geometry of run {short(run_id)}", problem)
    with contextlib.suppress(sqlite3.DatabaseError):
        strange = {run for (run,) in connection.execute("SELECT DISTINCT run FROM metrics")} - known
        if strange:
            yield Inspected("evaluations", f"those of {len(strange)} runs belong to no run that can be read")


def read_rows(connection: sqlite3.Connection, table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table from both ends, up to pages that cannot be read."""
    seen: set[int] = set()
    for order in ("", "DESC"):
        with contextlib.suppress(sqlite3.DatabaseError, UnicodeDecodeError):  # the latter of columns' names
            cursor = connection.execute(f"SELECT rowid, * FROM main.{table} NOT INDEXED ORDER BY rowid {order}")
            names = [column[0] for column in cursor.description]
            for row in cursor:
                if row[0] in seen:
                    break
                seen.add(row[0])
                yield dict(zip(names[1:], row[1:], strict=True))


def read_runs(connection: sqlite3.Connection) -> Iterator[StoredRun]:
    """Yield every run that can be read, and what is wrong with it."""
    own = readable_metrics(connection)[0]
    for row in read_rows(connection, "runs"):
        # Settings that the folder's version did not have are at their default.
        settings = {name: row[name] for name in schema.SETTINGS if name in row}
        row = {**dict.fromkeys(schema.TABLES["runs"]), **row}
        try:
            config = make_run(settings, "its settings")
        except UserError as error:
            yield StoredRun(row, None, (), str(error))
            continue
        if config.id != row["id"]:
            yield StoredRun(row, None, (), f"its settings are those of another run, {config.id}")
            continue
        epochs, problem = _evaluations(connection, row, config, own)
        yield StoredRun(row, config, epochs, problem)


def _evaluations(
    connection: sqlite3.Connection, row: dict[str, Any], config: RunConfig, own: Iterable[str]
) -> tuple[tuple[int, ...], str]:
    """Return the evaluated epochs of a run, and what is wrong with it."""
    try:
        rows = connection.execute("SELECT epoch FROM metrics WHERE run = ? ORDER BY epoch", (config.id,))
        epochs = tuple(epoch for (epoch,) in rows)
        digest = run_digest(connection, config.id, own)
    except (sqlite3.DatabaseError, struct.error, OverflowError) as error:
        return (), f"its evaluations cannot be read: {error}"
    if not all(type(epoch) is int for epoch in epochs):
        return (), "an epoch of its evaluations is no integer"
    kinds = {
        "position": int,
        "session": int,
        "train_samples": int,
        "diverged_epoch": int,
        "seconds": float,
        "digest": str,
    }
    given = {name: kind for name, kind in kinds.items() if row[name] is not None}
    if wrong := [
        n for n, kind in given.items() if not isinstance(row[n], kind) or (kind is int and abs(row[n]) > MOST)
    ]:
        return epochs, f"its {wrong[0]} is {short(row[wrong[0]])}"
    if row["status"] not in schema.STATUSES:
        return epochs, f"its status is {short(row['status'])}"
    if row["status"] not in schema.FINISHED:
        return epochs, ""
    last: object = row["diverged_epoch"] if row["status"] == "diverged" else config.epochs
    if row["status"] in ("hopeless", "failed"):  # ended at or after any evaluation; the latter also before the first
        last = epochs[-1] if epochs else -1
    if epochs != due_epochs(config, last) or (row["status"] == "hopeless" and not epochs):
        return epochs, f"it is {row['status']}, but evaluations are missing"
    return epochs, "its numbers have changed since they were measured" if row["digest"] not in (None, digest) else ""


def _geometry_problems(connection: sqlite3.Connection) -> Iterator[tuple[object, str]]:
    """Yield the first thing that is wrong with the geometry of each run; its numbers do not depend on it."""
    told: set[object] = set()
    with contextlib.suppress(sqlite3.DatabaseError):  # which the check of all pages has told
        for run, epoch, content in connection.execute("SELECT run, epoch, content FROM geometry"):
            placed = isinstance(run, str) and type(epoch) is int
            problem = geometry_problem(content) if placed else "it is of no run or epoch"
            if problem and run not in told:
                told.add(run)
                yield run, f"at epoch {short(epoch)}: {problem}"


def geometry_problem(content: object) -> str:
    """Return what is wrong with the bytes of a snapshot; empty where they are whole."""
    from ncollapse.snapshot import Snapshot

    try:
        Snapshot.from_bytes(content)
    except ValueError as error:
        return str(error)
    return ""


def due_epochs(run: RunConfig, last: object) -> tuple[int, ...]:
    """Return the epochs at which a run is evaluated, up to `last`."""
    if type(last) is not int or not 0 <= last <= run.epochs:
        return ()
    due = {0, *range(run.eval_every, last + 1, run.eval_every), *({last} if last == run.epochs else ())}
    return tuple(sorted(due))


def _inspect_files(connection: sqlite3.Connection, folder: Path) -> Iterator[Inspected]:
    named = set()
    for row in read_rows(connection, "stacks"):
        epoch = row.get("checkpoint_epoch")
        if row.get("checkpoint") is None or type(epoch) is not int or row["checkpoint"] != file_name(row["id"], epoch):
            continue
        named.add(row["checkpoint"])
        yield Inspected(f"checkpoints/{row['checkpoint']}", checkpoint_problem(folder, row["checkpoint"], epoch))
    statuses = {run.row["id"]: run.row["status"] for run in read_runs(connection)}
    for path in sorted((folder / "failures").glob("*.txt")):
        strange = "" if path.stem in statuses else "it is of no run that can be read"
        yield Inspected(f"failures/{path.name}", strange or failure_problem(path))
    for path in sorted((folder / "weights").glob("*.pt")):
        strange = "" if path.stem in statuses else "it is of no run that can be read"
        yield Inspected(f"weights/{path.name}", strange or weights_problem(path))


def checkpoint_problem(folder: Path, name: str, epoch: int) -> str:
    """Return what is wrong with the file of a checkpoint; empty where it is whole."""
    try:
        read_checkpoint(folder / "checkpoints" / name, epoch)
    except CheckpointError as error:
        return str(error)
    return ""


def weights_problem(path: Path) -> str:
    """Return what is wrong with the file of a run's weights; empty where it is whole."""
    try:
        check_archive(path.read_bytes())
    except (CheckpointError, OSError) as error:
        return str(error).replace("the checkpoint", "the file")
    return ""


def failure_problem(path: Path) -> str:
    """Return what is wrong with the file that says why a run has failed; empty where it is whole."""
    try:
        path.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        return f"it cannot be read: {error}"
    return ""


def _readable(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield rows up to the first that cannot be read."""
    try:
        yield from rows
    except sqlite3.DatabaseError as error:
        if is_busy(error):
            raise
