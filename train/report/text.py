"""Numbers and tables in words: what a cell says on the page and on the terminal."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from ncollapse.train.optimizers import LABELS


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a cell says.

    Attributes:
        small: a second, smaller line below it.
        value: what a column is sorted by, NaN last; None: by the text.
        optimizer: whose colour stands beside the text.
        best: whether it is the smallest of its column, where that is said.
    """

    text: str
    small: str = ""
    value: float | None = None
    optimizer: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Column:
    """A column: its title, what a row says there, whether the smallest number is marked and words stand to the left."""

    title: str
    cell: Callable[["pd.Series[Any]"], Cell]
    best: bool = False
    words: bool = False


@dataclasses.dataclass(frozen=True)
class View:
    """A table of the page. `name` is that of its CSV file, without the ending; `frame` is what the file holds."""

    name: str
    caption: str
    columns: Sequence[Column]
    frame: pd.DataFrame

    def rows(self) -> list[list[Cell]]:
        """The cells, row by row."""
        return cells(self.frame, self.columns)


def cells(frame: pd.DataFrame, columns: Sequence[Column]) -> list[list[Cell]]:
    """The table's text, row by row."""
    table = [[column.cell(row) for column in columns] for _, row in frame.iterrows()]
    for i, column in enumerate(columns):
        numbers = [v for row in table if (v := row[i].value) is not None and not math.isnan(v)]
        if column.best and len(numbers) > 1:
            for row in table:
                row[i] = dataclasses.replace(row[i], best=row[i].value == min(numbers))
    return table


def number(value: float) -> str:
    """Three digits, a dash for NaN."""
    if pd.isna(value):
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def change(percent: float) -> str:
    """A change in percent; nothing for NaN."""
    if pd.isna(percent):
        return ""
    if -100 <= percent < -99.95:
        return "<-99.9 %"
    return f"{percent:+.0f} %" if percent >= 100 else f"{percent:+.1f} %"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits; a dash for NaN."""
    if pd.isna(seconds):
        return "–"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def measured(name: str, title: str = "", *, best: bool = False) -> Column:
    """A number, and its change in percent where the table has one."""

    def cell(row: "pd.Series[Any]") -> Cell:
        return Cell(number(row[name]), change(row.get(f"{name}_change", math.nan)), float(row[name]))

    return Column(title or name.upper(), cell, best)


def share(name: str, title: str) -> Column:
    """A share in percent."""
    return Column(
        title, lambda row: Cell("–" if pd.isna(row[name]) else f"{100 * row[name]:.2f} %", value=float(row[name]))
    )


def count(name: str, title: str = "") -> Column:
    """An integer."""
    return Column(title or name, lambda row: Cell(f"{row[name]:,}", value=float(row[name])))


def setting(name: str, title: str = "") -> Column:
    """The value of a setting."""
    return Column(title or name.replace("_", " "), lambda row: Cell(f"{row[name]:g}", value=float(row[name])))


def words(title: str, text: Callable[["pd.Series[Any]"], str]) -> Column:
    """Text."""
    return Column(title, lambda row: Cell(text(row)), words=True)


def optimizer() -> Column:
    """The optimizer, in its colour."""
    return Column(
        "optimizer",
        lambda row: Cell(LABELS.get(row.optimizer, row.optimizer), optimizer=row.optimizer),
        words=True,
    )


def terminal_table(title: str, caption: str | None = None) -> Table:
    """An empty table for the terminal."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def print_across(console: Console, view: View, title: str, width: int = 6) -> None:
    """A table on the terminal with its rows as columns, so many side by side: six optimizers fit in 80 characters."""
    rows = view.rows()
    for start in range(0, max(1, len(rows)), width):
        shown, last = rows[start : start + width], start + width >= len(rows)
        table = terminal_table(title if start == 0 else "", view.caption if last else None)
        table.add_column("")
        for row in shown:
            table.add_column(row[0].text, justify="right")
        for i, column in list(enumerate(view.columns))[1:]:
            lines = ("\n[dim]".join(part for part in (row[i].text, row[i].small) if part) for row in shown)
            table.add_row(column.title, *lines)
        console.print(table)


def print_down(console: Console, view: View, title: str) -> None:
    """A table on the terminal, row by row."""
    table = terminal_table(title)
    for column in view.columns:
        table.add_column(column.title, justify="left" if column.words else "right")
    for row in view.rows():
        table.add_row(*(cell.text for cell in row))
    console.print(table)
