"""What an engine is, and the messages that it sends while stacks train."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import CheckpointError, UserError
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.sweep.grouping import StackKey
from ncollapse.train.sweep.throughput import DataFacts, out_of_memory
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
class Failed:
    """The training of the stack has stopped, for the reason `text`.

    It does not fit in memory, its process or node is lost, its checkpoint cannot be used, or the user has to change
    something ("refused").
    """

    kind: Literal["memory", "lost", "checkpoint", "refused"]
    text: str


Message = Evaluation | Progress | Finished | Failed


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What every worker of a sweep has to know, whatever it trains."""

    load_data: Callable[[str, torch.device], Dataset]  # by name, onto a device
    checkpoint_seconds: float  # between checkpoints of a stack
    keep_weights: bool  # send the final weights of each run


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

    def measure_rate(self, key: StackKey, facts: DataFacts, size: int, *, quick: bool = False) -> float | None:
        """Training steps per second, summed over all runs, with a stack of `size` runs in every worker at once.

        None where that does not fit in memory. `quick`: time a single step.
        """

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        """Train what `next_stack` returns until it returns None and nothing is in training.

        The messages of each stack end with Finished or Failed; after that `next_stack` may have a stack again.
        """

    def close(self) -> None:
        """Release everything at once; stacks in training are abandoned."""


def train_stack(
    runs: Sequence[RunConfig], data: Dataset, device: torch.device, settings: WorkerSettings, checkpoint: bytes | None
) -> Iterator[Message]:
    """Train a stack in this process, from a checkpoint if there is one; ends with Finished or Failed."""
    try:
        training = Training(runs, data, device, checkpoint=checkpoint, keep_weights=settings.keep_weights)
        saved = time.monotonic()
        for event in training:
            if isinstance(event, Evaluation):
                yield event
                continue
            due = time.monotonic() - saved >= settings.checkpoint_seconds
            yield Progress(event, training.checkpoint() if due else None)
            saved = time.monotonic() if due else saved
        yield Finished()
    except CheckpointError as error:
        yield Failed("checkpoint", str(error))
    except UserError as error:
        yield Failed("refused", str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        yield Failed("memory", str(error).splitlines()[0] if str(error) else "out of memory")
