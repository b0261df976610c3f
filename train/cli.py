"""The command `ncollapse`. Heavy libraries are imported where a command needs them."""

import dataclasses
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

import nc
from nc.train.config import DESCRIPTIONS, FIELDS, make_run
from nc.train.errors import InterruptError, UserError
from nc.train.report.selection import Selection

if TYPE_CHECKING:
    from nc.train.grid import Grid


#: For options whose default the help text tells better than "None".
_told = tyro.conf.arg(help_behavior_hint="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
    """Where data come from, where results go and what trains."""

    out: Annotated[Path | None, _told] = None
    """Results folder; by default results/NAME. The same command on the same folder continues."""
    data_dir: Annotated[Path | None, _told] = None
    """Folder of the data sets; by default $NCOLLAPSE_DATA, else ./data."""
    download: bool = False
    """Let torchvision download a data set that is missing."""
    device: Annotated[str | None, _told] = None
    """cpu, cuda, cuda:1 …; by default cuda where there is a GPU."""
    stack: Annotated[int | None, _told] = None
    """Runs trained together as one program; by default chosen for the model."""
    save_weights: bool = False
    """Write each run's final weights to weights/RUN.pt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Where, Selection):
    """Six optimizers on scikit-learn's digits: the paper's table, figures and a report in a few minutes."""

    def main(self, console: Console) -> None:
        from nc.train.grid import load_grid

        _sweep(load_grid("demo"), self, self, console)
        me = "ncollapse" if shutil.which("ncollapse") else sys.argv[0]
        console.print(f"Next: {me} sweep coupling (Adam to AdamW in steps), or {me} run --help for a run of your own.")


def _settings(name: str, several: bool) -> Any:
    """A class with an argument for each field of `RunConfig`: one value with the field's default, or several.

    Types alone are checked here, values later, by `make_run`, whose messages name the grid and the key.
    """

    def field(f: dataclasses.Field[Any]) -> tuple[str, Any, Any]:
        kind = tuple[f.type, ...] | None if several else f.type  # type: ignore[name-defined]
        hint = "(default: the grid's)" if several else "" if f.default is None else None
        about = tyro.conf.arg(help=DESCRIPTIONS[f.name], help_behavior_hint=hint)
        return f.name, Annotated[kind, about], None if several else f.default

    return dataclasses.make_dataclass(name, [field(f) for f in FIELDS], kw_only=True, frozen=True)


_Settings = _settings("settings", several=False)
_Axes = _settings("axes", several=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Where):
    """Train one run and show its metrics."""

    settings: _Settings = dataclasses.field(default_factory=_Settings)  # type: ignore[valid-type]

    def main(self, console: Console) -> None:
        from nc.train.grid import Grid
        from nc.train.report.run import print_run

        run = make_run({**vars(self.settings)}, "run")
        out = _train(Grid(f"{run.model}-{run.data}-{run.optimizer}-{run.id}", (run,)), self, console)
        print_run(out, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Where, Selection):
    """Train every run of a grid; the same command continues where it was stopped."""

    grid: tyro.conf.Positional[str]
    """A TOML file, or a preset: demo, coupling, paper."""
    axes: _Axes = dataclasses.field(default_factory=_Axes)  # type: ignore[valid-type]

    def main(self, console: Console) -> None:
        from nc.train.grid import load_grid

        given = {name: list(values) for name, values in vars(self.axes).items() if values is not None}
        _sweep(load_grid(self.grid, given), self, self, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Selection):
    """Tables, figures and one HTML page from a results folder, finished or not."""

    folder: tyro.conf.Positional[Path]
    """The results folder."""

    def main(self, console: Console) -> None:
        _report(self.folder, self, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """What this machine has: torch, Triton, GPU, data sets; what will be fast and what falls back."""

    data_dir: Annotated[Path | None, _told] = None
    """Folder of the data sets; by default $NCOLLAPSE_DATA, else ./data."""

    def main(self, console: Console) -> None:
        from rich.table import Table

        from nc.train.doctor import findings

        table = Table(show_header=False, box=None)
        for what, finding in findings(self.data_dir):
            table.add_row(f"[bold]{what}", finding)
        console.print(table)


def main(args: list[str] | None = None) -> None:
    """Entry point: exits with 0, 1 for an error that the message explains, 130 after Ctrl-C, 2 for bad arguments."""
    args = sys.argv[1:] if args is None else args
    if args in (["--version"], ["-V"]):
        print(f"ncollapse {nc.__version__}")
        return
    # Batch systems end a job with SIGTERM: treated as Ctrl-C, which keeps and reports what is finished.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    try:
        command = tyro.cli(
            Demo | Run | Sweep | Report | Doctor,
            prog="ncollapse",
            description="Which optimizers drive a classifier into neural collapse, and why.",
            args=args,
            config=(
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.DisallowNone,
            ),
        )
        command.main(console)
    except UserError as error:
        # markup off: a message may hold brackets, as in [[grid]]
        Console(stderr=True).print(f"ncollapse: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        sys.exit(130 if isinstance(error, InterruptError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _train(grid: "Grid", where: Where, console: Console) -> Path:
    """Train what is not finished of a grid; returns the results folder."""
    if where.stack is not None and where.stack < 1:
        raise UserError(f"--stack must be at least 1 run; got {where.stack}")
    from nc.train.data import load
    from nc.train.engine import sweep

    device = _device(where.device)
    out = where.out or Path("results") / grid.name
    started = time.perf_counter()
    trained = sweep(
        grid,
        out,
        lambda name: load(name, data_dir=where.data_dir, download=where.download, device=device),
        device,
        stack=where.stack,
        save_weights=where.save_weights,
        console=console,
    )
    if trained:
        console.print(f"Trained {trained} of {len(grid.runs)} runs in {time.perf_counter() - started:.0f} s.")
    else:
        console.print(f"All {len(grid.runs)} runs in {out} are done; nothing to train.")
    return out


def _sweep(grid: "Grid", where: Where, selection: Selection, console: Console) -> None:
    _report(_train(grid, where, console), selection, console)


def _report(folder: Path, selection: Selection, console: Console) -> None:
    from nc.train.report.page import write_report

    page = write_report(folder, selection, console)
    console.print(f"Results: {folder}/runs.sqlite, figures and {page} (open it in a browser).", soft_wrap=True)


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
