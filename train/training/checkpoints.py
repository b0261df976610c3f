"""The state of a training as bytes: written, read with every part checked, and divided among smaller stacks."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncollapse.train.config import RunConfig
from ncollapse.train.errors import CheckpointError, out_of_memory

_FORMAT = 2
_KEYS = {"format", "runs", "epoch", "rows", "over", "seconds", "orders", "tensors", "optimizer"}
#: Parameter -> name of a state of the optimizer -> its value.
OptimizerState = Mapping[int, Mapping[str, Tensor]]


def serialised(content: Mapping[str, Any]) -> bytes:
    """Return what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_state(
    runs: Sequence[RunConfig], epoch: int, rows: Sequence[int], over: Sequence[int], seconds: Sequence[float],
    orders: Mapping[int, Tensor], tensors: Mapping[str, Tensor], optimizer: OptimizerState,
) -> bytes:  # fmt: skip
    """Serialise the state of a training after an epoch.

    Args:
        rows, over: indices into `runs` of the runs in the stack, in its order, and of those that have ended.
        seconds: each run's share of the time so far.
        orders: seed -> state of its generator.
        tensors: parameters and buffers by name, `[R, …]` with R = len(rows).
        optimizer: the states of its parameters, `[R, …]` or without dimensions.
    """
    return serialised({
        "format": _FORMAT, "runs": [run.id for run in runs], "epoch": epoch, "rows": list(rows), "over": list(over),
        "seconds": list(seconds), "orders": dict(orders), "tensors": dict(tensors), "optimizer": optimizer,
    })  # fmt: skip


def read_state(checkpoint: bytes, runs: Sequence[RunConfig], device: torch.device) -> dict[str, Any]:
    """Return what `write_state` was given for the training of these runs; tensors are on the device.

    Raises:
        CheckpointError: it cannot be read, is of other runs or another version, or its parts contradict each other.
    """
    try:
        content = torch.load(io.BytesIO(checkpoint), map_location=device, weights_only=True)
    except Exception as error:  # the reader of damaged pickles raises whatever it runs into
        if out_of_memory(error):
            raise
        raise CheckpointError(f"the checkpoint cannot be read ({type(error).__name__})") from None
    if not isinstance(content, dict) or not content.keys() >= _KEYS or content["format"] != _FORMAT:
        raise CheckpointError("the checkpoint is of another version of ncollapse")
    if content["runs"] != [run.id for run in runs]:
        raise CheckpointError("the checkpoint is of other runs")
    for wrong, what in _contradictions(content, runs):
        if wrong:
            raise CheckpointError(f"the checkpoint contradicts itself: {what}")
    return content


def _contradictions(content: Mapping[str, Any], runs: Sequence[RunConfig]) -> Any:
    """Yield whether something is wrong, and what; what comes later may rely on what came before."""
    epoch, rows, over, seconds = (content[name] for name in ("epoch", "rows", "over", "seconds"))
    every = set(range(len(runs)))
    yield type(epoch) is not int or not 0 < epoch <= max(run.epochs for run in runs), f"epoch {epoch!r}"
    for indices in (rows, over):
        wrong = not isinstance(indices, list) or any(type(i) is not int for i in indices)
        yield wrong or len(set(indices)) != len(indices) or not set(indices) <= every, "which runs it holds"
    yield not rows or not every - set(over) <= set(rows), "runs that have not ended are missing"
    yield any(epoch >= runs[i].epochs for i in every - set(over)), "runs have not ended after their last epoch"
    right = isinstance(seconds, list) and len(seconds) == len(runs) and all(isinstance(s, float) for s in seconds)
    yield not right or not all(math.isfinite(s) and s >= 0 for s in seconds), "the time of its runs"
    orders, tensors, optimizer = (content[name] for name in ("orders", "tensors", "optimizer"))
    yield not isinstance(orders, dict) or orders.keys() != {run.seed for run in runs}, "its seeds"
    yield any(not isinstance(order, Tensor) or order.dtype != torch.uint8 for order in orders.values()), "its order"
    yield not _are_tensors(tensors, str), "its weights"
    yield any(value.dim() == 0 or len(value) != len(rows) for value in tensors.values()), "the number of its weights"
    yield not isinstance(optimizer, dict) or not all(type(p) is int for p in optimizer), "its optimizer"
    yield not all(_are_tensors(states, str) for states in optimizer.values()), "the states of its optimizer"
    states = [value for states in optimizer.values() for value in states.values()]
    yield any(value.dim() and len(value) != len(rows) for value in states), "the number of its optimizer's states"


def _are_tensors(value: Any, key: type) -> bool:
    return isinstance(value, dict) and all(isinstance(k, key) and isinstance(v, Tensor) for k, v in value.items())


def split_checkpoint(checkpoint: bytes, runs: Sequence[RunConfig], parts: Sequence[Sequence[RunConfig]]) -> list[bytes]:
    """Divide a checkpoint among smaller stacks, each with some of the runs that have not ended.

    Raises:
        CheckpointError: as in `read_state`; a run of a part has ended by the checkpoint.
    """
    content = read_state(checkpoint, runs, torch.device("cpu"))
    index = {run: i for i, run in enumerate(runs)}
    place = {i: row for row, i in enumerate(content["rows"])}
    divided = []
    for part in parts:
        members = [index[run] for run in part]
        if set(members) & set(content["over"]):
            raise CheckpointError("the checkpoint is of a time at which runs had ended that have not")
        rows = torch.tensor([place[i] for i in members])
        tensors = {name: value[rows] for name, value in content["tensors"].items()}
        optimizer = {
            p: {name: value[rows] if value.dim() else value for name, value in states.items()}
            for p, states in content["optimizer"].items()
        }
        orders = {run.seed: content["orders"][run.seed] for run in part}
        seconds = [content["seconds"][i] for i in members]
        divided.append(write_state(part, content["epoch"], range(len(part)), (), seconds, orders, tensors, optimizer))
    return divided
