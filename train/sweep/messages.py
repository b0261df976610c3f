"""What an engine is given to do and what it tells while it does it; the same for a process, a GPU or a cluster."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import CheckpointError, UserError
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training


@dataclasses.dataclass(frozen=True)
class Job:
    """A stack to train: the number that it has in the store, its runs, and the checkpoint where it goes on."""

    stack: int
    runs: tuple[RunConfig, ...]
    checkpoint: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """So many epochs of a stack are trained."""

    epoch: int


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint after so many epochs."""

    epoch: int
    content: bytes


@dataclasses.dataclass(frozen=True)
class Finished:
    """All runs of the stack have ended."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The stack is not trained further.

    Attributes:
        kind: "memory": it does not fit. "lost": its process or node is gone. "checkpoint": it cannot go on from its
            checkpoint. "refused": the user has to mend something.
    """

    kind: Literal["memory", "lost", "checkpoint", "refused"]
    text: str


Message = Evaluation | Progress | Saved | Finished | Failed
#: Gives the next stack to train, None when there is none (there may be again, after a failure).
Take = Callable[[], Job | None]


@dataclasses.dataclass(frozen=True)
class How:
    """What workers have to know besides the runs.

    Attributes:
        loaded: data sets that were read already, on the CPU; not sent to other processes.
    """

    load_data: Callable[[str, torch.device], Dataset]
    checkpoint_seconds: float
    keep_weights: bool
    loaded: dict[str, Dataset] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[type["How"], tuple[Any, ...]]:
        return How, (self.load_data, self.checkpoint_seconds, self.keep_weights)


class Engine(Protocol):
    """Trains stacks somewhere."""

    @property
    def device(self) -> str:
        """What trains, by name."""

    def run(self, take: Take) -> Iterator[tuple[Job, Message]]:
        """Train what `take` gives until it gives nothing more; each stack ends with Finished or Failed."""

    def close(self) -> None:
        """Let go of everything, at once: stacks in flight are given up."""


def train(job: Job, data: Dataset, device: torch.device, how: How) -> Iterator[Message]:
    """Train a stack here; ends with Finished or Failed."""
    try:
        training = Training(job.runs, data, device, checkpoint=job.checkpoint, keep_weights=how.keep_weights)
        saved = time.monotonic()
        for event in training:
            if isinstance(event, Evaluation):
                yield event
                continue
            yield Progress(event)
            if time.monotonic() - saved >= how.checkpoint_seconds:
                yield Saved(event, training.checkpoint())
                saved = time.monotonic()
        yield Finished()
    except CheckpointError as error:
        yield Failed("checkpoint", str(error))
    except UserError as error:
        yield Failed("refused", str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        yield Failed("memory", str(error).splitlines()[0] if str(error) else "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up; on the CPU torch says it in words only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
