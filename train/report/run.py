"""The table that `ncollapse run` ends with."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ncollapse.train.report.tables.main import predicted_nc0
from ncollapse.train.report.text import number
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.reader import load_runs


def print_run(folder: Path, console: Console) -> None:
    """Every metric of the folder's one run, at its start and its end."""
    run = load_runs(folder).iloc[0]
    table = Table(
        "metric", "start", "end", header_style="bold", title=f"{run.model} on {run.data}, {run.epochs} epochs"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name in METRICS:
        table.add_row(name, number(run[f"{name}_start"]), number(run[name]))
    prediction = predicted_nc0(run)
    if prediction is not None:
        table.add_row("nc0 predicted", number(prediction[0]), number(prediction[-1]))
    console.print(table)
    ended = f"{run.status} (first seen at epoch {run.diverged_epoch:.0f})" if run.status == "diverged" else run.status
    console.print(f"{ended}, {run.seconds:.1f} s; results in {folder}", soft_wrap=True)
