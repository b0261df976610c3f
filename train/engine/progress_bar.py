"""The progress of a sweep: a bar on the terminal, a line a minute in the log of a batch job."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ncollapse.train.config import RunConfig
from ncollapse.train.formatting import rate, rough_duration, visible
from ncollapse.train.results.writer import PlannedStack


class _Rate(ProgressColumn):
    """The rate of this session; epochs of unfinished runs count as fractions of a run."""

    def render(self, task: Task) -> Text:
        runs = (task.completed - task.fields["begun_at"]) / task.fields["epochs_per_run"]
        return Text(rate(runs, task.elapsed or 0.0))


class SweepProgress(Progress):
    """A bar that counts epochs, so that it moves while a stack trains, with the number of finished runs beside it.

    Args:
        runs: what is shown; others may be in the stacks and among those that have ended.
        finished: id -> status of the runs that had ended before.
    """

    def __init__(self, name: str, runs: Sequence[RunConfig], finished: Mapping[str, str], console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False), BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[runs]} runs{task.fields[lost]}"),
            _Rate(), TimeRemainingColumn(elapsed_when_finished=True), console=console,
        )  # fmt: skip
        self._shown = frozenset(run.id for run in runs)
        self._ended: dict[str, str] = {}
        self._counts: Counter[str] = Counter()  # status -> number of runs
        self._epochs = {run.id: run.epochs for run in runs if run.id in finished}
        total, before = sum(run.epochs for run in runs), sum(self._epochs.values())
        self._task = self.add_task(
            visible(name), total=total, completed=before, begun_at=before, epochs_per_run=total / len(runs),
            runs=len(runs), done=0, lost="",
        )  # fmt: skip
        self.end(finished)

    def advance_to(self, stack: PlannedStack, epoch: int, *, resumed: bool = False) -> None:
        """Show that a stack has trained `epoch` epochs; `resumed`: in an earlier session, outside the rate."""
        before = sum(self._epochs.get(run.id, 0) for run in stack.runs)
        for run in stack.runs:
            self._epochs[run.id] = run.epochs if run.id in self._ended else min(epoch, run.epochs)
        task = self.tasks[0]
        gained = sum(self._epochs[run.id] for run in stack.runs) - before
        begun_at = task.fields["begun_at"] + (gained if resumed else 0)
        self.update(self._task, completed=task.completed + gained, begun_at=begun_at)

    def end(self, statuses: Mapping[str, str]) -> None:
        """Show that runs have ended; `statuses`: id -> status."""
        new = {run: status for run, status in statuses.items() if run in self._shown}
        self._ended |= new
        self._counts.update(new.values())
        lost = "".join(f", {n} {name}" for name in ("diverged", "hopeless", "failed") if (n := self._counts[name]))
        self.update(self._task, done=len(self._ended), lost=lost)

    def line(self) -> str:
        """Return the progress as a line of text."""
        task = self.tasks[0]
        trained, seconds = task.completed - task.fields["begun_at"], task.elapsed or 0.0
        left = (
            ""
            if trained <= 0
            else f", about {rough_duration(((task.total or 0) - task.completed) * seconds / trained)} left"
        )
        speed = rate(trained / task.fields["epochs_per_run"], seconds)
        return f"{task.fields['done']}/{task.fields['runs']} runs{task.fields['lost']}, {speed}{left}"


class MinuteLog:
    """A line on standard error each minute where that is no terminal, as in the log of a batch job.

    Attributes:
        line: returns what is written after the time; another thread calls it.
    """

    def __init__(self, console: Console, seconds: float = 60.0) -> None:
        self.line: Callable[[], str] = lambda: "reading data, measuring speeds"
        self._seconds, self._over = seconds, threading.Event()
        wanted = not console.quiet and not sys.stderr.isatty()
        self._thread = threading.Thread(target=self._write, daemon=True) if wanted else None

    def __enter__(self) -> "MinuteLog":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _write(self) -> None:
        while not self._over.wait(self._seconds):
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {self.line()}", file=sys.stderr, flush=True)
