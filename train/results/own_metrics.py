"""Metrics of the user's in a results folder: which names they may have, and which ones a folder has.

Each is a column of the table `metrics`. The entry "metric NAME" of `meta` says what it means: a column without one is
of another version of ncollapse, and ignored.
"""

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from ncollapse.train.config import short
from ncollapse.train.errors import UserError
from ncollapse.train.results.columns import LAYER_COLUMNS, RUN_COLUMNS, OwnMetrics
from ncollapse.train.results.schema import FILE, stored_columns
from ncollapse.train.results.storage_errors import damaged

_PREFIX = "metric "
#: Entries of `meta` that say which code of the user's a metric is: "mine.py:margin", or its name where it was given.
SOURCE = "source of metric "
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]{0,59}")
#: What follows a metric's name where tables have its start and its change.
_SUFFIXES = ("_start", "_change")
#: Columns that the report's tables have beside those of the results.
_OF_REPORT = ("settings", "eligible", "runs", "reached", "group", "loss", "coupled", "failed", "nc0_predicted")
_TAKEN = frozenset(
    name.casefold() for name in (*(column.name for column in (*RUN_COLUMNS, *LAYER_COLUMNS)), *_OF_REPORT)
)
#: SQLite's tables have at most 2,000 columns, and `load_runs` has two for each metric.
_MOST = 200


def metric_key(key: object) -> str | None:
    """Return the metric that an entry of `meta` is about; None where it is about something else."""
    return key.removeprefix(_PREFIX) if isinstance(key, str) and key.startswith(_PREFIX) else None


def full_key(key: str) -> str | None:
    """Return the metric whose code an entry of `meta` names; None where it is about something else."""
    return key.removeprefix(SOURCE) if key.startswith(SOURCE) else None


def full_names(meta: Mapping[str, str]) -> dict[str, str]:
    """Return the metrics that a folder has, name -> "mine.py:margin", or its name where it was given in Python."""
    return {name: full for key, full in meta.items() if (name := full_key(key)) is not None}


def check_full_names(folder: Path, meta: Mapping[str, str], metrics: Mapping[str, str]) -> None:
    """Raise UserError where a folder has other metrics under the names of these, name -> full name."""
    known = full_names(meta)
    for name, full in metrics.items():
        if known.get(name, full) != full:
            raise UserError(
                f"metric {full}: the runs of {folder} have {known[name]} in the column {name}; give one of them "
                "another name, or choose another --out"
            )


def check_metric_names(names: Iterable[str]) -> None:
    """Raise UserError for a name that a metric of the user's cannot have, or two that differ only in their case."""
    seen: dict[str, str] = {}
    for name in names:
        if problem := _problem(name):
            raise UserError(f"metric {short(name)}: {problem}")
        # SQLite does not distinguish them.
        if (other := seen.setdefault(name.casefold(), name)) is not name:
            raise UserError(f"metrics {other} and {name}: give one of them another name")
    if len(seen) > _MOST:
        raise UserError(f"{len(seen)} metrics; a results folder holds {_MOST} at most")


def _problem(name: str) -> str:
    """Return what is wrong with the name of a metric; empty where it is fine."""
    if not _NAME.fullmatch(name):
        return "a name is letters, digits and _, at most 60 of them, and begins with no digit"
    if name.casefold() in _TAKEN:
        return "a column of the results has this name; give the metric another one"
    suffix = next((suffix for suffix in _SUFFIXES if name.casefold().endswith(suffix)), "")
    return (
        f"a name ending in {suffix} is that of a column of the results; give the metric another one" if suffix else ""
    )


def take_metrics(connection: sqlite3.Connection, folder: Path, new: OwnMetrics) -> frozenset[str]:
    """Keep in a folder's database what metrics mean, and return the names of all that it has then.

    Raises:
        UserError: the folder cannot take these metrics beside those that it has.
    """
    known = read_metrics(connection, folder)
    check_metric_names({**known, **new})
    for name in new.keys() - known.keys():
        if name in stored_columns(connection, "metrics") | stored_columns(connection, "runs"):
            raise UserError(
                f"metric {name}: the folder has a column of another ncollapse of this name; give it another"
            )
    rows = [(_PREFIX + name, meaning) for name, meaning in new.items()]
    connection.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", rows)
    return frozenset(known) | frozenset(new)


def read_metrics(connection: sqlite3.Connection, folder: Path) -> OwnMetrics:
    """Return the metrics of the user's that a folder's database has: name -> meaning.

    Raises:
        DamageError: one has a name that a metric cannot have.
    """
    found = {key: text for key, text in _entries(connection) if isinstance(key, str) and isinstance(text, str)}
    try:
        check_metric_names(found)
    except UserError as error:
        raise damaged(folder / FILE, error) from None
    return found


def readable_metrics(connection: sqlite3.Connection) -> tuple[OwnMetrics, list[str]]:
    """Return the metrics of a database that may be damaged, and what is wrong with the others, in words."""
    found: dict[str, str] = {}
    problems = []
    entries: list[tuple[object, object]] = []
    with contextlib.suppress(sqlite3.DatabaseError):  # up to a page that cannot be read
        entries.extend(_entries(connection))
    for key, text in entries:
        try:
            if not isinstance(key, str) or not isinstance(text, str):
                raise UserError(f"metric {short(key)}: its meaning is no text")
            check_metric_names({**found, key: text})
            found[key] = text
        except UserError as error:
            problems.append(str(error))
    return found, problems


def _entries(connection: sqlite3.Connection) -> Iterable[tuple[object, object]]:
    size = len(_PREFIX)
    return connection.execute(
        f"SELECT substr(key, {size + 1}), value FROM meta WHERE substr(key, 1, {size}) = '{_PREFIX}' ORDER BY rowid"
    )
