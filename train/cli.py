"""The command `ncollapse`: a class for each subcommand. Heavy libraries are imported where a command needs them."""

import dataclasses
import functools
import operator
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro import conf

import ncollapse
from ncollapse.train.commands import theory
from ncollapse.train.commands.endings import Terminal, end, unforeseen
from ncollapse.train.commands.overview import print_examples, print_overview
from ncollapse.train.commands.setting_options import OneOfEach, SeveralOfEach
from ncollapse.train.config import RunConfig, make_run, unknown
from ncollapse.train.engine.options import Flag, KeepOptions, Options, PlaceOptions, SourceOptions, hide_default
from ncollapse.train.engine.part import part_of, shard_of
from ncollapse.train.errors import InterruptError, LostRunsError, StoppedError, UserError
from ncollapse.train.formatting import plain
from ncollapse.train.grid import Grid, load_grid, plugins_beside, presets, run_settings
from ncollapse.train.plugins import with_code
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.export import Format, export_results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(PlaceOptions, Options, Selection):
    """Six optimizers on handwritten digits: the paper's table and a report."""

    def main(self, console: Console) -> None:
        grid, folder = _train(load_grid("demo"), self.out, self, self, console)
        _report(folder, self, console)
        _check_lost(grid, folder)
        name = "ncollapse" if shutil.which("ncollapse") else sys.argv[0]
        console.print(
            plain(f"Next: {name} sweep coupling (Adam to AdamW in steps), or {name} run --help for a run of your own.")
        )


_Folder = Annotated[conf.Positional[Path], conf.arg(metavar="DIR")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(PlaceOptions, KeepOptions):
    """Train one run and show its metrics."""

    preset: Annotated[str | None, hide_default] = None
    """A preset (paper) or a grid file; its settings for a single run replace the defaults below."""
    settings: OneOfEach
    """The run's settings."""

    def main(self, console: Console) -> None:
        from ncollapse.train.report.terminal import print_run

        given = dict(self.settings)
        plugins = plugins_beside(self.preset)
        settings = given if self.preset is None else run_settings(self.preset, given)
        run = make_run(with_code(settings, plugins), "run")
        options = Options(**{f.name: getattr(self, f.name) for f in dataclasses.fields(KeepOptions)})
        grid = Grid(_name_of(run), (run,), plugins=plugins, metrics=self.metrics)
        grid, folder = _train(grid, self.out, self, options, console)
        print_run(folder, grid.runs[0].id, console)
        _check_lost(grid, folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(PlaceOptions, Options, Selection):
    """Train every run of a grid; the same command continues where it stopped.

    A folder takes any runs on the same data: what is in it stays.
    """

    where: Annotated[str | None, hide_default] = None
    """Train only the runs of the grid that are so: --where "optimizer=adam,adamw lr<0.1"."""
    shard: Annotated[str | None, hide_default] = None
    """Train only share I of N of the grid, for an array of jobs: --shard 3/8; ncollapse merge joins their folders."""
    dry_run: Flag = False
    """Show what would be trained, how long it takes and how much it writes, and do nothing."""
    grid: Annotated[
        conf.Positional[str], conf.arg(metavar="GRID", help=f"A TOML file, or a preset: {', '.join(presets())}.")
    ]
    axes: SeveralOfEach
    """Values that replace those of the grid."""

    def main(self, console: Console) -> None:
        given = {name: list(values) for name, values in self.axes.items()}
        grid = load_grid(self.grid, given)
        grid = dataclasses.replace(grid, metrics=tuple(dict.fromkeys([*grid.metrics, *self.metrics])))
        grid = grid if self.where is None else part_of(grid, self.where)
        grid = grid if self.shard is None else shard_of(grid, self.shard)
        for note in grid.notes:
            console.print(plain(f"ncollapse: {note}", "yellow"), soft_wrap=True)
        if self.dry_run:
            from ncollapse.train.engine.planning import adopted, device_of, loader
            from ncollapse.train.engine.preview import print_preview

            out = self.out or Path("results") / grid.name
            grid = adopted(dataclasses.replace(grid, in_memory=grid.in_memory and not self.stream), out, self, console)
            device = device_of(self.device, self.engine)
            print_preview(grid, out, loader(grid, self.data_dir, self.download), device, self, console)
            return
        grid, folder = _train(grid, self.out, self, self, console)
        _report(folder, self, console)
        _check_lost(grid, folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rerun(SourceOptions, Options, Selection):
    """Train runs of a results folder again, or with other settings.

    With other settings they are added to the folder; without, they are replaced.
    """

    folder: _Folder
    """The results folder."""
    where: str
    """Which of its runs, by status and settings: --where "status=diverged,hopeless lr>0.1"."""
    code_dir: Path = Path()
    """Folder of the files with code of your own."""
    changes: SeveralOfEach
    """Values that replace those of the runs."""

    def main(self, console: Console) -> None:
        from ncollapse.train.commands.rerun import train_again

        given = {name: list(values) for name, values in self.changes.items()}
        grid = train_again(
            self.folder, self.where, given, lambda grid: _train(grid, self.folder, self, self, console), self.metrics,
            accept_changes=self.accept_changes, code_dir=self.code_dir,
        )  # fmt: skip
        _report(self.folder, self, console)
        _check_lost(grid, self.folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Join results folders, as of the jobs of an array, into a new one.

    A run that is in several of them must be the same in each.
    """

    folders: Annotated[
        conf.Positional[tuple[Path, ...]], conf.arg(help_behavior_hint="(two or more)", metavar="DIR ...")
    ]
    """The results folders: merge results/paper-shard-* --out results/paper."""
    out: Path
    """The new folder."""
    keep_first: Flag = False
    """Take a run that differs between folders from the first one, instead of an error that names what differs."""

    def main(self, console: Console) -> None:
        from ncollapse.train.results.merging import merge_folders

        merged = merge_folders(self.folders, self.out, keep_first=self.keep_first)
        console.print(
            plain(
                f"{self.out}: {merged.runs} runs, {merged.finished} of them finished; {merged.repeated} were in "
                "several folders"
            ),
            soft_wrap=True,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Selection):
    """Write tables, figures and an HTML page of a results folder, finished or not."""

    folder: _Folder
    """The results folder."""
    out: Annotated[Path | None, hide_default] = None
    """Folder for the report, by default the results folder."""

    def main(self, console: Console) -> None:
        _report(self.folder, self, console, self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Test the paper's claims on a results folder: numbers and verdicts."""

    folder: _Folder
    """The results folder."""
    threshold: float = Selection.threshold
    """Training accuracy that a run must reach to count, in [0, 1]."""
    claim: Annotated[int | None, hide_default] = None
    """Show how one claim is tested, with all its comparisons."""
    json: Flag = False
    """Print all numbers and the ids of the runs as JSON."""

    def main(self, console: Console) -> None:
        from ncollapse.train.commands.findings import findings_json, print_findings

        selection = Selection(threshold=self.threshold)
        if self.json:
            print(findings_json(self.folder, selection))
        else:
            print_findings(self.folder, selection, console, self.claim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Show the progress of a sweep, while it runs or after it has stopped."""

    folder: _Folder
    """The results folder."""
    watch: Flag = False
    """Show it anew every two seconds until the sweep ends."""
    json: Flag = False
    """Print it as JSON for other programs."""

    def main(self, console: Console) -> None:
        from ncollapse.train.commands.status import as_json, print_status, read_status, watch_status

        if self.json:
            print(as_json(read_status(self.folder)))
        elif self.watch:
            watch_status(self.folder, console)
        else:
            print_status(read_status(self.folder), console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write runs, epochs and the meaning of the columns for other programs."""

    folder: _Folder
    """The results folder, finished or not."""
    format: Format = "parquet"
    """parquet keeps types and missing values and needs pyarrow; csv needs no package."""
    out: Annotated[Path | None, hide_default] = None
    """Folder for the files; by default export in the results folder."""

    def main(self, console: Console) -> None:
        for path in export_results(self.folder, self.format, self.out):
            console.print(plain(path), soft_wrap=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """Say what of a results folder is whole or damaged; copy what is whole."""

    folder: _Folder
    """The results folder."""
    salvage: Annotated[Path | None, hide_default] = None
    """New folder for a copy of what is whole, from which the same command continues."""

    def main(self, console: Console) -> None:
        from ncollapse.train.commands.check import print_check

        print_check(self.folder, self.salvage, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theory(theory.Setting):
    """Simulate NC0 under every optimizer, and compare it with theory.

    In the unconstrained features model, with fixed features.
    """

    out: Path = Path("results/theory")
    """Folder for the figure, theory.png and theory.svg."""

    def main(self, console: Console) -> None:
        theory.print_theory(self, self.out, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Show what this machine has, what runs in fast kernels and what falls back."""

    data_dir: Annotated[Path | None, hide_default] = None
    """Folder of the data sets; by default $NCOLLAPSE_DATA, else ./data."""

    def main(self, console: Console) -> None:
        from ncollapse.train.commands.doctor import inspect_machine

        table = Table(show_header=False, box=None)
        for subject, finding in inspect_machine(self.data_dir):
            table.add_row(Text(subject, "bold"), plain(finding))
        console.print(table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Time the kernels on this machine beside PyTorch's: what is fast here."""

    device: Annotated[str | None, hide_default] = None
    """cpu, cuda, cuda:1 …; by default cuda where there is a GPU."""
    seconds: float = 15.0
    """How long to time; noise falls with it."""
    json: Flag = False
    """Print all numbers as JSON."""

    def main(self, console: Console) -> None:
        from ncollapse.train.commands.bench import bench_json, print_bench

        if self.json:
            print(bench_json(self.device, self.seconds))
        else:
            print_bench(self.device, self.seconds, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """Print the script that completes commands and options in a shell."""

    shell: Annotated[conf.Positional[Literal["bash", "zsh", "fish"]], conf.arg(metavar="{bash,zsh,fish}")]
    """The shell; the examples name the files that these shells read."""

    def main(self, console: Console) -> None:
        commands: Any = functools.reduce(operator.or_, COMMANDS.values())
        tyro.cli(commands, prog="ncollapse", args=["--tyro-write-completion", self.shell, "-"], config=_CONFIG)


#: Command -> its class, in the order in which they are used.
COMMANDS: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in (
        *(Demo, Run, Sweep, Status, Report, Findings, Rerun, Export, Merge, Check, Theory, Doctor, Bench, Completion),
    )
}
_CONFIG = (conf.OmitSubcommandPrefixes, conf.OmitArgPrefixes, conf.FlagCreatePairsOff, conf.DisallowNone)
#: The most characters of the name of a single run's folder.
_LONGEST_NAME = 100
#: Error -> exit code, the first that fits; 75 is EX_TEMPFAIL: "give the same command again".
_CODES = {StoppedError: 75, InterruptError: 130, LostRunsError: 4}


def parse(args: list[str]) -> Any:
    """Return the command that arguments name; it exits with 2 where they are wrong, with 0 after --help."""
    if not args or args[0] in ("-h", "--help"):
        print_overview(COMMANDS)
        sys.exit(0 if args else 2)
    name, *rest = args
    if name not in COMMANDS:
        end(
            f"options stand after the command: ncollapse COMMAND {name}; ncollapse --help lists the commands"
            if name.startswith("-")
            else unknown("command", name, tuple(COMMANDS)),
            2,
        )
    try:
        return tyro.cli(COMMANDS[name], prog=f"ncollapse {name}", args=rest, config=_CONFIG)
    except SystemExit as stop:
        if not stop.code:
            print_examples(name)
        raise


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    It exits with 0, 1 after a `UserError`, 2 for bad arguments, 3 after an error that nobody foresaw, 4 where all runs
    have ended but some diverged, 75 where a signal or --minutes has stopped a sweep that is to be continued, 130 after
    Ctrl-C, 141 where whoever read the output has gone.
    """
    args = sys.argv[1:] if args is None else args
    if args in (["--version"], ["-V"]):
        print(f"ncollapse {ncollapse.__version__}")
        return
    # Batch systems end a job with SIGTERM; a sweep handles it otherwise.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Terminal()
    try:
        parse(args).main(console)
    except UserError as error:
        end(str(error), next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        sys.exit(141)
    except Exception as error:
        end(unforeseen(error), 3)


def _name_of(run: RunConfig) -> str:
    """Return the name of the results folder of a single run."""
    text = f"{run.model}-{run.data}-{run.optimizer}-{run.id}"
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.")[-_LONGEST_NAME:].lstrip("-.")


def _train(
    grid: Grid, out: Path | None, source: SourceOptions, options: Options, console: Console
) -> tuple[Grid, Path]:  # fmt: skip
    """Train the unfinished runs of a grid; return it as the results folder knows it, and the folder."""
    from ncollapse.train.engine.planning import adopted, device_of, loader
    from ncollapse.train.engine.scheduler import sweep

    out = out or Path("results") / grid.name
    started = time.perf_counter()
    grid = dataclasses.replace(grid, in_memory=grid.in_memory and not source.stream)
    grid = adopted(grid, out, options, console)
    load = loader(grid, source.data_dir, source.download)
    trained = sweep(grid, out, load, device_of(source.device, options.engine), options, console)
    if trained:
        console.print(plain(f"Trained {trained} of {len(grid.runs)} runs in {time.perf_counter() - started:.0f} s."))
    else:
        console.print(plain(f"All {len(grid.runs)} runs in {out} are done; nothing to train."), soft_wrap=True)
    return grid, out


def _check_lost(grid: Grid, folder: Path) -> None:
    """Raise LostRunsError where runs of a grid diverged or were given up."""
    from ncollapse.train.results.reader import query

    runs = query(folder, "SELECT id, status FROM runs")
    statuses = runs.status[runs.id.isin([run.id for run in grid.runs])].value_counts()
    said = {
        "diverged": "diverged (their loss was NaN or inf)",
        "hopeless": "were ended as hopeless",
        "failed": f"failed (their own code raised an error; tracebacks are in {folder / 'failures'})",
    }
    lost = {name: int(statuses[name]) for name in said if name in statuses}
    if lost:
        how = " and ".join(f"{count} {said[name]}" for name, count in lost.items())
        raise LostRunsError(
            f"all {len(grid.runs)} runs have ended, but {how}; they are recorded as such and never count as "
            "collapsed. To train them with other settings: ncollapse rerun "
            f"{folder} --where status={','.join(lost)} --lr …"
        )


def _report(folder: Path, selection: Selection, console: Console, out: Path | None = None) -> None:
    from ncollapse.train.report.page.write import write_report

    page = write_report(folder, selection, console, out)
    text = f"Results: {folder}/runs.sqlite, figures and {page} (open it in a browser)."
    console.print(plain(text), soft_wrap=True)
