"""What an engine is, and the messages that it sends while stacks train."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.throughput import DataFacts, Rate
from ncollapse.train.errors import CheckpointError, DataError, OwnCodeError, UserError, first_line, out_of_memory
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.training.loop import Training


@dataclasses.dataclass(frozen=True)
class Progress:
    """A stack has trained `epoch` epochs; with its checkpoint, when one is due."""

    epoch: int
    checkpoint: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """All runs of the stack have ended."""


@dataclasses.dataclass(frozen=True)
class Stopped:
    """The stack has stopped, with a checkpoint, as `Engine.stop` asked."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The training of the stack has stopped, for the reason `text`.

    Attributes:
        kind: it does not fit in memory; its process or node is lost; its checkpoint cannot be used; its data set cannot
            be read, or is another one; the user has to change something ("refused"); the user's own code has raised an
            error ("own"); an error that nobody foresaw.
        log: of an error that nobody foresaw, and of the user's code, its traceback.
        run: the id of the run whose code has raised the error, if it is known.
    """

    kind: Literal["memory", "lost", "checkpoint", "data", "refused", "own", "unforeseen"]
    text: str
    log: str = ""
    run: str = ""


Message = Evaluation | Progress | Finished | Stopped | Failed


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a sweep has to know, whatever it trains."""

    load_data: Callable[[str, torch.device], Dataset]  # by `RunConfig.data_key`, onto a device
    checkpoint_seconds: float  # between checkpoints of a stack
    keep_weights: bool  # send the final weights of each run
    fingerprints: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # data set -> that of the sweep's own copy
    hopeless_after: float | None = None  # see `Training`
    plugins: Plugins = dataclasses.field(default_factory=Plugins)  # the user's code
    metrics: tuple[str, ...] = ()  # names of the user's metrics

    def load(self, name: str, device: torch.device) -> Dataset:
        """Load a data set, which must be the one that the sweep began with.

        Raises:
            DataError: it is another one by now, it cannot be read, or there is no memory for it.
        """
        try:
            data = self.load_data(name, device)
        except UserError as error:
            raise DataError(str(error)) from None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise DataError(f"there is no memory for the data set {name} in another process") from None
        known = self.fingerprints.get(name, data.fingerprint)
        if data.fingerprint != known:
            raise DataError(
                f"the data set {name} has changed since the sweep began ({data.fingerprint} now, {known} then): give "
                "that one again"
            )
        return data


class Engine(Protocol):
    """Trains stacks side by side, and tells the policy (`stack_size.py`) what it has to train them with.

    Attributes:
        device: the name of the hardware, for the user.
        gpus: how many GPUs it trains on; 0: it trains on CPU cores.
        in_process: whether a single worker is this process, so that none has to be started.
    """

    @property
    def device(self) -> str: ...
    @property
    def gpus(self) -> int: ...
    @property
    def in_process(self) -> bool: ...

    def slots(self, per_gpu: int) -> int:
        """How many workers there is hardware for: one on each core, or `per_gpu` on each GPU."""

    def threads(self, workers: int) -> int:
        """How many CPU threads each of `workers` workers may have."""

    def use(self, workers: int, threads: int, per_gpu: int = 1) -> None:
        """Measure and train with `workers` workers of `threads` threads, `per_gpu` on each GPU, from now on."""

    def room(self, key: StackKey, facts: DataFacts) -> int | None:
        """How many runs fit into the memory of each worker, at least 1; None: not known before a measurement."""

    def measure_rate(
        self, key: StackKey, facts: DataFacts, size: int, *, branches: bool = False, quick: bool = False,
        runs: Sequence[RunConfig] = (),
    ) -> Rate | None:  # fmt: skip
        """How fast training is with a stack of `size` runs in every worker at once.

        None where that does not fit in memory. `branches`: see `PlannedStack`. `quick`: time a single step. `runs`: of
        the stack, where `key.needs_runs`.
        """

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        """Train what `next_stack` returns until it returns None and nothing is in training.

        The messages of each stack end with Finished, Stopped or Failed; after that `next_stack` may have a stack again.
        It may end with stacks left where no worker can read their data.
        """

    def stop(self) -> None:
        """Have every stack in training stop with a checkpoint at the end of its epoch.

        Only sets a flag: a signal handler and other threads may call it.
        """

    def close(self) -> None:
        """Release everything at once; stacks in training are abandoned."""


def train_stack(
    runs: Sequence[RunConfig], load: Callable[[], Dataset], device: torch.device, settings: WorkerSettings,
    read_checkpoint: Callable[[], bytes] | None, stopping: Callable[[], bool] = lambda: False,
    branches: bool = False,
) -> Iterator[Message]:  # fmt: skip
    """Train a stack in this process; ends with Finished, Stopped or Failed, whatever happens.

    Args:
        load: returns the data set on the device.
        read_checkpoint: returns the content of the checkpoint to continue from; None: from the beginning.
        stopping: is asked after each epoch whether to stop with a checkpoint.
        branches: see `PlannedStack`.
    """
    try:
        data = load()
        checkpoint = None if read_checkpoint is None else read_checkpoint()
        training = Training(
            runs, data, device, branches=branches, checkpoint=checkpoint, keep_weights=settings.keep_weights,
            hopeless_after=settings.hopeless_after, plugins=settings.plugins, metrics=settings.metrics,
        )  # fmt: skip
        saved = time.monotonic()
        for event in training:
            if isinstance(event, Evaluation):
                yield event
                continue
            stop = stopping() and not training.ended
            due = stop or time.monotonic() - saved >= settings.checkpoint_seconds
            yield Progress(event, training.checkpoint() if due else None)
            if stop:
                yield Stopped()
                return
            saved = time.monotonic() if due else saved
        yield Finished()
    except Exception as error:
        yield failure(error)


def failure(error: Exception) -> Failed:
    """Return what an exception means for the stack in whose training it was raised."""
    if isinstance(error, CheckpointError):
        return Failed("checkpoint", str(error))
    if isinstance(error, DataError):
        return Failed("data", str(error))
    if isinstance(error, OwnCodeError):
        return Failed("own", str(error), error.log, error.run)
    if isinstance(error, UserError):
        return Failed("refused", str(error))
    first = first_line(error)
    if out_of_memory(error):
        return Failed("memory", first or "out of memory")
    return Failed(
        "unforeseen", f"{type(error).__name__}: {first}".removesuffix(": "), "".join(traceback.format_exception(error))
    )
