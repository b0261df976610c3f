"""`write_report`: tables on the terminal, figures as PNG, one HTML page that needs no network."""

import base64
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from nc.train.errors import UserError
from nc.train.report import figures, tables
from nc.train.report.selection import Selection
from nc.train.results import load_meta, load_metrics, load_runs, load_sessions
from nc.train.schema import FINISHED

#: What a cell says, and a second, smaller line below it.
Cell = tuple[str, str]
Column = tuple[str, Callable[["pd.Series[Any]"], Cell]]


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


def _metric(name: str) -> Column:
    return name.upper(), lambda row: (number(row[name]), change(row[f"{name}_change"]))


def _accuracy(name: str, title: str) -> Column:
    return title, lambda row: ("–" if pd.isna(row[name]) else f"{100 * row[name]:.2f} %", "")


def _text(title: str, text: Callable[["pd.Series[Any]"], str]) -> Column:
    return title, lambda row: (text(row), "")


MAIN: tuple[Column, ...] = (
    _text("optimizer", lambda row: figures.LABELS[row.optimizer]),
    _metric("nc0"),
    _text("NC0 predicted", lambda row: number(row.nc0_predicted)),
    *(_metric(name) for name in ("nc1", "nc2", "nc3", "nc4")),
    _accuracy("train_accuracy", "train acc."),
    _accuracy("val_accuracy", "val. acc."),
    _text("settings", lambda row: "no run reached the threshold" if pd.isna(row.settings) else row.settings),
    _text("reached", lambda row: f"{row.eligible} of {row.runs}"),
)
DECAY: tuple[Column, ...] = (
    _text("optimizer", lambda row: figures.LABELS[row.optimizer]),
    _text("weight decay", lambda row: f"{row.weight_decay:g}"),
    _text("coupling", lambda row: f"{row.coupling:g}"),
    _text("smallest NC0 / start", lambda row: number(row.smallest)),
    _text("largest NC0 / start", lambda row: number(row.largest)),
    _text("runs", lambda row: str(row.runs)),
)


def cells(frame: pd.DataFrame, columns: tuple[Column, ...]) -> list[list[Cell]]:
    """The table's text, row by row."""
    return [[cell(row) for _, cell in columns] for _, row in frame.iterrows()]


def _terminal_table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def print_main_table(console: Console, title: str, caption: str, frame: pd.DataFrame) -> None:
    """The main table on the terminal, an optimizer a column: it fits in 80 characters."""
    optimizers = cells(frame, MAIN)
    table = _terminal_table(title, caption)
    table.add_column("")
    for row in optimizers:
        table.add_column(row[0][0], justify="right")
    for i, (name, _) in list(enumerate(MAIN))[1:]:
        table.add_row(name, *("\n[dim]".join(part for part in row[i] if part) for row in optimizers))
    console.print(table)


def print_decay_table(console: Console, frame: pd.DataFrame) -> None:
    """NC0 by decay and coupling on the terminal."""
    table = _terminal_table("NC0 by weight decay and coupling")
    for name, _ in DECAY:
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for row in cells(frame, DECAY):
        table.add_row(*(text for text, _ in row))
    console.print(table)


def write_report(folder: Path, selection: Selection, console: Console) -> Path:
    """Print the tables and write figures and `report.html` into a results folder, finished or not.

    Returns:
        The page's path.

    Raises:
        UserError: no results there, or the folder cannot be written.
    """
    runs, metrics = load_runs(folder), load_metrics(folder)
    meta, sessions = load_meta(folder), load_sessions(folder)
    caption = (
        f"Best = smallest {selection.best_by.upper()} of the runs that reached {100 * selection.threshold:g} % "
        "training accuracy (reached: how many did). Below each metric its change from initialisation. NC0 predicted: "
        "the exact recursion of SGD and SGDW."
    )
    sections = []
    try:
        for title, part in tables.settings_of(runs):
            slug = title.replace(" on ", "-")
            table, decay = tables.main_table(part, selection), tables.nc0_by_decay(part, selection)
            print_main_table(console, title, caption, table)
            if part.groupby("optimizer").coupling.nunique().max() > 1:
                print_decay_table(console, decay)
            drawn = []
            if part.nc0.notna().any():
                drawn = [
                    _figure(
                        folder / f"nc0-{slug}.png", figures.nc0_over_epochs(part, metrics, selection), _NC0_CAPTION
                    ),
                    _figure(folder / f"decay-{slug}.png", figures.metrics_over_decay(part, selection), _DECAY_CAPTION),
                ]
            sections.append(
                {
                    "title": title,
                    "table": cells(table, MAIN),
                    "decay": cells(decay, DECAY),
                    "figures": drawn,
                    "unfinished": int((~part.status.isin(FINISHED)).sum()),
                    "runs": len(part),
                }
            )
        page = _render(meta, sections, sessions, runs, caption, selection)
        path = folder / "report.html"
        path.write_text(page, "utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder.resolve()}: {error}; the results themselves are kept"
        ) from None
    return path


_NC0_CAPTION = (
    "NC0 over epochs, each optimizer's best run. Collapse needs NC0 → 0. Solid: weight decay coupled into the "
    "gradient; dashed: decoupled. Circles: the exact linear recursion of the row sum under SGD and SGDW, from the "
    "run's own start."
)
_DECAY_CAPTION = (
    "Final metrics over weight decay. Each dot is a run (hollow: it missed the training-accuracy threshold); the line "
    "is the median of the runs that reached it."
)


def _figure(path: Path, figure: Any, caption: str) -> dict[str, str]:
    image = figures.png(figure)
    path.write_bytes(image)
    return {"data": base64.b64encode(image).decode(), "caption": caption, "name": path.name}


def _render(
    meta: dict[str, str],
    sections: list[dict[str, Any]],
    sessions: list[dict[str, Any]],
    runs: pd.DataFrame,
    caption: str,
    selection: Selection,
) -> str:
    import jinja2

    source = (files("nc.train.report") / "page.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    seconds = float(runs.seconds.sum())
    return template.render(
        name=meta["grid"],
        description=meta["description"],
        sections=sections,
        main_columns=[name for name, _ in MAIN],
        decay_columns=[name for name, _ in DECAY],
        caption=caption,
        threshold=f"{100 * selection.threshold:g} %",
        counts=tables.status_counts(runs),
        total=len(runs),
        minutes="–" if math.isnan(seconds) else f"{seconds / 60:.1f}",
        sessions=sessions,
    )
