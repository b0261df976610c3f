"""The progress bar of a sweep."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from ncollapse.train.formatting import rate, visible
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
            TextColumn("{task.description}", style="bold", markup=False), BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[runs]} runs{task.fields[diverged]}"),
            _Rate(), TimeRemainingColumn(elapsed_when_finished=True), console=console,
        )  # fmt: skip
        self._ended = dict(finished)
        self._epochs = {run.id: run.epochs for run in grid.runs if run.id in finished}
        total, before = sum(run.epochs for run in grid.runs), sum(self._epochs.values())
        self._task = self.add_task(
            visible(grid.name), total=total, completed=before, begun_at=before, epochs_per_run=total / len(grid.runs),
            runs=len(grid.runs), done=0, diverged="",
        )  # fmt: skip
        self.end({})

    def advance_to(self, stack: PlannedStack, epoch: int, *, resumed: bool = False) -> None:
        """Show that a stack has trained `epoch` epochs; `resumed`: in an earlier session, outside the rate."""
        for run in stack.runs:
            self._epochs[run.id] = run.epochs if run.id in self._ended else min(epoch, run.epochs)
        task, completed = self.tasks[0], sum(self._epochs.values())
        begun_at = task.fields["begun_at"] + (completed - task.completed if resumed else 0)
        self.update(self._task, completed=completed, begun_at=begun_at)

    def end(self, statuses: dict[str, str]) -> None:
        """Show that runs have ended; `statuses`: id -> status."""
        self._ended |= statuses
        diverged = list(self._ended.values()).count("diverged")
        self.update(self._task, done=len(self._ended), diverged=f", {diverged} diverged" if diverged else "")
