"""What the processes of a `torch.distributed` group tell each other while each measures its share of the data."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def told_by_all(mine: T, group: Any) -> list[T]:
    """Return what each process of the group tells, in the order of their ranks."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    return told


class _AnotherError(RuntimeError):
    """Another process has told of its error."""


def run_in_all(task: Callable[[], None], group: Any) -> None:
    """Run this process's task; raise its error, or in a process without one RuntimeError with that of another.

    Else the others would wait in vain for the one that failed.
    """
    if group is None:
        return task()
    error = None
    try:
        task()
    except _AnotherError:
        raise
    except Exception as raised:
        error = raised
    told = told_by_all(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    _raise_if_told(told)
    return None


def _raise_if_told(told: Iterable[Any]) -> None:
    for rank, text in enumerate(told):
        if isinstance(text, str):
            raise _AnotherError(f"measure: process {rank} of the group failed: {text}")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are distributed over processes, so that all must run it together."""
    return any(hasattr(p, "full_tensor") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def in_step(batches: Iterable[T], group: Any) -> Iterator[tuple[T, bool]]:
    """Yield each batch with True, and the last one again with False as long as other processes have more batches.

    Raises:
        ValueError: a process has no batch.
    """
    items, last = iter(batches), None
    while True:
        item = next(items, None)
        last = last if item is None else item
        told = told_by_all((item is not None, last is not None), group)
        _raise_if_told(told)  # instead of a batch: it has left `run_in_all`
        more, able = zip(*told, strict=True)
        if not any(more):
            return
        if not all(able):
            raise ValueError("measure: a sharded model runs in all processes of the group, and one has no batch")
        assert last is not None
        yield last, item is not None
