"""What a store may hold: its contents are checked when it is opened, since nothing read from disk is believed."""

import hashlib
import math
import sqlite3
import struct
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.formatting import is_missing, read_json
from ncollapse.optimizer_table import row_of
from ncollapse.train.config import NAMED, make_run, short
from ncollapse.train.errors import DamageError, NoResultsError, UserError
from ncollapse.train.results import schema
from ncollapse.train.results.checkpoint_file import file_name
from ncollapse.train.results.columns import LAYER_METRICS, METRICS
from ncollapse.train.results.storage_errors import damaged

if TYPE_CHECKING:
    import pandas as pd


#: The folders of files of runs -> the names of these files.
FILES = {"checkpoints": "*.pt", "weights": "*.pt", "failures": "*.txt"}


def check_not_lost(folder: Path) -> None:
    """Raise DamageError where files of runs lie beside no database, or an empty one: it was lost."""
    left = [name for name, files in FILES.items() if any((folder / name).glob(files))]
    if left:
        raise damaged(
            folder / schema.FILE,
            f"it is missing or empty, but {' and '.join(f'{name}/' for name in left)} hold files of runs; put the "
            "database back, or move these folders away to begin anew",
        )


def no_results(folder: Path) -> UserError:
    """Return the error for a folder without a database; DamageError where it was lost."""
    try:
        check_not_lost(folder)
    except DamageError as error:
        return error
    return NoResultsError(
        f"no results in {folder}: {schema.FILE} is not there; make some with ncollapse sweep … --out {folder}"
    )


def check_tables(connection: sqlite3.Connection, folder: Path) -> None:
    """Raise DamageError unless the database has all tables but `LATER`, and no views or triggers: they do anything."""
    rows = connection.execute("SELECT type, name FROM main.sqlite_master").fetchall()
    missing = schema.TABLES.keys() - {*schema.LATER, *(name for kind, name in rows if kind == "table")}
    if missing:
        raise damaged(folder / schema.FILE, f"it has no table {', '.join(sorted(missing))}")
    if strange := [name for kind, name in rows if kind in ("view", "trigger")]:
        raise damaged(folder / schema.FILE, f"it holds {short(strange[0])}, which no ncollapse has put there")


def check_plan(connection: sqlite3.Connection, folder: Path) -> None:
    """Raise DamageError for runs of unknown status or stack, or a checkpoint with any other name than its own."""
    for problem in plan_problems(connection):
        raise damaged(folder / schema.FILE, problem)


def plan_problems(connection: sqlite3.Connection) -> Iterable[str]:
    """Yield what is wrong with the statuses, stacks and checkpoints of a database, in words."""
    listed = ", ".join(f"'{status}'" for status in schema.STATUSES)
    for run, status in connection.execute(f"SELECT id, status FROM runs WHERE status NOT IN ({listed})"):
        yield f"run {short(run)} has the status {short(status)}"
    stray = "stack IS NOT NULL AND (typeof(stack) != 'integer' OR stack NOT IN (SELECT id FROM stacks))"
    for run, stack in connection.execute(f"SELECT id, stack FROM runs WHERE {stray}"):
        yield f"run {short(run)} is in the stack {short(stack)}, which does not exist"
    kept = "checkpoint IS NOT NULL OR checkpoint_epoch IS NOT NULL"
    for stack, name, epoch in connection.execute(f"SELECT id, checkpoint, checkpoint_epoch FROM stacks WHERE {kept}"):
        if type(epoch) is not int or name != file_name(stack, epoch):
            yield f"stack {stack} names the checkpoint {short(name)} of epoch {short(epoch)}"


#: Settings whose values depend on one another: an option, or a name that was given in Python, needs code of the user's.
TOGETHER = (*NAMED, *(f"{setting}_options" for setting in NAMED), "head", "code")


def check_settings(runs: "pd.DataFrame", folder: Path) -> None:
    """Raise UserError where columns of settings hold values that no run of this version has."""
    for name in schema.SETTINGS:
        if name not in (*TOGETHER, "coupling"):
            values = runs[name].unique().tolist()
            missing = (not isinstance(value, str) and is_missing(value) for value in values)
            each = (None if no else value for no, value in zip(missing, values, strict=True))
            check_values(({name: value} for value in each), folder)
    varying = [name for name in TOGETHER if runs[name].nunique(dropna=False) > 1]
    different = runs.loc[~runs[varying].duplicated(), list(TOGETHER)] if varying else runs[list(TOGETHER)].head(1)
    check_values((_without_missing(row) for row in different.to_dict("records")), folder)
    check_values(({"coupling": value} for value in runs.coupling.dropna().unique().tolist()), folder)
    foreign = [name for name in runs.optimizer.unique() if row_of(name).foreign]
    if (wrong := runs.optimizer.isin(foreign) != runs.coupling.isna()).any():
        run = runs[wrong].iloc[0]
        raise _unknown_value(f" coupling = {run.coupling:g} of {run.optimizer}", folder)


def _without_missing(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, str) else None for name, value in row.items()}


def check_values(settings: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Raise UserError where some settings of a run, by name, are none that a run of this version has."""
    for one in settings:
        try:
            make_run(dict(one), "")
        except UserError as error:
            raise _unknown_value(str(error).removeprefix(":"), folder) from None


def _unknown_value(what: str, folder: Path) -> UserError:
    return UserError(
        f"{folder / schema.FILE} holds runs with{what}; use the version of ncollapse that wrote it, or see "
        f"`ncollapse check {folder}`"
    )


def session_facts(row: Mapping[Any, Any], folder: Path) -> dict[str, Any]:
    """Return the row of a start of the sweep as one dictionary; raise DamageError where it cannot be read."""
    facts = read_json(row["provenance"])
    if not isinstance(facts, dict) or not isinstance(facts.get("versions", {}), dict):
        raise damaged(folder / schema.FILE, f"session {short(row['id'])} has no readable provenance")
    if read_time(row["started"]) is None or not isinstance(row["command"], str):
        raise damaged(folder / schema.FILE, f"session {short(row['id'])} has no readable start")
    return {**facts, **{k: row[k] for k in ("id", "started", "command")}}


def read_time(text: object) -> datetime | None:
    """Return a time with its zone; None where the text is none."""
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return time if time is not None and time.tzinfo is not None else None


def run_digest(connection: sqlite3.Connection, run: str, own: Iterable[str] = ()) -> str:
    """Return a hash of every number that was measured of a run, for `ncollapse check`.

    Args:
        own: the metrics of the user's that the database has; those that were not measured of the run do not matter.
    """
    digest = hashlib.sha256()
    columns, of_layer = schema.quoted(METRICS), schema.quoted(LAYER_METRICS)
    for row in connection.execute(f"SELECT epoch, {columns} FROM metrics WHERE run = ? ORDER BY epoch", (run,)):
        digest.update(_packed(row))
    for row in connection.execute(
        f"SELECT layer, epoch, position, {of_layer} FROM layers WHERE run = ? ORDER BY epoch, position", (run,)
    ):
        digest.update(str(row[0]).encode() + _packed(row[1:]))
    if names := sorted(own):
        wanted = schema.quoted(names, "metrics")
        rows = connection.execute(f"SELECT {wanted} FROM metrics WHERE run = ? ORDER BY epoch", (run,)).fetchall()
        for name, values in zip(names, zip(*rows, strict=True), strict=False):
            if any(value is not None for value in values):
                digest.update(name.encode() + _packed(values))
    return digest.hexdigest()


def _packed(row: Sequence[Any]) -> bytes:
    return struct.pack(f"{len(row)}d", *(math.nan if value is None else value for value in row))
