"""`sweep`: groups a grid's runs into stacks, has an engine train what is not finished, and stores it as it comes in."""

import contextlib
import shlex
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
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
from ncollapse.train.sweep import this_machine as local
from ncollapse.train.sweep.grouping import Shape, plan
from ncollapse.train.sweep.messages import Engine, Failed, Finished, How, Job, Message, Progress, Saved
from ncollapse.train.sweep.options import Options
from ncollapse.train.sweep.progress_bar import SweepProgress
from ncollapse.train.sweep.stack_size import Choice, Work
from ncollapse.train.sweep.throughput import Facts

#: How often a stack is tried whose process or node is lost each time; then it is halved, since a process that takes too
#: much memory may be killed without a word.
_TRIES = 2


def sweep(
    grid: Grid,
    out: Path,
    load_data: Callable[[str, torch.device], Dataset],
    device: torch.device,
    options: Options,
    console: Console,
) -> int:
    """Train every run of the grid that is not finished in `out`.

    Args:
        load_data: a data set by its name, on a device.
        device: "cpu" for all cores, "cuda" for all GPUs, or one GPU.

    Returns:
        The number of runs trained.

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
        how = How(load_data, 60 * options.checkpoint_minutes, options.save_weights)
        facts: dict[str, Facts] = {}
        for name in dict.fromkeys(run.data for run in left):
            how.loaded[name] = load_data(name, torch.device("cpu"))
            facts[name] = Facts.of(how.loaded[name])
            store.check_data(name, facts[name].fingerprint)
        engine = _prepare(store, Work(left, facts, options.stack), options, device, how, console)
        try:
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            session = store.begin_session(command, describe_machine(engine.device))
            _Sweep(store, session, facts, console, logs).train(engine)
        except KeyboardInterrupt:
            raise InterruptError(
                f"stopped: {len(store.finished())} of {len(grid.runs)} runs are finished and kept in {out}; "
                "the same command goes on from there"
            ) from None
        finally:
            engine.close()
        return len(left)


def _prepare(store: Store, work: Work, options: Options, device: torch.device, how: How, console: Console) -> Engine:
    """The engine; the plan of who trains with whom is in the store then.

    A run's last digits depend on its company and on the threads, so that the plan of an earlier session stays, unless
    another size of stacks is asked for.
    """
    before = store.engine()
    if before and options.stack in ("auto", before["stack"]) and options.engine == before["engine"]:
        known = Choice.from_dict(before)
        if options.engine == "ray":
            from ncollapse.train.sweep.ray_cluster import Cluster

            return Cluster(options.ray_address, known.threads, device, how, known.per_gpu)
        workers = known.workers if options.workers == "auto" else options.workers
        return local.start(workers, known.threads, device, how)
    if options.engine == "ray":
        from ncollapse.train.sweep.ray_cluster import choose_cluster

        choice, engine = choose_cluster(work, options.ray_address, device, how)
    else:
        choice, engine = local.choose(work, options.workers, device, how)
    try:
        begun = store.begun()
        fixed = {run.id for stack in store.stacks() if stack.id in begun for run in stack.runs}
        stacks = plan([run for run in work.runs if run.id not in fixed], choice.sizes.__getitem__, choice.workers)
        store.set_plan(stacks, {"engine": options.engine, "stack": options.stack, **choice.as_dict()})
        for line in choice.describe():
            console.print(line, highlight=False)
    except BaseException:
        engine.close()
        raise
    return engine


class _Sweep:
    """The stacks that are left, and what becomes of what an engine tells of them."""

    def __init__(
        self, store: Store, session: int, facts: dict[str, Facts], console: Console, logs: Logs | None
    ) -> None:
        self._store, self._session, self._facts, self._console = store, session, facts, console
        self._queue = deque(store.stacks())
        self._stacks: dict[int, PlannedStack] = {}  # those in flight
        self._lost: Counter[int] = Counter()
        self._too_large: list[tuple[RunConfig, str]] = []
        self._bar = SweepProgress(store.grid, store.finished(), console)
        self._logs = logs

    def train(self, engine: Engine) -> None:
        """Have an engine train all of them.

        Raises:
            UserError: at the end, of runs that do not fit in memory even alone; at once, of what the user has to mend.
        """
        with self._bar:
            for job, message in engine.run(self._take):
                self._handle(self._stacks[job.stack], message)
        if self._too_large:
            names = "; ".join(run.describe() for run, _ in self._too_large[:3])
            raise UserError(
                f"{len(self._too_large)} runs could not be trained, since there is no memory for even one of them: "
                f"{names} ({self._too_large[0][1]}). Give a smaller --batch-size or --width, --precision bf16, a "
                "smaller --limit (the features of all training samples are kept for NC4), or another --device; all "
                "other runs are finished and kept"
            )

    def _take(self) -> Job | None:
        if not self._queue:
            return None
        stack = self._queue.popleft()
        content = None
        if stack.checkpoint is not None:
            with contextlib.suppress(FileNotFoundError):
                content = stack.checkpoint.read_bytes()
        return self._begin(stack, content)

    def _begin(self, stack: PlannedStack, content: bytes | None) -> Job:
        shape = Shape.of(stack.runs[0])
        samples = self._facts[shape.data].samples_of(shape)
        epoch = self._store.begin(stack, self._session, samples, resume=content is not None)
        self._stacks[stack.id] = stack
        self._bar.resume(stack, epoch)
        return Job(stack.id, stack.runs, content)

    def _handle(self, stack: PlannedStack, message: Message) -> None:
        if isinstance(message, Evaluation):
            if self._logs is not None:
                self._logs.evaluated(stack.runs, message, self._store.finished())
            ended = self._store.record(stack, message)
            self._bar.end(ended)
        elif isinstance(message, Progress):
            self._store.progress(stack, message.epoch)
            self._bar.at(stack, message.epoch)
        elif isinstance(message, Saved):
            self._store.save_checkpoint(stack, message.epoch, message.content)
        elif isinstance(message, Finished) or not self._left(stack):  # it may also fail when it has nothing left to do
            self._store.end(stack)
        elif message.kind == "checkpoint":
            self._say(f"{message.text}; stack {stack.id} starts from its beginning")
            self._store.end(stack)
            self._queue.appendleft(self._again(stack))
        elif message.kind == "refused":
            raise UserError(message.text)
        elif message.kind == "lost" and self._lost[stack.id] + 1 < _TRIES:
            self._lost[stack.id] += 1
            self._say(f"stack {stack.id} was lost: {message.text}; it starts again from its last checkpoint")
            self._queue.appendleft(self._again(stack))
        else:
            self._halve(stack, message)

    def _left(self, stack: PlannedStack) -> list[RunConfig]:
        """The runs of a stack that have not ended."""
        finished = self._store.finished()
        return [run for run in stack.runs if run.id not in finished]

    def _again(self, stack: PlannedStack) -> PlannedStack:
        """A stack as the store has it now: with its last checkpoint."""
        return next(one for one in self._store.stacks() if one.id == stack.id)

    def _halve(self, stack: PlannedStack, failure: Failed) -> None:
        """Go on with stacks of at most half the size, also of those of its shape that are still to come."""
        half = len(self._left(stack)) // 2
        self._store.end(stack)
        if half == 0:
            self._too_large += [(run, failure.text) for run in self._left(stack)]
            return
        self._say(f"{len(stack.runs)} runs at once do not fit ({failure.text}); going on with stacks of {half}")
        alike = [stack] + [
            one
            for one in self._queue
            if Shape.of(one.runs[0]) == Shape.of(stack.runs[0]) and len(one.runs) > half and one.checkpoint is None
        ]
        parts = [part for one in alike for part in _cut(self._left(one), half)]
        numbers = self._store.set_plan(parts)
        rest = [one for one in self._queue if one not in alike]
        self._queue = deque([PlannedStack(n, tuple(runs)) for n, runs in zip(numbers, parts, strict=True)] + rest)

    def _say(self, text: str) -> None:
        self._console.print(f"ncollapse: {text}", style="yellow", highlight=False, markup=False)


def _cut(runs: Sequence[RunConfig], size: int) -> list[Sequence[RunConfig]]:
    return [runs[i : i + size] for i in range(0, len(runs), size)]
