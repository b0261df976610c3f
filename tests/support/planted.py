"""Results folders of runs that never trained: every metric is a function of the run and the epoch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ncollapse.train.config import RunConfig
from ncollapse.train.grid import Grid
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.record import Ended, Evaluation
from ncollapse.train.results.writer import Store

#: Run, name of a metric, epoch -> value.
Value = Callable[[RunConfig, str, int], float]


def usual(run: RunConfig, name: str, epoch: int) -> float:
    """Metrics that fall over the epochs, and differ between runs; all training data are classified correctly."""
    if name == "train_accuracy":
        return 1.0
    return 0.0 if name == "degenerate" else (1 + 10 * run.weight_decay + run.lr) / (1 + epoch)


def plant(
    folder: Path, runs: Sequence[RunConfig], metrics: Mapping[str, str] | None = None, *, value: Value = usual,
    failed: Collection[RunConfig] = (),
) -> None:  # fmt: skip
    """Write a sweep of runs, which have the same epochs and a stack each; those in `failed` fail after epoch 0."""
    metrics = metrics or {}
    with Store(folder, Grid("planted", tuple(runs)), metrics=metrics) as store:
        left = [run for run in runs if run.id not in store.finished()]
        store.set_plan([[run] for run in left])
        session = store.begin_session("ncollapse sweep planted", {"device": "cpu"})
        for stack in store.stacks():
            store.begin(stack, session, 1000, resume=False)
            (run,) = stack.runs
            for epoch in (0, *([] if run in failed else [run.epochs])):
                values = {name: [value(run, name, epoch)] for name in (*METRICS, *metrics)}
                ended = {0: Ended("done", None, 1.0)} if epoch == run.epochs else {}
                store.record(stack, Evaluation(epoch, (0,), values, {}, ended, {}))
            if run in failed:
                store.fail(stack, run.id, "mine.py, line 3: ValueError: no", "Traceback: …")
