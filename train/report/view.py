"""Tables as the page and the terminal show them: the text of every cell from a DataFrame and a list of columns."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from ncollapse import formatting
from ncollapse.plot.looks import look_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """The content of a cell."""

    text: str
    small: str = ""
    """Smaller text below, a line or several."""
    value: float | None = None
    """The sort key, NaN last; None: sort by the text."""
    optimizer: str = ""
    """The optimizer whose line (colour, dashes) is drawn beside the text."""
    best: bool = False
    """Whether the value is the smallest of a column that marks it, by more than the seeds differ."""
    spread: tuple[float, float] | None = None
    """Smallest and largest value over several seeds."""
    compared: bool = True
    """Whether the value may be marked as the best of its column, and be what others are compared with."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: `cell` makes a cell from a row of the DataFrame."""

    title: str
    cell: Callable[["pd.Series[Any]"], Cell]
    best: bool = False
    """Whether the smallest number is marked."""
    words: bool = False
    """Whether the column holds text, which is aligned to the left."""

    @classmethod
    def optimizer(cls) -> "Column":
        """Show the optimizer's label, beside its line."""
        name = "optimizer"
        return cls(name, lambda row: Cell(look_of(row[name]).label, optimizer=row[name]), words=True)

    @classmethod
    def text(cls, name: str, title: str = "", *, missing: str = "") -> "Column":
        """Show text, or `missing` where the table has none."""
        return cls(title or name, lambda row: Cell(missing if pd.isna(row[name]) else str(row[name])), words=True)

    @classmethod
    def metric(cls, name: str, title: str = "", *, best: bool = False) -> "Column":
        """Show a number; below it its change in percent and its range, where the table has them.

        They are the columns `NAME_change`, `NAME_low` and `NAME_high`. Numbers are compared, unless the row has
        `compared` = False.
        """

        def cell(row: "pd.Series[Any]") -> Cell:
            spread = _spread(row, name)
            change = formatting.change(row.get(f"{name}_change", math.nan))
            small = "\n".join(filter(None, (change, _range(spread, formatting.number))))
            compared = bool(row.get("compared", True))
            return Cell(formatting.number(row[name]), small, float(row[name]), spread=spread, compared=compared)

        return cls(title or name.upper(), cell, best)

    @classmethod
    def share(cls, name: str, title: str) -> "Column":
        """Show a share in [0, 1] in percent; below it its range, where the table has one."""

        def cell(row: "pd.Series[Any]") -> Cell:
            spread = _spread(row, name)
            return Cell(formatting.percentage(row[name]), _range(spread, formatting.percentage), float(row[name]))

        return cls(title, cell)

    @classmethod
    def count(cls, name: str, title: str = "") -> "Column":
        """Show an integer."""
        return cls(title or name, lambda row: Cell(f"{row[name]:,}", value=float(row[name])))

    @classmethod
    def setting(cls, name: str, title: str = "") -> "Column":
        """Show the value of a numeric setting; a dash where the optimizer does not have it."""

        def cell(row: "pd.Series[Any]") -> Cell:
            return Cell(formatting.DASH if pd.isna(row[name]) else f"{row[name]:g}", value=float(row[name]))

        return cls(title or name.replace("_", " "), cell)


@dataclasses.dataclass(frozen=True)
class View:
    """A table of the page; `name` is the stem of its CSV file, which holds `frame`."""

    name: str
    caption: str
    columns: Sequence[Column]
    frame: pd.DataFrame

    def rows(self) -> list[list[Cell]]:
        """Return the cells, row by row."""
        table = [[column.cell(row) for column in self.columns] for _, row in self.frame.iterrows()]
        for i, column in enumerate(self.columns):
            if column.best:
                cells = [row[i] for row in table if row[i].compared and not formatting.is_missing(row[i].value)]
                best = _smallest(cells)
                for row in table:
                    row[i] = dataclasses.replace(row[i], best=any(row[i] is cell for cell in best))
        return table


def _smallest(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with the smallest value, none if the seeds of another one overlap theirs."""
    if len(cells) < 2:
        return []
    best = min(cells, key=lambda cell: cell.value or 0.0)
    same = [cell for cell in cells if cell.value == best.value]
    if len(same) > 1 and any(cell.spread for cell in same):
        return []
    others = [cell for cell in cells if cell.value != best.value]
    return same if all(_ends(best)[1] < _ends(cell)[0] for cell in others) else []


def _ends(cell: Cell) -> tuple[float, float]:
    """Return the range of a value; without several seeds, it is the value."""
    return cell.spread or (cell.value or 0.0, cell.value or 0.0)


def _spread(row: "pd.Series[Any]", name: str) -> tuple[float, float] | None:
    low, high = (float(row.get(f"{name}_{end}", math.nan)) for end in ("low", "high"))
    return None if math.isnan(low) or math.isnan(high) else (low, high)


def _range(spread: tuple[float, float] | None, written: Callable[[float], str]) -> str:
    if spread is None:
        return ""
    low, high = map(written, spread)
    return "" if low == high else f"{low} – {high}"
