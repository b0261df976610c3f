"""Every metric of a stack of runs, in one pass over the training data and one over the validation data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ncollapse.measurement import of_head, of_layer
from ncollapse.metrics import nc4
from ncollapse.stats import ClassStats
from ncollapse.train.data.sets import Dataset
from ncollapse.train.results.record import Values
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.step import cross_entropy

#: Images of all runs in one forward pass. On a CPU few enough that activations stay in its cache; on a GPU enough to
#: fill it: without gradients a pass of this size takes less memory than a training step.
_BATCH = {"cpu": 256, "cuda": 1024}


@torch.no_grad()
def evaluate(stack: Stack, data: Dataset, *, layers: bool = False) -> tuple[Values, dict[str, Values]]:
    """Losses, accuracies, and NC0–NC4 on the training data in evaluation mode; and metrics of every block's output.

    Args:
        layers: whether the latter are wanted; else empty.
    """
    k, d = stack.weight.shape[1:]
    size = _BATCH.get(stack.weight.device.type, 256)

    def statistics(dim: int) -> ClassStats:
        return ClassStats(k, dim, runs=stack.runs, nan_policy="propagate", device=stack.weight.device)

    stats, blocks = statistics(d), dict[str, ClassStats]()
    # NC4 asks for the nearest class mean, and the means are known at the end only: the features are kept for it.
    samples = len(data.train_y)
    features = stack.weight.new_empty(stack.runs, samples, d)
    logits = stack.weight.new_empty(stack.runs, samples, k)
    for start in range(0, samples, size):
        part = slice(start, start + size)
        seen: dict[str, Tensor] | None = {} if layers else None
        features[:, part], logits[:, part] = stack(data.train_x[part], train=False, seen=seen)
        stats.update(features[:, part], data.train_y[part])
        for name, outputs in (seen or {}).items():
            if name not in blocks:
                blocks[name] = statistics(outputs.shape[-1])
            blocks[name].update(outputs, data.train_y[part])
    values = of_head(stack.weight, stats)
    values["nc4"] = nc4(features, logits, stats)
    values["train_accuracy"] = (logits.argmax(-1) == data.train_y).double().mean(-1)
    values["train_loss"] = cross_entropy(logits, data.train_y)
    values["weight_norm"] = stack.weight.double().flatten(1).norm(dim=1)
    values["feature_norm"] = stats.centred_means().norm(dim=-1).mean(-1)
    parts = [stack(images, train=False)[1] for images in data.val_x.split(size)]
    logits = torch.cat(parts, 1) if parts else logits[:, :0]
    values["val_loss"] = cross_entropy(logits, data.val_y)
    values["val_accuracy"] = (logits.argmax(-1) == data.val_y).double().mean(-1)
    return _lists(values), {name: _lists(of_layer(blocks[name])) for name in stack.blocks if name in blocks}


def _lists(values: Mapping[str, Tensor]) -> Values:
    together = torch.stack([value.double() for value in values.values()]).tolist()  # one wait for the device
    return dict(zip(values, together, strict=True))
