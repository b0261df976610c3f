"""What the processes of a `torch.distributed` group tell each other while each measures its share of the data."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def told_by_all(mine: T, group: Any) -> list[T]:
    """Return what each process of the group tells, in the order of their ranks."""
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, mine, group=group)
    return told


def raise_for_all(error: Exception | None, group: Any) -> None:
    """Raise the error, and in processes without one that of another, which would else be waited for in vain."""
    if group is not None:
        texts = told_by_all(None if error is None else f"{type(error).__name__}: {error}", group)
        failed = next((rank for rank, text in enumerate(texts) if text), None)
        if error is None and failed is not None:
            raise RuntimeError(f"measure: process {failed} of the group failed: {texts[failed]}")
    if error is not None:
        raise error


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
        more, able = zip(*told_by_all((item is not None, last is not None), group), strict=True)
        if not any(more):
            return
        if not all(able):
            raise ValueError("measure: a sharded model runs in all processes of the group, and one has no batch")
        assert last is not None
        yield last, item is not None
