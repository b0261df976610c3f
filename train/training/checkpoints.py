"""The state of a training as bytes: written, read with every part checked, and divided among smaller stacks."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncollapse.train.config import RunConfig
from ncollapse.train.errors import CheckpointError, out_of_memory

_FORMAT = 3
_KEYS = {"format", "runs", "epoch", "rows", "over", "seconds", "orders", "tensors", "optimizer", "optimizers"}


@dataclasses.dataclass(frozen=True)
class OptimizerStates:
    """The states of the optimizers of a stack, of one kind or the other.

    Attributes:
        stacked: of ncollapse's: parameter -> name of a state -> its value, `[R, …]` or without dimensions.
        single: of others: the `state_dict` of each run's own.
    """

    stacked: Mapping[int, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    single: Sequence[Mapping[str, Any]] = ()

    def select(self, rows: Sequence[int]) -> "OptimizerStates":
        """Return the states of some runs of the stack."""
        # Only the step has no dimension of runs, which all runs of a stack share.
        stacked = {p: {n: v[list(rows)] if v.dim() else v for n, v in of.items()} for p, of in self.stacked.items()}
        return OptimizerStates(stacked, [self.single[row] for row in rows] if self.single else ())

    @staticmethod
    def joined(parts: Sequence["OptimizerStates"]) -> "OptimizerStates":
        """Return the states of single runs as those of their stack; what only some of the rules keep is zero elsewhere.

        Those of one stack are returned as they are.
        """
        if len(parts) == 1:
            return parts[0]
        stacked: dict[int, dict[str, Tensor]] = {}
        for param in dict.fromkeys(p for part in parts for p in part.stacked):
            of_parts = [part.stacked.get(param, {}) for part in parts]
            kinds = {name: value for of in of_parts for name, value in of.items()}
            stacked[param] = {
                name: torch.cat([of[name] if name in of else torch.zeros_like(like) for of in of_parts])
                if like.dim()
                else like
                for name, like in kinds.items()
            }
        return OptimizerStates(stacked, [state for part in parts for state in part.single])


def serialised(content: Mapping[str, Any]) -> bytes:
    """Return what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_state(
    runs: Sequence[RunConfig], epoch: int, rows: Sequence[int], over: Sequence[int], seconds: Sequence[float],
    orders: Mapping[int, Tensor], tensors: Mapping[str, Tensor], optimizer: OptimizerStates,
) -> bytes:  # fmt: skip
    """Serialise the state of a training after an epoch.

    Args:
        rows, over: indices into `runs` of the runs in the stack, in its order, and of those that have ended.
        seconds: each run's share of the time so far.
        orders: seed -> state of its generator.
        tensors: parameters and buffers by name, `[R, …]` with R = len(rows).
        optimizer: the states of the optimizers of these R runs.
    """
    return serialised({
        "format": _FORMAT, "runs": [run.id for run in runs], "epoch": epoch, "rows": list(rows), "over": list(over),
        "seconds": list(seconds), "orders": dict(orders), "tensors": dict(tensors),
        "optimizer": dict(optimizer.stacked), "optimizers": list(optimizer.single),
    })  # fmt: skip


def read_state(checkpoint: bytes, runs: Sequence[RunConfig], device: torch.device) -> dict[str, Any]:
    """Return what `write_state` was given for the training of these runs, by name.

    The tensors are on the device, except for those of optimizers that are not ncollapse's, which are on the CPU.

    Raises:
        CheckpointError: it cannot be read, is of other runs or another version, or its parts contradict each other.
    """
    try:
        # On the CPU: some optimizers keep a part of their state there, whatever the device of the parameters.
        content = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of damaged pickles raises whatever it runs into
        if out_of_memory(error):
            raise
        raise CheckpointError(f"the checkpoint cannot be read ({type(error).__name__})") from None
    if isinstance(content, dict) and content.get("format") == 2:  # it knows no optimizers that are not ncollapse's
        content |= {"format": _FORMAT, "optimizers": []}
    if not isinstance(content, dict) or not content.keys() >= _KEYS or content["format"] != _FORMAT:
        raise CheckpointError("the checkpoint is of another version of ncollapse")
    if content["runs"] != [run.id for run in runs]:
        raise CheckpointError("the checkpoint is of other runs")
    for wrong, what in _contradictions(content, runs):
        if wrong:
            raise CheckpointError(f"the checkpoint contradicts itself: {what}")
    content["tensors"] = {name: value.to(device) for name, value in content["tensors"].items()}
    stacked = {p: {n: v.to(device) for n, v in of.items()} for p, of in content["optimizer"].items()}
    content["optimizer"] = OptimizerStates(stacked, content.pop("optimizers"))
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
    single = content["optimizers"]
    wrong = not isinstance(single, list) or not all(isinstance(one, dict) for one in single)
    yield wrong or any(not isinstance(one.get("state"), dict) for one in single), "the states of its own optimizers"
    groups = [one.get("param_groups") for one in single]
    wrong = any(not isinstance(of, list) or any(not isinstance(group, dict) for group in of) for of in groups)
    yield wrong or len(single) not in (0, len(rows)), "the number of its own optimizers"


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
        rows = [place[i] for i in members]
        tensors = {name: value[rows] for name, value in content["tensors"].items()}
        optimizer = content["optimizer"].select(rows)
        orders = {run.seed: content["orders"][run.seed] for run in part}
        seconds = [content["seconds"][i] for i in members]
        divided.append(write_state(part, content["epoch"], range(len(part)), (), seconds, orders, tensors, optimizer))
    return divided
