"""The progress bar of a sweep."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ncollapse.train.config import RunConfig
from ncollapse.train.formatting import rate
from ncollapse.train.grid import Grid
from ncollapse.train.results.writer import PlannedStack


class _Rate(ProgressColumn):
    """The rate of this session; epochs of unfinished runs count as fractions of a run."""

    def render(self, task: Task) -> Text:
        runs = (task.completed - task.fields["begun_at"]) / task.fields["epochs_per_run"]
        return Text(rate(runs, task.elapsed or 0.0))


class SweepProgress(Progress):
    """A bar that counts epochs, so that it moves while a stack trains, with the number of finished runs beside it.

    Args:
        finished: id -> status of the runs that had ended before.
    """

    def __init__(self, grid: Grid, finished: dict[str, str], console: Console) -> None:
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[runs]} runs{task.fields[diverged]}"),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._ended = dict(finished)
        self._epochs: dict[str, int] = {run.id: run.epochs for run in grid.runs if run.id in finished}
        total = sum(run.epochs for run in grid.runs)
        before = sum(self._epochs.values())
        self._task = self.add_task(
            grid.name,
            total=total,
            completed=before,
            begun_at=before,
            epochs_per_run=total / len(grid.runs),
            done=len(finished),
            runs=len(grid.runs),
            diverged="",
        )
        self._show()

    def advance_to(self, stack: PlannedStack, epoch: int) -> None:
        """Show that a stack has trained `epoch` epochs."""
        self._count(stack.runs, epoch)
        self.update(self._task, completed=sum(self._epochs.values()))

    def resume(self, stack: PlannedStack, epoch: int) -> None:
        """Show that a stack starts after `epoch` epochs of an earlier session."""
        before = sum(self._epochs.values())
        self._count(stack.runs, epoch)
        after = sum(self._epochs.values())
        fields = self.tasks[0].fields
        self.update(self._task, completed=after, begun_at=fields["begun_at"] + after - before)

    def _count(self, runs: Sequence[RunConfig], epoch: int) -> None:
        for run in runs:
            self._epochs[run.id] = run.epochs if run.id in self._ended else min(epoch, run.epochs)

    def end(self, statuses: dict[str, str]) -> None:
        """Show that runs have ended; `statuses`: id -> status."""
        self._ended |= statuses
        self._show()

    def _show(self) -> None:
        diverged = list(self._ended.values()).count("diverged")
        self.update(self._task, done=len(self._ended), diverged=f", {diverged} diverged" if diverged else "")
