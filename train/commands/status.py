"""`ncollapse status`: the progress of a sweep, while it runs or after it has stopped. Only reads the folder."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Column, Table

from ncollapse.train.config import MOST
from ncollapse.train.formatting import DASH, is_missing, plain, rate, rough_duration
from ncollapse.train.optimizers import OPTIMIZERS
from ncollapse.train.results.reader import load_meta, load_sessions, query
from ncollapse.train.results.schema import FILE, FINISHED, STATUSES
from ncollapse.train.results.storage_errors import damaged
from ncollapse.train.results.validation import check_settings, read_json, read_time
from ncollapse.train.results.writer import LOCK
from ncollapse.train.sweep.stack_size import Plan

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class StackStatus:
    """A stack in training, or in training when the sweep stopped.

    Attributes:
        size: number of runs.
        epoch, epochs: epochs trained, and those of its longest run.
        updated: time of its last progress.
        checkpoint: epoch of its last checkpoint.
    """

    id: int
    size: int
    model: str
    data: str
    epoch: int
    epochs: int
    updated: datetime
    checkpoint: int | None


@dataclasses.dataclass(frozen=True)
class SweepStatus:
    """The progress of a sweep.

    Attributes:
        sweeping: whether a process trains the sweep now; None where that cannot be found out.
        counts: status, of `STATUSES` -> number of runs. Runs that a stopped sweep left running count as pending.
        optimizers: optimizer -> number of finished runs and of all runs.
        session: number of the last start of the sweep, which began at `started` by `command`; None before the first.
        trained: runs trained in that session; fractions of runs count.
        seconds: from the start of that session to its last progress.
        left: seconds until all runs are finished at that rate; None without a rate.
        engine: how the runs are trained, as the store keeps it; None before there is a plan.
    """

    grid: str
    sweeping: bool | None
    counts: dict[str, int]
    optimizers: dict[str, tuple[int, int]]
    session: int | None
    started: datetime | None
    command: str
    trained: float
    seconds: float
    left: float | None
    stacks: tuple[StackStatus, ...]
    engine: dict[str, Any] | None

    @property
    def total(self) -> int:
        """Number of runs of the grid."""
        return sum(self.counts.values())

    @property
    def finished(self) -> int:
        """Number of runs that have ended, whatever their status."""
        return sum(self.counts[status] for status in FINISHED)


def read_status(folder: Path) -> SweepStatus:
    """Read the progress of the sweep in a results folder.

    Raises:
        UserError: no results there, results of another format, or damaged ones.
    """
    meta = load_meta(folder)
    sessions = load_sessions(folder)
    sweeping = _sweeping(folder)
    # One query, since the sweep may write between two.
    runs = query(
        folder,
        "SELECT status, model, data, optimizer, epochs, runs.session, stack, size, begun_epoch, epoch, updated, "
        "checkpoint_epoch FROM runs LEFT JOIN stacks ON stacks.id = runs.stack ORDER BY stack",
    )
    # NULL for a run without a plan or a stack that has not begun
    nullable = ("session", "stack", "size", "begun_epoch", "epoch", "checkpoint_epoch")
    try:
        runs = runs.astype({**dict.fromkeys(nullable, float), "epochs": "int64"})
    except (ValueError, TypeError, OverflowError) as error:
        raise damaged(folder / FILE, f"the progress of a stack is no number: {error}") from None
    if not (runs[[*nullable]].isna() | ((runs[[*nullable]] % 1 == 0) & (runs[[*nullable]].abs() < MOST))).all(
        axis=None
    ):
        raise damaged(folder / FILE, "the progress of a stack is no number of epochs")
    check_settings(runs, folder)
    last = sessions[-1] if sessions else {}
    _check_progress(runs, last.get("id"), folder)
    started = read_time(last["started"]) if last else None
    trained, seconds = _trained(runs[runs.session == last["id"]], started) if started else (0, 0.0)
    stacks = tuple(_stack(part) for _, part in runs[runs.status == "running"].groupby("stack"))
    if sweeping is False:
        runs.loc[runs.status == "running", "status"] = "pending"
    left = _left(runs)
    finished = runs.status.isin(FINISHED)
    return SweepStatus(
        grid=meta["grid"],
        sweeping=sweeping,
        counts={status: int((runs.status == status).sum()) for status in STATUSES},
        optimizers={
            name: (int(finished[chosen].sum()), int(chosen.sum()))
            for name in OPTIMIZERS
            if (chosen := runs.optimizer == name).any()
        },
        session=last.get("id"),
        started=started,
        command=last.get("command", ""),
        trained=trained / float(runs.epochs.mean()),
        seconds=seconds,
        left=0.0 if left == 0 else left * seconds / trained if trained and seconds > 0 else None,
        stacks=stacks,
        engine=_engine(meta, folder),
    )


def _engine(meta: dict[str, str], folder: Path) -> dict[str, Any] | None:
    """Return how the runs are trained, as the store keeps it; DamageError where that is no plan."""
    if "engine" not in meta:
        return None
    engine = read_json(meta["engine"])
    try:
        Plan.from_dict(engine)
    except ValueError as error:
        raise damaged(folder / FILE, error) from None
    return dict(engine)


def _check_progress(runs: "pd.DataFrame", session: int | None, folder: Path) -> None:
    """Raise DamageError where the progress of stacks in training, or of the last session, is missing or none."""
    running = runs[runs.status == "running"]
    if running[["stack", "size", "epoch", "begun_epoch"]].isna().any(axis=None):
        raise damaged(folder / FILE, "a run is in training, but in no stack that has begun")
    times = [*running.updated.unique(), *runs.updated[runs.session == session].dropna().unique()]
    if not all(read_time(time) for time in times):
        raise damaged(folder / FILE, "the time of a stack's progress cannot be read")


def _sweeping(folder: Path) -> bool | None:
    """Return whether another process holds the folder's lock; None where the lock may not be tried."""
    if not (folder / LOCK).is_file():  # trying the lock would make the file
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a folder of another user, or a read-only one
        return None


def _trained(runs: "pd.DataFrame", started: datetime) -> tuple[int, float]:
    """Return the epochs trained in a session, and the seconds from its start to its last progress."""
    runs = runs[runs.updated.notna()]  # without those that were moved into new stacks, which have not begun
    if runs.empty:
        return 0, 0.0
    reached = runs.epoch.where(~runs.status.isin(FINISHED), runs.epochs).clip(upper=runs.epochs)
    trained = (reached - runs.begun_epoch.clip(upper=runs.epochs)).clip(lower=0).sum()
    updated = datetime.fromisoformat(runs.updated.max())
    return int(trained), max(0.0, (updated - started).total_seconds())


def _left(runs: "pd.DataFrame") -> int:
    """Return the epochs still to be trained; a run that is not running starts from its checkpoint or from epoch 0."""
    todo = runs[~runs.status.isin(FINISHED)]
    reached = todo.epoch.where(todo.status == "running", todo.checkpoint_epoch).fillna(0.0)
    return int((todo.epochs - reached).clip(lower=0).sum())


def _stack(runs: "pd.DataFrame") -> StackStatus:
    row = runs.iloc[0]
    checkpoint = None if is_missing(row["checkpoint_epoch"]) else int(row["checkpoint_epoch"])
    return StackStatus(
        id=int(row["stack"]), size=int(row["size"]), model=row["model"], data=row["data"],
        epoch=max(int(row["epoch"]), checkpoint or 0),  # a checkpoint may be newer than the progress
        epochs=int(runs.epochs.max()), updated=datetime.fromisoformat(row["updated"]), checkpoint=checkpoint,
    )  # fmt: skip


def print_status(status: SweepStatus, console: Console, now: datetime | None = None) -> None:
    """Print the progress within 80 columns; `now`, from which "ago" is counted, is by default the current time."""

    def say(text: str) -> None:
        console.print(plain(text))

    finished = status.finished == status.total
    activity = {True: "a sweep is running", False: "no sweep is running", None: "unknown whether a sweep is running"}
    since = f"; last start {status.started.astimezone():%Y-%m-%d %H:%M}" if status.started else ""
    say(f"{status.grid}: {activity[status.sweeping]}{since}")
    counts = ", ".join(f"{n} {name}" for name, n in status.counts.items() if n)
    say(f"{status.finished} of {status.total} runs finished: {counts}")
    if status.session is not None:
        left = "time left still unknown" if status.left is None else f"about {rough_duration(status.left)} left"
        say(f"{rate(status.trained, status.seconds)} in session {status.session}" + ("" if finished else f"; {left}"))
    if status.engine:
        say(f"Engine {status.engine.get('engine', 'local')}")
        for line in Plan.from_dict(status.engine).describe():
            say(f"  {line}")
    table = _table("optimizer", _right("finished"), "")
    for name, (done, total) in status.optimizers.items():
        table.add_row(plain(name), f"{done}/{total}", ProgressBar(total=total, completed=done, width=40))
    console.print(table)
    if status.stacks:
        console.print(_stacks(status, now or datetime.now(UTC)))
    elif status.sweeping and not finished:
        say("No stack is training at the moment: a sweep measures speeds before it starts")
    if status.sweeping is False and status.command and not finished:
        console.print(plain(f"To continue: {status.command}"), soft_wrap=True)


def _stacks(status: SweepStatus, now: datetime) -> Table:
    table = _table(*map(_right, ("stack", "runs", "epoch", "checkpoint")), "training", _right("updated"))
    table.title = "Stopped in the middle" if status.sweeping is False else "In training"
    for stack in status.stacks:
        table.add_row(
            str(stack.id), str(stack.size), f"{stack.epoch} of {stack.epochs}",
            DASH if stack.checkpoint is None else str(stack.checkpoint), plain(f"{stack.model} on {stack.data}"),
            f"{rough_duration((now - stack.updated).total_seconds())} ago",
        )  # fmt: skip
    return table


def _table(*columns: str | Column) -> Table:
    return Table(*columns, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))


def _right(name: str) -> Column:
    return Column(name, justify="right")
