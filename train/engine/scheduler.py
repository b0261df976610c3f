"""`sweep`: have an engine train the runs of a grid that are unfinished, and store each of its messages."""

import contextlib
import dataclasses
import shlex
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from ncollapse.train.config import RunConfig, unpadded
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.messages import Engine, Failed, Finished, Message, Progress, Stopped
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.planning import (
    Prepared,
    make_engine,
    metric_meanings,
    plan_stacks,
    prepare,
    say,
    unfinished,
)
from ncollapse.train.engine.progress_bar import MinuteLog, SweepProgress
from ncollapse.train.engine.stopping import StopRequest
from ncollapse.train.engine.throughput import DataFacts
from ncollapse.train.errors import CheckpointError, DataError, InterruptError, StoppedError, UserError, out_of_memory
from ncollapse.train.grid import Grid
from ncollapse.train.plugins import metric_names
from ncollapse.train.results.checkpoint_file import read_checkpoint
from ncollapse.train.results.own_code import record_code, record_metrics
from ncollapse.train.results.provenance import describe_machine
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.tensorboard import Logs
from ncollapse.train.results.writer import PlannedStack, Store
from ncollapse.train.training.checkpoints import split_checkpoint

#: The file in a results folder that takes the tracebacks of errors that nobody foresaw.
ERRORS = "errors.log"
#: Losses of a stack's process without a new checkpoint after which the stack is halved, and a single run is given up.
_HALVED_AFTER, _GIVEN_UP_AFTER = 2, 3
#: Runs in a row whose code failed that end a sweep: the next one would fail too.
_FAILED = 20
#: Unforeseen errors in a row that end a sweep: the next stack would fail too.
_UNFORESEEN = 3


def sweep(
    grid: Grid, out: Path, load_data: Callable[[str, torch.device], Dataset], device: torch.device,
    options: Options, console: Console, called: str = "",
) -> int:  # fmt: skip
    """Train every run of the grid that is not finished in `out`, and return their number.

    The folder may hold other runs; they stay as they are, except that a stack which has begun is trained as a whole.

    Args:
        load_data: loads a data set by its name onto a device. Several workers of the local engine need one that can be
            pickled; with any other, `workers="auto"` trains in this process.
        device: "cpu" for all cores, "cuda" for all GPUs, or one GPU.
        called: how it was called, for the record; by default the command line of this process.

    Raises:
        StoppedError: SIGTERM, SIGUSR1 or `options.minutes`; stacks in training have checkpoints.
        InterruptError: Ctrl-C.
        UserError: see `Store`; data that cannot be loaded, or that have changed; at the end, runs that could not be
            trained: they do not fit in memory even alone, their process is lost again and again, the user has to change
            something, or an unforeseen error. Finished runs and checkpoints are kept.
    """
    request = StopRequest()
    with request.listening(options.minutes), contextlib.ExitStack() as undo:
        prepared = None
        # Before anything is written: what a mistake in code has left there would be in the way of the mended code.
        if (grid.versions or grid.metrics) and (left := unfinished(grid, out)):
            try:
                prepared = prepare(left, load_data, options, grid, console)
            except KeyboardInterrupt:
                raise (StoppedError if request.reason else InterruptError)("stopped before anything trained") from None
        store = undo.enter_context(Store(out, grid, lambda text: say(console, text), metric_meanings(grid)))
        try:
            return _sweep(store, prepared, load_data, device, options, console, request, called)
        except KeyboardInterrupt:
            kind = StoppedError if request.reason else InterruptError
            raise kind(_stopped(store, request)) from None


def _sweep(
    store: Store, prepared: Prepared | None, load_data: Callable[[str, torch.device], Dataset], device: torch.device,
    options: Options, console: Console, request: StopRequest, called: str,
) -> int:  # fmt: skip
    grid, finished = store.grid, store.finished()
    record_code(store, grid.versions, options.accept_changes)
    record_metrics(store, metric_names(grid.metrics))
    left = [run for run in grid.runs if run.id not in finished]
    others = store.before + store.added - len(grid.runs)
    if others or (store.before and store.added):
        say(
            console,
            f"{store.folder} held {store.before} runs, {store.added} are added; {others} of them are not of this grid "
            "and stay as they are",
        )
    if not left:
        return 0
    with MinuteLog(console) as log:
        logs = Logs(store.folder) if options.tensorboard else None
        ready = prepared or prepare(left, load_data, options, grid, console)
        facts = ready.facts
        for name, of in facts.items():
            store.check_data(unpadded(name), of.fingerprint)
        engine, workers = make_engine(options, device, ready.settings, ready.loaded, console)
        try:
            plan_stacks(store, left, facts, options, engine, workers, console, grid.plugins)
            command = called or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            session = store.begin_session(command, describe_machine(engine.device))
            _Sweep(store, session, facts, console, logs, request, log).train(engine)
        finally:
            engine.close()
    return len(left)


def _stopped(store: Store, request: StopRequest) -> str:
    """Say what is kept by a sweep that was stopped."""
    finished = store.finished()
    done = sum(run.id in finished for run in store.grid.runs)
    by = f" by {request.reason}" if request.reason else ""
    return (
        f"stopped{by}: {done} of {len(store.grid.runs)} runs are finished and kept in {store.folder}; "
        "the same command continues from there"
    )


class _Sweep:
    """The queue of stacks to train; handles the messages that an engine sends about them."""

    def __init__(
        self, store: Store, session: int, facts: dict[str, DataFacts], console: Console, logs: Logs | None,
        request: StopRequest, log: MinuteLog,
    ) -> None:  # fmt: skip
        self._store, self._session, self._facts, self._console = store, session, facts, console
        self._queue = deque(store.stacks())
        self._losses: Counter[int] = Counter()  # stack -> losses of its process or node since its last checkpoint
        self._given_up: list[tuple[Failed, list[RunConfig]]] = []
        self._unforeseen = 0  # errors in a row
        self._failed = 0  # runs in a row
        self._no_data = ""  # why a worker could not read a data set
        # A stack that has begun may hold runs that are not of the grid.
        runs = dict.fromkeys([*store.grid.runs, *(run for stack in self._queue for run in stack.runs)])
        self._bar = SweepProgress(store.grid.name, list(runs), store.finished(), console)
        self._request, log.line = request, self._bar.line
        self._logs = logs

    def train(self, engine: Engine) -> None:
        """Have an engine train all of them; at the end, raise for runs that could not be trained."""
        with self._bar, self._request.training(engine.stop):
            for stack, message in engine.run(self._next):
                self._handle(stack, message)
        if self._request.reason and self._store.stacks():
            raise StoppedError(_stopped(self._store, self._request))
        if self._queue and self._no_data:
            left = sum(len(self._left(stack)) for stack in self._queue)
            raise DataError(f"{self._no_data}. {left} runs are left, all others are kept; the same command continues")
        if self._given_up:
            texts = [self._explain(kind) for kind in dict.fromkeys(failure.kind for failure, _ in self._given_up)]
            raise UserError("; ".join([*texts, "all other runs are finished and kept"]))

    def _explain(self, kind: str) -> str:
        """Say which runs could not be trained for a reason of this kind, and what to do."""
        failed = [(failure, runs) for failure, runs in self._given_up if failure.kind == kind]
        runs = [run for _, members in failed for run in members]
        names, text = "; ".join(run.describe() for run in runs[:3]), failed[0][0].text
        what = {
            "memory": (
                f"since there is no memory for even one of them: {names} ({text}). Give a smaller --batch-size or "
                "--width, --precision bf16, a smaller --limit (the features of all training samples are kept for NC4), "
                "or another --device"
            ),
            "lost": (
                f"since their process was lost {_GIVEN_UP_AFTER} times without a new checkpoint: {names} ({text}). "
                "Give them more memory or a smaller --checkpoint-minutes; the same command goes on from their last ones"
            ),
            "unforeseen": (
                f"for an error that ncollapse did not foresee: {names} ({text}). Its traceback is in "
                f"{self._store.folder / ERRORS}; please report it"
            ),
        }.get(kind, f"{names}: {text}")
        return f"{len(runs)} runs could not be trained, {what}"

    def _next(self) -> PlannedStack | None:
        """The next stack to train; the store has begun it."""
        if not self._queue or self._request.reason:
            return None
        stack = self._queue.popleft()
        if stack.checkpoint is not None and not stack.checkpoint.is_file():
            say(self._console, f"{stack.checkpoint} is not there; stack {stack.id} starts from its beginning")
            stack = dataclasses.replace(stack, checkpoint=None, epoch=None)
        key = StackKey.of(stack.runs[0])
        samples = self._facts[key.data].samples_of(key)
        epoch = self._store.begin(stack, self._session, samples, resume=stack.checkpoint is not None)
        self._bar.advance_to(stack, epoch, resumed=True)
        return stack

    def _handle(self, stack: PlannedStack, message: Message) -> None:
        if isinstance(message, Evaluation):
            if self._logs is not None:
                self._logs.evaluated(stack.runs, message, self._store.finished())
            ended = self._store.record(stack, message)
            self._failed = 0 if ended else self._failed
            self._bar.end(ended)
        elif isinstance(message, Progress):
            self._store.progress(stack, message.epoch)
            self._bar.advance_to(stack, message.epoch)
            self._unforeseen = 0
            if message.checkpoint is not None:
                self._store.save_checkpoint(stack, message.epoch, message.checkpoint)
                del self._losses[stack.id]
        elif isinstance(message, Stopped):
            pass  # with a checkpoint, from which the same command continues
        elif isinstance(message, Finished) or not self._left(stack):  # it may also fail when it has nothing left to do
            self._store.end(stack)
        elif message.kind == "checkpoint":
            self._set_aside(self._stored(stack), message.text)
            self._queue.appendleft(self._stored(stack))
        elif message.kind == "data":  # which is not the stack's fault: a worker that has the data may train it
            say(self._console, message.text)
            self._no_data = message.text
            self._queue.appendleft(self._stored(stack))
        elif message.kind == "lost":
            self._lose(stack, message)
        elif message.kind == "memory":
            self._halve(stack, message)
        elif message.kind == "own":
            self._fail(stack, message)
        else:
            self._give_up(stack, message)

    def _left(self, stack: PlannedStack) -> list[RunConfig]:
        """The runs of a stack that have not ended."""
        finished = self._store.finished()
        return [run for run in stack.runs if run.id not in finished]

    def _stored(self, stack: PlannedStack) -> PlannedStack:
        """The stack as the store has it now, with its last checkpoint."""
        return self._store.stack(stack.id)

    def _set_aside(self, stack: PlannedStack, why: str) -> None:
        """Have a stack start from its beginning, since its checkpoint cannot be used; its file is kept."""
        if stack.checkpoint is not None:
            aside = self._store.set_aside(stack)
            say(self._console, f"stack {stack.id} starts from its beginning: {why}; the file is kept as {aside}")

    def _lose(self, stack: PlannedStack, failure: Failed) -> None:
        """Have a stack go on from its last checkpoint; halve it or give it up where it is lost without a new one."""
        self._losses[stack.id] += 1
        losses, runs = self._losses[stack.id], len(self._left(stack))
        if losses >= (_HALVED_AFTER if runs > 1 else _GIVEN_UP_AFTER):
            self._halve(stack, failure)  # the system may have killed its process for the memory it took
            return
        stored = self._stored(stack)
        where = "its beginning" if stored.epoch is None else f"its last checkpoint, of epoch {stored.epoch}"
        say(self._console, f"stack {stack.id} was lost: {failure.text}; it starts again from {where}")
        self._queue.appendleft(stored)

    def _halve(self, stack: PlannedStack, failure: Failed) -> None:
        """Cut a stack, and the larger ones of its key in the queue, into stacks of at most half its size.

        The parts go on from the checkpoint of the stack.
        """
        stack = self._stored(stack)
        left = self._left(stack)
        size, half = len(stack.runs), len(left) // 2
        if half == 0:
            self._give_up(stack, failure)
            return
        parts = [left[i : i + half] for i in range(0, len(left), half)]
        kept = self._divided(stack, parts)
        if kept is None:
            self._give_up(stack, failure)
            return
        why = "do not fit" if failure.kind == "memory" else f"were lost {_HALVED_AFTER} times without a new checkpoint"
        say(self._console, f"{size} runs at once {why} ({failure.text}); continuing with stacks of {half}")
        key = StackKey.of(stack.runs[0])
        untried = [one for one in self._queue if one.checkpoint is None and StackKey.of(one.runs[0]) == key]
        alike = [one for one in untried if len(one.runs) > half and one.branches == stack.branches]
        parts += [runs[i : i + half] for runs in map(self._left, alike) for i in range(0, len(runs), half)]
        self._replace(stack, parts, kept, alike)

    def _fail(self, stack: PlannedStack, failure: Failed) -> None:
        """Record the run whose own code raised an error as failed; the others of its stack go on without it.

        Where it is not known which one it was, each goes on alone from the last checkpoint, and the error comes again.
        """
        left = self._left(stack)
        failed = left if len(left) == 1 else [run for run in left if run.id == failure.run]
        for run in failed:
            self._store.fail(stack, run.id, failure.text, failure.log)
            self._bar.end({run.id: "failed"})
            say(
                self._console,
                f"{run.describe()} has failed: {failure.text}; its traceback is in failures/{run.id}.txt",
            )
        self._failed += len(failed)
        if self._failed >= _FAILED:
            raise UserError(
                f"{_FAILED} runs in a row have failed: {failure.text}. They are recorded, with their tracebacks in "
                f"{self._store.folder / 'failures'}; all others are kept, and the same command goes on with them"
            )
        others = [run for run in left if run not in failed]
        stack = self._stored(stack) if others else stack
        if not others:
            self._store.end(stack)
            return
        parts = [others] if failed else [[run] for run in others]
        kept = self._divided(stack, parts)
        if kept is None:
            self._give_up(stack, Failed("memory", "there is no memory to divide its checkpoint"))
            return
        if not failed:
            say(self._console, f"{failure.text}: the {len(left)} runs of stack {stack.id} go on one by one")
        self._replace(stack, parts, kept, [])

    def _divided(
        self, stack: PlannedStack, parts: Sequence[Sequence[RunConfig]]
    ) -> list[tuple[int, bytes] | None] | None:
        """Return the checkpoint of a stack divided among parts of it; empty without one, None without the memory."""
        kept: list[tuple[int, bytes] | None] = []
        if stack.checkpoint is not None and stack.epoch is not None:
            try:
                content = read_checkpoint(stack.checkpoint, stack.epoch)
                kept = [(stack.epoch, part) for part in split_checkpoint(content, stack.runs, parts)]
            except CheckpointError as error:
                self._set_aside(stack, str(error))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                return None
        return kept

    def _replace(
        self, stack: PlannedStack, parts: Sequence[Sequence[RunConfig]], kept: Sequence[tuple[int, bytes] | None],
        others: Sequence[PlannedStack],
    ) -> None:  # fmt: skip
        """Put parts of a stack, the first with checkpoints, and of others of the queue in their place."""
        numbers = self._store.set_plan(parts, checkpoints=kept, branches=[stack.branches] * len(parts))
        self._store.end(stack)  # all its runs have ended or are in other stacks
        stored = {one.id: one for one in self._store.stacks()}
        self._queue = deque([stored[n] for n in numbers] + [one for one in self._queue if one not in others])

    def _give_up(self, stack: PlannedStack, failure: Failed) -> None:
        """Leave a stack as it is, with its checkpoint, and go on with the others; `train` says so at the end."""
        self._given_up.append((failure, self._left(stack)))
        say(self._console, f"stack {stack.id} is left: {failure.text}")
        if failure.kind != "unforeseen":
            return
        with contextlib.suppress(OSError), (self._store.folder / ERRORS).open("a", encoding="utf-8") as file:
            file.write(f"stack {stack.id}: {', '.join(run.describe() for run in stack.runs)}\n{failure.log}\n")
        self._unforeseen += 1
        if self._unforeseen >= _UNFORESEEN:
            raise UserError(
                f"{_UNFORESEEN} stacks in a row failed: {self._explain('unforeseen')}; finished runs are kept"
            )
