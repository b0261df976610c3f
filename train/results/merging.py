"""Merge results folders, as of several machines, into a new one: the union of their runs.

A run that has ended in several folders must be the same in all of them, to the last digit: it is where it trained in a
stack of the same runs, by the same versions, on machines of one kind. Of a run that has ended in one folder and not in
another the ended one is taken. Stacks in the middle of their training go on from their checkpoints in the new folder.
"""

import contextlib
import dataclasses
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ncollapse.train.config import make_run, short
from ncollapse.train.errors import UserError
from ncollapse.train.results import schema
from ncollapse.train.results.checkpoint_file import file_name
from ncollapse.train.results.columns import LAYER_METRICS, METRICS, OwnMetrics
from ncollapse.train.results.inspection import checkpoint_problem
from ncollapse.train.results.own_code import merged_code
from ncollapse.train.results.own_metrics import full_key, metric_key, read_metrics
from ncollapse.train.results.ownership import LOCK
from ncollapse.train.results.reader import read_meta
from ncollapse.train.results.run_rows import run_files
from ncollapse.train.results.schema import FINISHED, SETTINGS, quoted
from ncollapse.train.results.storage_errors import cannot_read, cannot_write, damaged
from ncollapse.train.results.validation import (
    check_plan,
    check_tables,
    no_results,
    run_digest,
    session_facts,
)

#: Runs with a difference that are named; the rest is counted.
_NAMED = 5
_END = ("status", "diverged_epoch", "train_samples")
_KEYS = {"metrics": ("epoch", *METRICS), "layers": ("epoch", "position", "layer", *LAYER_METRICS)}


@dataclasses.dataclass(frozen=True)
class Merged:
    """How many runs a merged folder has, how many of them have ended, and how many were in more than one folder."""

    runs: int
    finished: int
    repeated: int


@dataclasses.dataclass
class _Source:
    """A folder that is merged: its rows by id; `mine`: the runs that the merged folder takes from it."""

    folder: Path
    db: sqlite3.Connection
    runs: dict[str, dict[str, Any]]
    stacks: dict[int, dict[str, Any]]
    meta: dict[str, str]
    own: OwnMetrics
    mine: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self._members: dict[int, set[str]] = {}
        for run, row in self.runs.items():
            if row["stack"] is not None:
                self._members.setdefault(row["stack"], set()).add(run)
        #: Stack -> epoch of its checkpoint, where that can be used.
        self.checkpoints = {
            stack: int(row["checkpoint_epoch"])
            for stack, row in self.stacks.items()
            if row["checkpoint"] is not None
            and not checkpoint_problem(self.folder, row["checkpoint"], row["checkpoint_epoch"])
        }

    def measured(self, run: str) -> set[str]:
        """Return the metrics of the user's that were measured of a run."""
        if not self.own:
            return set()
        counts = ", ".join(f"count({quoted([name], 'metrics')})" for name in self.own)
        found = self.db.execute(f"SELECT {counts} FROM metrics WHERE run = ?", (run,)).fetchone()
        return {name for name, count in zip(self.own, found, strict=True) if count}

    def shown(self, run: str) -> int:
        """Return at how many epochs the geometry of a run was kept."""
        count: int = self.db.execute("SELECT count(*) FROM geometry WHERE run = ?", (run,)).fetchone()[0]
        return count

    def whole(self, stack: int) -> bool:
        """Return whether all runs of a stack are taken from here, so that it can go on."""
        return self._members.get(stack, set()) <= self.mine


def merge_folders(folders: Sequence[Path], out: Path, *, keep_first: bool = False) -> Merged:
    """Write the union of the runs of some results folders into a new one, all or nothing.

    Args:
        keep_first: whether a run with different results is taken from the first of its folders, instead of an error.

    Raises:
        UserError: fewer than two folders, one that is in use or cannot be read, `out` exists, the folders were trained
            on different data, or a run has other results in one than in another; the message names what differs.
        DamageError: a folder holds what no sweep has written.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise UserError("merge needs two different results folders or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: it exists already; give a new folder")
    with contextlib.ExitStack() as opened:
        sources = [opened.enter_context(_open(folder)) for folder in folders]
        meta = _merged_meta(sources, out.name)
        repeated = _divide(sources, keep_first)
        partial = out.with_name(f"{out.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(sources, meta, partial)
            if out.exists():  # and is empty
                out.rmdir()
            partial.replace(out)
        except OSError as error:
            raise cannot_write(out, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    ended = sum(source.runs[run]["status"] in FINISHED for source in sources for run in source.mine)
    return Merged(sum(len(source.mine) for source in sources), ended, repeated)


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[_Source]:
    """Open a results folder, which no sweep may write to meanwhile."""
    if not (folder / schema.FILE).is_file():
        raise no_results(folder)
    with contextlib.ExitStack() as undo:
        try:
            undo.enter_context(FileLock(folder / LOCK, timeout=1))
        except Timeout:
            raise UserError(f"{folder} is in use by another process; merge it when its sweep has ended") from None
        except OSError:  # a read-only folder: nothing writes there
            pass
        try:
            db = undo.enter_context(contextlib.closing(schema.connect(folder, create=False)))
            schema.check_version(db, folder)
            check_tables(db, folder)
            check_plan(db, folder)
            schema.check_unknown_settings(db, folder)
            own = read_metrics(db, folder)
            schema.show_missing_columns(db, own)
            runs = {row["id"]: row for row in _rows(db, "runs", "ORDER BY position")}
            stacks = {row["id"]: row for row in _rows(db, "stacks")}
            source = _Source(folder, db, runs, stacks, read_meta(db, folder), own)
            for run, row in runs.items():
                if make_run({name: row[name] for name in SETTINGS}, f"{folder}, run {short(run)}").id != run:
                    raise damaged(folder / schema.FILE, f"the settings of run {short(run)} are not those of its id")
                if row["status"] in FINISHED and row["digest"] not in (None, run_digest(db, run, own)):
                    raise damaged(folder / schema.FILE, f"the numbers of run {run} are not those that were written")
            yield source
        except sqlite3.Error as error:
            raise cannot_read(folder / schema.FILE, error) from None


def _rows(db: sqlite3.Connection, table: str, order: str = "") -> list[dict[str, Any]]:
    names = tuple(schema.TABLES[table])
    found = db.execute(f"SELECT {quoted(names)} FROM {table} {order}")
    return [dict(zip(names, row, strict=True)) for row in found]


def _merged_meta(sources: Sequence[_Source], name: str) -> dict[str, str]:
    """Return what the merged folder says of itself; raise UserError where the data of two folders differ."""
    meta = {"grid": name, "description": sources[0].meta.get("description", "")}
    for source in sources:
        for key, value in source.meta.items():
            metric = metric_key(key) or full_key(key)
            if not key.startswith("data ") and key != "engine" and metric is None:
                continue
            if meta.setdefault(key, value) == value or key == "engine":
                continue
            if metric is not None:
                raise UserError(
                    f"{source.folder}: its metric {metric} is not the one of the other folders ({short(value)} there, "
                    f"{short(meta[key])} in the others): one table cannot hold both"
                )
            raise UserError(
                f"{source.folder}: the {key.replace('data ', 'data set ')} is not the one of the other folders "
                f"({value} there, {meta[key]} in the others): their runs cannot be compared"
            )
    return meta | merged_code((source.folder, source.meta) for source in sources)


def _divide(sources: Sequence[_Source], keep_first: bool) -> int:
    """Choose for each run the folder that it is taken from; return how many are in several.

    Raises:
        UserError: a run has ended in two folders with different results.
    """
    differences, repeated = [], 0
    for run in dict.fromkeys(run for source in sources for run in source.runs):
        having = [source for source in sources if run in source.runs]
        ended = [source for source in having if source.runs[run]["status"] in FINISHED]
        repeated += len(having) > 1
        for other in () if keep_first else ended[1:]:
            if what := _difference(run, ended[0], other):
                differences.append(what)
                break
        if ended:  # the first of those with most metrics of the user's, and most of its geometry
            best = ended[0] if keep_first else max(ended, key=lambda of: (len(of.measured(run)), of.shown(run)))
        else:
            best = max(having, key=lambda source: source.checkpoints.get(source.runs[run]["stack"], -1))
        best.mine.add(run)
    if differences:
        more = f"; and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
        raise UserError(
            f"{len(differences)} runs are not the same in two folders: {'; '.join(differences[:_NAMED])}{more}. With "
            "--keep-first such runs are those of the folder that is named first"
        )
    return repeated


def _difference(run: str, a: _Source, b: _Source) -> str:
    """Return in what the results of a run differ between two folders; empty where they are equal."""
    described = make_run({name: a.runs[run][name] for name in SETTINGS}, run).describe()
    for name in _END:
        if a.runs[run][name] != b.runs[run][name]:
            mine, theirs = a.runs[run][name], b.runs[run][name]
            return f"{described} (run {run}): {name} is {mine} in {a.folder}, {theirs} in {b.folder}"
    for table, names in _keys(a.measured(run) & b.measured(run)).items():
        sql = f"SELECT {quoted(names)} FROM {table} WHERE run = ? ORDER BY {', '.join(names[:2])}"
        mine, theirs = (source.db.execute(sql, (run,)).fetchall() for source in (a, b))
        if len(mine) != len(theirs):
            return f"{described} (run {run}): {len(mine)} rows of {table} in {a.folder}, {len(theirs)} in {b.folder}"
        for one, other in zip(mine, theirs, strict=True):
            for name, x, y in zip(names, one, other, strict=True):
                if x != y:
                    return f"{described} (run {run}): {name} at epoch {one[0]} is {x} in {a.folder}, {y} in {b.folder}"
    return ""


def _keys(own: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the tables of what was measured -> their columns but for the run, with these metrics of the user's."""
    return {**_KEYS, "metrics": (*_KEYS["metrics"], *sorted(own))}


def _write(sources: Sequence[_Source], meta: dict[str, str], out: Path) -> None:
    with contextlib.closing(schema.connect(out, create=True)) as db:
        db.execute("BEGIN IMMEDIATE")
        schema.create_tables(db, {name for source in sources for name in source.own})
        for key, value in meta.items():
            _insert(db, "meta", {"key": key, "value": value})
        position = 0
        for source in sources:
            sessions = _copy_sessions(source, db)
            stacks = _copy_stacks(source, db, sessions, out)
            for run, row in source.runs.items():
                if run in source.mine:
                    _copy_run(source, db, row, position, sessions, stacks)
                    position += 1
                    # The id is a hash, as `_open` has found.
                    for file, copy in zip(run_files(source.folder, run), run_files(out, run), strict=True):
                        if row["status"] in FINISHED and file.is_file():
                            copy.parent.mkdir(exist_ok=True)
                            shutil.copyfile(file, copy)
        db.execute("COMMIT")


def _copy_sessions(source: _Source, db: sqlite3.Connection) -> dict[int, int]:
    """Copy the starts of a sweep; return their numbers -> their new ones."""
    numbers = {}
    for row in _rows(source.db, "sessions", "ORDER BY id"):
        session_facts(row, source.folder)
        numbers[row["id"]] = _insert(db, "sessions", {k: v for k, v in row.items() if k != "id"})
    return numbers


def _copy_stacks(
    source: _Source, db: sqlite3.Connection, sessions: dict[int, int], out: Path
) -> dict[int, tuple[int, int]]:
    """Copy the stacks with runs that are taken; return their numbers -> new number, epoch of the checkpoint (-1: none).

    A stack that lacks a run, which has ended elsewhere, has no checkpoint: it would be that of other runs.
    """
    numbers = {}
    used = {source.runs[run]["stack"] for run in source.mine}
    for stack, row in source.stacks.items():
        if stack not in used:
            continue
        form = {"size": row["size"], "branches": int(row["branches"] == 1)}
        new = _insert(db, "stacks", form | {"session": sessions.get(row["session"])})
        epoch = source.checkpoints.get(stack, -1) if source.whole(stack) else -1
        if epoch >= 0:
            (out / "checkpoints").mkdir(exist_ok=True)
            shutil.copyfile(
                source.folder / "checkpoints" / row["checkpoint"], out / "checkpoints" / file_name(new, epoch)
            )
            db.execute(
                "UPDATE stacks SET checkpoint = ?, checkpoint_epoch = ?, epoch = ? WHERE id = ?",
                (file_name(new, epoch), epoch, epoch, new),
            )
        numbers[stack] = new, epoch
    return numbers


def _copy_run(
    source: _Source, db: sqlite3.Connection, row: dict[str, Any], position: int, sessions: dict[int, int],
    stacks: dict[int, tuple[int, int]],
) -> None:  # fmt: skip
    """Copy a run; of one that has not ended, its evaluations up to its checkpoint."""
    ended = row["status"] in FINISHED
    new, last = stacks.get(row["stack"], (None, -1))
    if not ended and not (row["stack"] is not None and source.whole(row["stack"])):
        new = None  # it is planned anew
    values = {**row, "position": position, "status": row["status"] if ended else "pending", "stack": new}
    _insert(db, "runs", {**values, "session": sessions.get(row["session"]) if ended else None})
    for table, names in {**_keys(source.own), "geometry": ("epoch", "content")}.items():
        sql = f"SELECT {quoted(names)} FROM {table} WHERE run = ?" + ("" if ended else f" AND epoch <= {last}")
        places = ", ".join("?" * (len(names) + 1))
        rows = ((row["id"], *found) for found in source.db.execute(sql, (row["id"],)))
        db.executemany(f"INSERT INTO {table} ({quoted(('run', *names))}) VALUES ({places})", rows)


def _insert(db: sqlite3.Connection, table: str, values: dict[str, Any]) -> int:
    places = ", ".join("?" * len(values))
    number = db.execute(f"INSERT INTO {table} ({quoted(values)}) VALUES ({places})", tuple(values.values())).lastrowid
    assert number is not None
    return number
