"""Every metric of a stack of runs, in one pass over the training data and one over the validation data."""

import torch
from torch import Tensor

from nc.metrics import nc4
from nc.probe import of_head
from nc.stats import ClassStats
from nc.train.data import Dataset
from nc.train.stack import Stack
from nc.train.step import cross_entropy

#: Images of all runs in one forward pass: few enough that activations stay in a CPU's cache and take less memory than a
#: training step.
_BATCH = 256


@torch.no_grad()
def evaluate(stack: Stack, data: Dataset) -> dict[str, list[float]]:
    """Metric name -> one value per run: losses, accuracies, and NC0–NC4 on the training data in evaluation mode."""
    k, d = stack.weight.shape[1:]
    stats = ClassStats(k, d, runs=stack.runs, nan_policy="propagate", device=stack.weight.device)
    # NC4 asks for the nearest class mean, and the means are known at the end only: the features are kept for it.
    samples = len(data.train_y)
    features = stack.weight.new_empty(stack.runs, samples, d)
    logits = stack.weight.new_empty(stack.runs, samples, k)
    for start in range(0, samples, _BATCH):
        part = slice(start, start + _BATCH)
        features[:, part], logits[:, part] = stack(data.train_x[part], train=False)
        stats.update(features[:, part], data.train_y[part])
    values = of_head(stack.weight, stats)
    values["nc4"] = nc4(features, logits, stats)
    values["train_accuracy"] = (logits.argmax(-1) == data.train_y).double().mean(-1)
    values["train_loss"] = cross_entropy(logits, data.train_y)
    values["weight_norm"] = stack.weight.double().flatten(1).norm(dim=1)
    values["feature_norm"] = stats.centred_means().norm(dim=-1).mean(-1)
    parts = [stack(images, train=False)[1] for images in data.val_x.split(_BATCH)]
    logits = torch.cat(parts, 1) if parts else logits[:, :0]
    values["val_loss"] = cross_entropy(logits, data.val_y)
    values["val_accuracy"] = (logits.argmax(-1) == data.val_y).double().mean(-1)
    return dict(zip(values, _tolist(list(values.values())), strict=True))


def _tolist(tensors: list[Tensor]) -> list[list[float]]:
    return torch.stack([tensor.double() for tensor in tensors]).tolist()  # one wait for the device
