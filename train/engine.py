"""The sweep engine: groups a grid's runs into stacks, trains what is not finished, and stores it as it goes."""

import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from nc.train.config import FIELDS, RunConfig
from nc.train.data import Dataset
from nc.train.errors import InterruptError, UserError
from nc.train.grid import Grid
from nc.train.loop import Evaluation, train
from nc.train.provenance import describe_machine
from nc.train.stack import Stack
from nc.train.store import Store

#: The settings in which the runs of one stack may differ; besides, the optimizer within its family.
_PER_RUN = ("optimizer", "lr", "momentum", "weight_decay", "coupling", "beta2", "eps")

#: Runs per stack. On a CPU stacking pays for linear layers (the more runs the faster, but an interrupted sweep loses
#: the stack it was at) and not for convolutions.
_STACK = {"mlp": 24}


def plan(runs: Sequence[RunConfig], stack: int | None = None) -> list[list[RunConfig]]:
    """Runs grouped into stacks of at most `stack` (default: by model), families, models and data sets alternating.

    The plan depends on the grid alone, not on what is finished: a run is trained in the same company, and so with the
    same rounding, however often the sweep was interrupted.
    """

    def key(run: RunConfig) -> tuple[object, ...]:
        return run.family, *(getattr(run, f.name) for f in FIELDS if f.name not in _PER_RUN)

    groups: dict[tuple[object, ...], list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    queues = []
    for group in groups.values():
        count = -(-len(group) // (stack or _STACK.get(group[0].model, 1)))
        # Even sizes: 13 runs in stacks of at most 12 are 7 and 6.
        bounds = [len(group) * i // count for i in range(count + 1)]
        queues.append([group[a:b] for a, b in itertools.pairwise(bounds)])
    rounds = itertools.zip_longest(*queues)
    return [members for members in itertools.chain.from_iterable(rounds) if members]


def sweep(
    grid: Grid,
    out: Path,
    load_data: Callable[[str], Dataset],
    device: torch.device,
    *,
    stack: int | None = None,
    save_weights: bool = False,
    console: Console,
) -> int:
    """Train every run of the grid that is not finished in `out`.

    Args:
        load_data: a data set by its name.
        stack: runs per stack; default by model.
        save_weights: also write `weights/RUN.pt`, each run's final state_dict.

    Returns:
        The number of runs trained.

    Raises:
        UserError: see `Store`; data that cannot be loaded; out of memory; interrupted. Finished runs are kept.
    """
    with Store(out, grid) as store:
        finished = store.finished()
        left = [[run for run in members if run.id not in finished] for members in plan(grid.runs, stack)]
        todo = [members for members in left if members]
        if not todo:
            return 0
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        session = store.begin_session(datetime.now(UTC).isoformat(), command, describe_machine(str(device)))
        loaded: dict[str, Dataset] = {}  # all of them kept: stacks of different data sets alternate
        with _RunProgress(grid, len(finished), todo, console) as progress:
            try:
                for members in todo:
                    name = members[0].data
                    if name not in loaded:
                        loaded[name] = load_data(name)
                        store.check_data(name, loaded[name].fingerprint)
                    _train_stack(store, session, members, loaded[name], device, save_weights, progress)
            except KeyboardInterrupt:
                done = len(store.finished())
                raise InterruptError(
                    f"stopped: {done} of {len(grid.runs)} runs are finished and kept in {out}; "
                    "the same command goes on from there"
                ) from None
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of memory with {len(members)} runs at once; give a smaller --stack: {error}"
                ) from None
        return sum(len(members) for members in todo)


def _train_stack(
    store: Store,
    session: int,
    runs: list[RunConfig],
    data: Dataset,
    device: torch.device,
    save_weights: bool,
    progress: "_RunProgress",
) -> None:
    started = time.perf_counter()
    store.begin(runs, session, len(data.limited(runs[0].limit).train_y))
    diverged: list[int | None] = [None] * len(runs)
    last: Evaluation | None = None
    epochs = 0
    for event in train(runs, data, device):
        if isinstance(event, int):
            epochs = event
            progress.advance_epochs(len(runs))
            continue
        last = event
        store.record(runs, event.epoch, event.values)
        for i, loss in enumerate(event.values["train_loss"]):
            if diverged[i] is None and not abs(loss) < float("inf"):
                diverged[i] = event.epoch
        if None not in diverged:
            break
    assert last is not None
    if save_weights:
        _save_weights(store.folder / "weights", runs, last.stack)
    statuses = [
        ("diverged", epoch) if epoch is not None else ("degenerate" if gone else "done", None)
        for epoch, gone in zip(diverged, last.values["degenerate"], strict=True)
    ]
    store.finish(runs, statuses, (time.perf_counter() - started) / len(runs))
    progress.advance_epochs(len(runs) * (runs[0].epochs - epochs))  # nothing, unless all have diverged
    progress.finish_runs(len(runs))


def _save_weights(folder: Path, runs: Sequence[RunConfig], stack: Stack) -> None:
    try:
        folder.mkdir(exist_ok=True)
        for i, run in enumerate(runs):
            partial = folder / f"{run.id}.partial"
            torch.save({"config": run.as_dict(), "state_dict": stack.state_dict(i)}, partial)
            os.replace(partial, folder / f"{run.id}.pt")
    except (OSError, RuntimeError) as error:  # torch's file writer reports a full disk as RuntimeError
        raise UserError(f"cannot write weights to {folder.resolve()}: {error}; finished runs are kept") from None


class _Rate(ProgressColumn):
    """Runs per minute, or per hour where they are few, of this session; the epochs done in unfinished runs count."""

    def render(self, task: Task) -> Text:
        runs = (task.completed - task.fields["begun_at"]) / task.fields["epochs_per_run"]
        if not task.elapsed or not runs:
            return Text("… runs/min")
        per_minute = 60 * runs / task.elapsed
        return Text(f"{per_minute:.0f} runs/min" if per_minute >= 2 else f"{60 * per_minute:.3g} runs/h")


class _RunProgress(Progress):
    """A bar over epochs of runs, so that it moves inside a stack, labelled with runs."""

    def __init__(self, grid: Grid, finished: int, todo: Sequence[Sequence[RunConfig]], console: Console) -> None:
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[runs]} runs"),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        total = sum(run.epochs for run in grid.runs)
        left = sum(run.epochs for members in todo for run in members)
        self._task = self.add_task(
            grid.name,
            total=total,
            completed=total - left,
            begun_at=total - left,
            epochs_per_run=total / len(grid.runs),
            done=finished,
            runs=len(grid.runs),
        )

    def advance_epochs(self, epochs: int) -> None:
        """Count epochs, summed over runs."""
        self.advance(self._task, epochs)

    def finish_runs(self, runs: int) -> None:
        """Count runs that have ended."""
        self.update(self._task, done=self.tasks[0].fields["done"] + runs)
