"""Rows of SQLite as DataFrames with the documented dtypes, in blocks: a block costs no more than its own size."""

import itertools
import operator
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.train.errors import DamageError
from ncollapse.train.results import schema
from ncollapse.train.results.columns import ResultColumn, dtypes
from ncollapse.train.results.storage_errors import damaged

if TYPE_CHECKING:
    import pandas as pd

#: Rows that are Python objects at a time: about 0.1 GB.
BLOCK = 50_000
#: dtype -> the types that a value of SQLite may have in a column of it; None where a value may be missing.
_ALLOWED: dict[str, set[type]] = {
    "float64": {float, int, type(None)}, "string": {str, type(None)}, "int64": {int}, "Int64": {int, type(None)},
}  # fmt: skip


def blocks(rows: sqlite3.Cursor, wanted: Iterable[ResultColumn], folder: Path) -> Iterator["pd.DataFrame"]:
    """Yield the columns `wanted` of the rows that a query finds, at most `BLOCK` rows at a time; at least one block.

    Raises:
        DamageError: a value is of a type that its column cannot have.
    """
    types = dtypes(wanted)
    names = [column[0] for column in rows.description]
    places = {name: names.index(name) for name in types}
    found = rows.fetchmany(BLOCK)
    while True:
        yield _frame(found, types, places, folder)
        found = rows.fetchmany(BLOCK)
        if not found:
            return


def joined(frames: Sequence["pd.DataFrame"]) -> "pd.DataFrame":
    """Return the rows of some frames with the same columns as one frame, in order; the frames are used up."""
    import pandas as pd

    if len(frames) == 1:
        return frames[0]
    columns: dict[str, pd.Series[Any]] = {}
    for name in map(str, frames[0].columns):  # column by column, so that no more than one of them is held twice
        parts: list[pd.Series[Any]] = [frame.pop(name) for frame in frames]
        columns[name] = pd.concat(parts, ignore_index=True)
    return pd.DataFrame(columns, copy=False)


def with_constants(
    frame: "pd.DataFrame", values: Mapping[str, Any], wanted: Iterable[ResultColumn], folder: Path
) -> "pd.DataFrame":
    """Return a frame with columns of one value each beside its own, all in the order of `wanted`.

    Raises:
        DamageError: a value is of a type that its column cannot have.
    """
    import numpy as np
    import pandas as pd

    everywhere = np.zeros(len(frame), dtype=np.intp)
    columns: dict[str, Any] = {}
    for name, dtype in dtypes(wanted).items():
        if name in values:
            _check([values[name]], name, dtype, folder)
            columns[name] = pd.Series([values[name]], dtype=dtype).array.take(everywhere)
        else:
            columns[name] = frame.pop(name)
    return pd.DataFrame(columns, copy=False)


def _frame(
    rows: Sequence[tuple[Any, ...]], types: dict[str, str], places: dict[str, int], folder: Path
) -> "pd.DataFrame":
    import numpy as np
    import pandas as pd

    floats = [name for name, dtype in types.items() if dtype == "float64"]
    columns: dict[str, Any] = {}
    for name, dtype in types.items():
        if dtype != "float64":
            values = list(map(operator.itemgetter(places[name]), rows))
            _check(values, name, dtype, folder)
            columns[name] = np.array(values, dtype="int64") if dtype == "int64" else pd.array(values, dtype=dtype)  # type: ignore[call-overload]
    if floats:
        # All at once: a column at a time would take four times as long.
        taken = list(map(_taking([places[name] for name in floats]), rows))
        if not set(map(type, itertools.chain.from_iterable(taken))) <= _ALLOWED["float64"]:
            for i, name in enumerate(floats):
                _check([row[i] for row in taken], name, "float64", folder)
        table: np.ndarray[Any, Any] = np.array(taken, dtype="float64").reshape(len(rows), len(floats)).T.copy()
        columns |= dict(zip(floats, table, strict=True))
    return pd.DataFrame({name: columns[name] for name in types}, copy=False)


def _taking(places: list[int]) -> Callable[[tuple[Any, ...]], Any]:
    """Return the function that takes these values of a row, as a tuple."""
    if len(places) == 1:
        return lambda row: (row[places[0]],)
    return operator.itemgetter(*places)


def _check(values: list[Any], name: str, dtype: str, folder: Path) -> None:
    if not set(map(type, values)) <= _ALLOWED[dtype]:
        what = {"float64": "a number", "string": "text"}.get(dtype, "an integer")
        raise damage(folder, f"{name} is not {what} everywhere")


def damage(folder: Path, what: object) -> DamageError:
    """Return the error for a database that holds what cannot be there."""
    return damaged(folder / schema.FILE, what)
