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
    """A second, smaller line below the text."""
    value: float | None = None
    """The sort key, NaN last; None: sort by the text."""
    optimizer: str = ""
    """The optimizer whose line (colour, dashes) is drawn beside the text."""
    best: bool = False
    """Whether the value is the smallest of a column that marks it."""


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
        """Show a number, with its change in percent below it where the table has a column `NAME_change`."""

        def cell(row: "pd.Series[Any]") -> Cell:
            change = formatting.change(row.get(f"{name}_change", math.nan))
            return Cell(formatting.number(row[name]), change, float(row[name]))

        return cls(title or name.upper(), cell, best)

    @classmethod
    def share(cls, name: str, title: str) -> "Column":
        """Show a share in [0, 1] in percent."""
        return cls(title, lambda row: Cell(formatting.percentage(row[name]), value=float(row[name])))

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
            numbers = [v for row in table if (v := row[i].value) is not None and not math.isnan(v)]
            if column.best and len(numbers) > 1:
                for row in table:
                    row[i] = dataclasses.replace(row[i], best=row[i].value == min(numbers))
        return table
