"""`ncollapse status`: the progress of a sweep, while it runs or after it has stopped. Only reads the folder."""

import dataclasses
import itertools
import json
import sqlite3
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ncollapse.formatting import DASH, read_json
from ncollapse.optimizer_table import in_table_order
from ncollapse.train.config import MOST
from ncollapse.train.engine.stack_size import Plan
from ncollapse.train.formatting import plain, rate, rough_duration
from ncollapse.train.results.ownership import LOCK
from ncollapse.train.results.reader import open_results, read_meta, read_sessions
from ncollapse.train.results.schema import ENDED, FILE, FINISHED, STATUSES
from ncollapse.train.results.storage_errors import damaged
from ncollapse.train.results.validation import check_values, read_time

#: The runs with the stacks that they are in. SQLite sums them up: a large sweep has 100,000, and pandas starts slowly.
_JOINED = "runs LEFT JOIN stacks ON stacks.id = runs.stack"
#: The arguments of `_stack` for each stack in training.
_RUNNING = (
    "SELECT stack, size, model, data, stacks.epoch, max(epochs), updated, checkpoint_epoch "
    f"FROM {_JOINED} WHERE status = 'running' GROUP BY stack ORDER BY stack"
)


#: Characters of a name that a table shows.
_WIDE = 24


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
    sweeping = _sweeping(folder)
    with open_results(folder) as connection:  # one moment, since the sweep goes on writing
        meta, sessions = read_meta(connection, folder), read_sessions(connection, folder)
        for shown in (("model", "data", "optimizer", "code"), ("epochs",)):
            rows = connection.execute(f"SELECT DISTINCT {', '.join(shown)} FROM runs")
            check_values((dict(zip(shown, row, strict=True)) for row in rows), folder)
        last = sessions[-1] if sessions else {}
        _check_progress(connection, last.get("id"), folder)
        started = read_time(last["started"]) if last else None
        trained, seconds = _trained(connection, last["id"], started) if started else (0, 0.0)
        left = _left(connection, sweeping)
        found = connection.execute("SELECT status, optimizer, count(*) FROM runs GROUP BY status, optimizer").fetchall()
        stacks = tuple(itertools.starmap(_stack, connection.execute(_RUNNING)))
        mean = connection.execute("SELECT avg(epochs) FROM runs").fetchone()[0]
    counts = {status: sum(n for one, _, n in found if one == status) for status in STATUSES}
    if sweeping is False:
        counts["pending"] += counts["running"]
        counts["running"] = 0
    finished = Counter({name: 0 for _, name, _ in found})
    total = Counter(finished)
    for status, name, n in found:
        total[name] += n
        finished[name] += n if status in FINISHED else 0
    return SweepStatus(
        grid=meta["grid"],
        sweeping=sweeping,
        counts=counts,
        optimizers={name: (finished[name], total[name]) for name in in_table_order(set(total))},
        session=last.get("id"),
        started=started,
        command=last.get("command", ""),
        trained=trained / mean if mean else 0.0,
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


def _check_progress(connection: sqlite3.Connection, session: int | None, folder: Path) -> None:
    """Raise DamageError where the progress of stacks in training, or of the last session, is missing or none."""
    numbers = ("size", "begun_epoch", "epoch", "checkpoint_epoch")
    wrong = " OR ".join(
        f"typeof({name}) NOT IN ('integer', 'null') OR abs({name}) >= {MOST}"
        for name in (*(f"stacks.{name}" for name in numbers), "runs.session")
    )
    if connection.execute(f"SELECT 1 FROM {_JOINED} WHERE {wrong} LIMIT 1").fetchone():
        raise damaged(folder / FILE, "the progress of a stack is no number of epochs")
    missing = " OR ".join(f"stacks.{name} IS NULL" for name in numbers[:3])
    if connection.execute(f"SELECT 1 FROM {_JOINED} WHERE status = 'running' AND ({missing}) LIMIT 1").fetchone():
        raise damaged(folder / FILE, "a run is in training, but in no stack that has begun")
    times = connection.execute(
        f"SELECT DISTINCT updated FROM {_JOINED} "
        "WHERE status = 'running' OR (runs.session = ? AND updated IS NOT NULL)",
        (session,),
    )
    if not all(read_time(time) for (time,) in times):
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


def _trained(connection: sqlite3.Connection, session: int, started: datetime) -> tuple[int, float]:
    """Return the epochs trained in a session, and the seconds from its start to its last progress."""
    # Without runs that were moved into new stacks, which have not begun.
    trained, updated = connection.execute(
        f"SELECT sum(max(0, CASE WHEN status IN ({ENDED}) THEN epochs ELSE min(stacks.epoch, epochs) END "
        f"- min(begun_epoch, epochs))), max(updated) FROM {_JOINED} WHERE runs.session = ? AND updated IS NOT NULL",
        (session,),
    ).fetchone()
    if updated is None:
        return 0, 0.0
    return trained, max(0.0, (datetime.fromisoformat(updated) - started).total_seconds())


def _left(connection: sqlite3.Connection, sweeping: bool | None) -> int:
    """Return the epochs still to be trained; a run that is not running starts from its checkpoint or from epoch 0."""
    reached = "checkpoint_epoch"
    if sweeping is not False:
        reached = f"CASE WHEN status = 'running' THEN stacks.epoch ELSE {reached} END"
    left = f"SELECT sum(max(0, epochs - coalesce({reached}, 0))) FROM {_JOINED} WHERE status NOT IN ({ENDED})"
    return connection.execute(left).fetchone()[0] or 0


def _stack(
    number: int, size: int, model: str, data: str, epoch: int, epochs: int, updated: str, checkpoint: int | None
) -> StackStatus:
    return StackStatus(
        id=number, size=size, model=model, data=data,
        epoch=max(epoch, checkpoint or 0),  # a checkpoint may be newer than the progress
        epochs=epochs, updated=datetime.fromisoformat(updated), checkpoint=checkpoint,
    )  # fmt: skip


def as_json(status: SweepStatus) -> str:
    """Return the progress as JSON: the attributes of `SweepStatus`, `total` and `finished`; times in ISO 8601."""
    fields = {**dataclasses.asdict(status), "total": status.total, "finished": status.finished}
    return json.dumps(fields, default=datetime.isoformat, indent=2)


def watch_status(folder: Path, console: Console, seconds: float = 2.0) -> None:
    """Show the progress anew every so many seconds, until no sweep runs."""
    # A console of its own: what is printed on that of the live display appears above it.
    page = Console(width=console.width, force_terminal=console.is_terminal)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = read_status(folder)
            with page.capture() as shown:
                print_status(status, page)
            live.update(Text.from_ansi(shown.get()), refresh=True)
            if not status.sweeping:
                return
            time.sleep(seconds)


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
    if status.counts["failed"]:
        say("Failed: code of your own raised an error; failures/RUN.txt in the results folder has the traceback")
    if status.session is not None:
        left = "time left still unknown" if status.left is None else f"about {rough_duration(status.left)} left"
        say(f"{rate(status.trained, status.seconds)} in session {status.session}" + ("" if finished else f"; {left}"))
    if status.engine:
        say(f"Engine {status.engine.get('engine', 'local')}")
        for line in Plan.from_dict(status.engine).describe():
            say(f"  {line}")
    table = _table("optimizer", _right("finished"), "")
    for name, (done, total) in status.optimizers.items():
        table.add_row(plain(_short(name)), f"{done}/{total}", ProgressBar(total=total, completed=done, width=40))
    console.print(table)
    if status.stacks:
        console.print(_stacks(status, now or datetime.now(UTC)))
    elif status.sweeping and not finished:
        say("No stack is training at the moment: a sweep measures speeds before it starts")
    if status.sweeping is False and status.command and not finished:
        console.print(plain(f"To continue: {status.command}"), soft_wrap=True)


def _short(name: str) -> str:
    """Cut a name from outside to what leaves room for the other columns."""
    return name if len(name) <= _WIDE else f"{name[: _WIDE - 1]}…"


def _stacks(status: SweepStatus, now: datetime) -> Table:
    table = _table(*map(_right, ("stack", "runs", "epoch", "checkpoint")), "training", _right("updated"))
    table.title = "Stopped in the middle" if status.sweeping is False else "In training"
    for stack in status.stacks:
        table.add_row(
            str(stack.id), str(stack.size), f"{stack.epoch} of {stack.epochs}",
            DASH if stack.checkpoint is None else str(stack.checkpoint),
            plain(f"{_short(stack.model)} on {_short(stack.data)}"),
            f"{rough_duration((now - stack.updated).total_seconds())} ago",
        )  # fmt: skip
    return table


def _table(*columns: str | Column) -> Table:
    return Table(*columns, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))


def _right(name: str) -> Column:
    return Column(name, justify="right")
