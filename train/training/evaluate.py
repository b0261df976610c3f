"""All metrics of a stack of runs: one pass over the training data and one over the validation data."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncollapse.measurement import Measurement, to_numbers
from ncollapse.train.data.sets import Dataset
from ncollapse.train.results.record import Values
from ncollapse.train.training.stack import Stack

# Images per forward pass, of each run. On a CPU few enough that the activations stay in its cache; on a GPU enough to
# fill it: without gradients a pass of this size takes less memory than a training step.
_BATCH = {"cpu": 256, "cuda": 1024}


@torch.no_grad()
def evaluate_stack(
    stack: Stack, data: Dataset, *, layers: bool = False, keep_bytes: int = 2**30
) -> tuple[Values, dict[str, Values]]:
    """Measure losses, accuracies, and NC0–NC4 on the training data in evaluation mode.

    Args:
        layers: whether to measure the output of every block too.
        keep_bytes: as in `Measurement`.

    Returns:
        The metrics of each run; and block -> metrics of its output, in the order of the blocks, empty without `layers`.
    """
    size = _BATCH.get(stack.weight.device.type, 256)
    measurement = Measurement(stack.weight, keep_bytes=keep_bytes, nan_policy="propagate")

    def add_all() -> Tensor:
        """Add the training data to the measurement; return the logits `[R, N, K]`."""
        parts = []
        for images, labels in zip(data.train_x.split(size), data.train_y.split(size), strict=True):
            outputs: dict[str, Tensor] | None = {} if layers else None
            features, logits = stack(images, train=False, outputs=outputs)
            measurement.add(features, logits, labels, outputs)
            parts.append(logits)
        return torch.cat(parts, 1)

    logits = add_all()
    if measurement.end_pass():
        add_all()
    values, blocks = measurement.finish()
    values["train_loss"] = _cross_entropy(logits, data.train_y)
    values["weight_norm"] = stack.weight.double().flatten(1).norm(dim=1)
    values["feature_norm"] = measurement.stats.centred_means().norm(dim=-1).mean(-1)
    logits = torch.cat([stack(images, train=False)[1] for images in data.val_x.split(size)], 1)
    values["val_loss"] = _cross_entropy(logits, data.val_y)
    values["val_accuracy"] = (logits.argmax(-1) == data.val_y).double().mean(-1)
    return to_numbers(values), {name: to_numbers(blocks[name]) for name in stack.blocks if name in blocks}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy of each run, `[R]`, from logits `[R, B, K]` and labels `[B]`."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.expand(logits.shape[:2]).flatten(), reduction="none")
    return losses.view(logits.shape[:2]).mean(1)
