"""`sweep`: group a grid's runs into stacks, have an engine train the unfinished ones, and store each message."""

import dataclasses
import shlex
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import InterruptError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.provenance import describe_machine
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.tensorboard import Logs
from ncollapse.train.results.writer import PlannedStack, Store
from ncollapse.train.sweep.grouping import StackKey, make_stacks
from ncollapse.train.sweep.messages import Engine, Failed, Finished, Message, Progress, WorkerSettings
from ncollapse.train.sweep.options import Options
from ncollapse.train.sweep.progress_bar import SweepProgress
from ncollapse.train.sweep.stack_size import Plan, StackPolicy
from ncollapse.train.sweep.this_machine import ThisMachine
from ncollapse.train.sweep.throughput import DataFacts


def sweep(
    grid: Grid, out: Path, load_data: Callable[[str, torch.device], Dataset], device: torch.device,
    options: Options, console: Console,
) -> int:  # fmt: skip
    """Train every run of the grid that is not finished in `out`, and return their number.

    Args:
        load_data: loads a data set by its name onto a device. Several workers of the local engine need one that can be
            pickled; with any other, `workers="auto"` trains in this process.
        device: "cpu" for all cores, "cuda" for all GPUs, or one GPU.

    Raises:
        UserError: see `Store`; data that cannot be loaded; runs that do not fit in memory even alone; interrupted.
            Finished runs are kept.
    """
    with Store(out, grid) as store:
        finished = store.finished()
        left = [run for run in grid.runs if run.id not in finished]
        if not left:
            return 0
        logs = Logs(out) if options.tensorboard else None
        loaded: dict[str, Dataset] = {}
        facts: dict[str, DataFacts] = {}
        for name in dict.fromkeys(run.data for run in left):
            loaded[name] = load_data(name, torch.device("cpu"))
            facts[name] = DataFacts.of(loaded[name])
            store.check_data(name, facts[name].fingerprint)
        settings = WorkerSettings(load_data, 60 * options.checkpoint_minutes, options.save_weights)
        engine, workers = _make_engine(options, device, settings, loaded, console)
        try:
            _prepare(store, StackPolicy(left, facts, options.stack, workers), options, engine, console)
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            session = store.begin_session(command, describe_machine(engine.device))
            _Sweep(store, session, facts, console, logs).train(engine)
        except KeyboardInterrupt:
            raise InterruptError(
                f"stopped: {len(store.finished())} of {len(grid.runs)} runs are finished and kept in {out}; "
                "the same command continues from there"
            ) from None
        finally:
            engine.close()
        return len(left)


def _make_engine(
    options: Options, device: torch.device, settings: WorkerSettings, loaded: dict[str, Dataset], console: Console
) -> tuple[Engine, int | str]:
    """Return the engine and its number of workers, or "auto"."""
    if options.engine == "ray":
        from ncollapse.train.sweep.ray_cluster import Cluster

        return Cluster(options.ray_address, device, settings, loaded), options.workers
    engine = ThisMachine(device, settings, loaded)
    if options.workers == "auto" and engine.unpicklable:
        _say(
            console,
            f"load_data cannot be sent to other processes ({engine.unpicklable}), so this process trains all stacks; "
            "give a function that is defined in a module to use several",
        )
        return engine, 1
    return engine, options.workers


def _prepare(store: Store, policy: StackPolicy, options: Options, engine: Engine, console: Console) -> None:
    """Have the engine use a plan, stored or new, and store a new one with its stacks.

    The last digits of a run depend on the other runs of its stack and on the number of threads. So the plan of an
    earlier session stays, unless the user asks for another size of stacks.
    """
    before = store.engine()
    if before and options.stack in ("auto", before["stack"]) and options.engine == before["engine"]:
        known = Plan.from_dict(before)
        workers = policy.workers if isinstance(policy.workers, int) else known.workers
        engine.use(workers, known.threads, known.per_gpu)
        return
    plan = policy.choose(engine)
    begun = store.begun()
    fixed = {run.id for stack in store.stacks() if stack.id in begun for run in stack.runs}
    stacks = make_stacks([run for run in policy.runs if run.id not in fixed], plan.sizes.__getitem__, plan.workers)
    store.set_plan(stacks, {"engine": options.engine, "stack": options.stack, **plan.as_dict()})
    for line in plan.describe():
        console.print(line, highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(f"ncollapse: {text}", style="yellow", highlight=False, markup=False)


class _Sweep:
    """The queue of stacks to train; handles the messages that an engine sends about them."""

    def __init__(
        self, store: Store, session: int, facts: dict[str, DataFacts], console: Console, logs: Logs | None
    ) -> None:
        self._store, self._session, self._facts, self._console = store, session, facts, console
        self._queue = deque(store.stacks())
        self._lost: set[int] = set()  # stacks whose process or node was lost once
        self._too_large: list[tuple[RunConfig, str]] = []
        self._bar = SweepProgress(store.grid, store.finished(), console)
        self._logs = logs

    def train(self, engine: Engine) -> None:
        """Have an engine train all of them; at the end, raise for runs that do not fit in memory even alone."""
        with self._bar:
            for stack, message in engine.run(self._next):
                self._handle(stack, message)
        if self._too_large:
            names = "; ".join(run.describe() for run, _ in self._too_large[:3])
            raise UserError(
                f"{len(self._too_large)} runs could not be trained, since there is no memory for even one of them: "
                f"{names} ({self._too_large[0][1]}). Give a smaller --batch-size or --width, --precision bf16, a "
                "smaller --limit (the features of all training samples are kept for NC4), or another --device; all "
                "other runs are finished and kept"
            )

    def _next(self) -> PlannedStack | None:
        """The next stack to train; the store has begun it."""
        if not self._queue:
            return None
        stack = self._queue.popleft()
        if stack.checkpoint is not None and not stack.checkpoint.is_file():
            stack = dataclasses.replace(stack, checkpoint=None)
        key = StackKey.of(stack.runs[0])
        samples = self._facts[key.data].samples_of(key)
        epoch = self._store.begin(stack, self._session, samples, resume=stack.checkpoint is not None)
        self._bar.advance_to(stack, epoch, resumed=True)
        return stack

    def _handle(self, stack: PlannedStack, message: Message) -> None:
        if isinstance(message, Evaluation):
            if self._logs is not None:
                self._logs.evaluated(stack.runs, message, self._store.finished())
            self._bar.end(self._store.record(stack, message))
        elif isinstance(message, Progress):
            self._store.progress(stack, message.epoch)
            self._bar.advance_to(stack, message.epoch)
            if message.checkpoint is not None:
                self._store.save_checkpoint(stack, message.epoch, message.checkpoint)
        elif isinstance(message, Finished) or not self._left(stack):  # it may also fail when it has nothing left to do
            self._store.end(stack)
        elif message.kind == "checkpoint":
            _say(self._console, f"{message.text}; stack {stack.id} starts from its beginning")
            self._store.end(stack)
            self._retry(stack)
        elif message.kind == "refused":
            raise UserError(message.text)
        elif message.kind == "lost" and stack.id not in self._lost:
            self._lost.add(stack.id)
            _say(self._console, f"stack {stack.id} was lost: {message.text}; it starts again from its last checkpoint")
            self._retry(stack)
        else:  # lost twice: the system may have killed its process for the memory it took
            self._halve(stack, message)

    def _left(self, stack: PlannedStack) -> list[RunConfig]:
        """The runs of a stack that have not ended."""
        finished = self._store.finished()
        return [run for run in stack.runs if run.id not in finished]

    def _retry(self, stack: PlannedStack) -> None:
        """Queue a stack as the store has it now, with its last checkpoint, before the others."""
        self._queue.appendleft(next(one for one in self._store.stacks() if one.id == stack.id))

    def _halve(self, stack: PlannedStack, failure: Failed) -> None:
        """Cut a stack, and the larger ones of its key in the queue, into stacks of at most half its size."""
        size, half = len(stack.runs), len(self._left(stack)) // 2
        self._store.end(stack)
        if half == 0:
            self._too_large += [(run, failure.text) for run in self._left(stack)]
            return
        _say(self._console, f"{size} runs at once do not fit ({failure.text}); continuing with stacks of {half}")
        key = StackKey.of(stack.runs[0])
        untried = [one for one in self._queue if one.checkpoint is None and StackKey.of(one.runs[0]) == key]
        alike = [stack, *(one for one in untried if len(one.runs) > half)]
        parts = [left[i : i + half] for left in map(self._left, alike) for i in range(0, len(left), half)]
        numbers = self._store.set_plan(parts)
        rest = [one for one in self._queue if one not in alike]
        self._queue = deque([PlannedStack(n, tuple(runs)) for n, runs in zip(numbers, parts, strict=True)] + rest)
