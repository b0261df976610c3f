"""The report on the terminal: its tables, and the one table of `ncollapse run`."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ncollapse.formatting import number
from ncollapse.train.formatting import plain
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.view import Cell, View
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.reader import load_own_metrics, load_runs


def print_across(console: Console, view: View, title: str, width: int = 6) -> None:
    """Print a table transposed, `width` rows side by side: six optimizers fit in 80 characters."""
    rows = view.rows()
    for start in range(0, max(1, len(rows)), width):
        shown, last = rows[start : start + width], start + width >= len(rows)
        table = _empty_table(title if start == 0 else "", view.caption if last else None)
        table.add_column("")
        for row in shown:
            table.add_column(plain(row[0].text), justify="right", overflow="fold")
        for i, column in list(enumerate(view.columns))[1:]:
            table.add_row(column.title, *(_lines(row[i]) for row in shown))
        console.print(table)


def print_down(console: Console, view: View, title: str) -> None:
    """Print a table row by row."""
    table = _empty_table(title, view.caption)
    for column in view.columns:
        table.add_column(column.title, justify="left" if column.words else "right", overflow="fold")
    for row in view.rows():
        table.add_row(*map(_lines, row))
    console.print(table)


def print_run(folder: Path, run_id: str, console: Console) -> None:
    """Print every metric of a run of the folder, at its start and its end."""
    runs = load_runs(folder)
    run = runs[runs.id == run_id].iloc[0]
    table = Table("metric", header_style="bold", title=plain(f"{run.model} on {run.data}, {run.epochs} epochs"))
    table.add_column("start", justify="right")
    table.add_column("end", justify="right")
    for name in (*METRICS, *load_own_metrics(folder)):
        table.add_row(plain(name), number(run[f"{name}_start"]), number(run[name]))
    prediction = predicted_nc0(run)
    if prediction is not None:
        table.add_row("nc0 predicted", number(prediction[0]), number(prediction[-1]))
    console.print(table)
    ended = f"{run.status} (first seen at epoch {run.diverged_epoch:.0f})" if run.status == "diverged" else run.status
    console.print(plain(f"{ended}, {run.seconds:.1f} s; results in {folder}"), soft_wrap=True)


def _lines(cell: Cell) -> Text:
    """Return the text of a cell and the smaller lines below it."""
    text = plain(cell.text, "bold" if cell.best else "")
    return Text("\n").join([text, *(plain(line, "dim") for line in cell.small.splitlines())])


def _empty_table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=plain(title), title_justify="left", caption=plain(caption) if caption else None, caption_justify="left",
        header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
