"""The training loop: a stack of runs from its initial weights to its last epoch."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nc.metrics import nc4
from nc.probe import of_head
from nc.stats import ClassStats
from nc.train.config import RunConfig
from nc.train.data import Dataset
from nc.train.errors import UserError
from nc.train.models import MIN_SIZE, build
from nc.train.stack import Stack, make_optimizer

#: Images in one forward pass of an evaluation: few enough that activations stay in a CPU's cache and take less memory
#: than a training step.
_EVAL_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured at the end of an epoch (0: before the first step): metric name -> one value per run."""

    epoch: int
    values: dict[str, list[float]]
    stack: Stack


def train(runs: Sequence[RunConfig], data: Dataset, device: torch.device) -> Iterator[Evaluation | int]:
    """Train a stack of runs; yields the number of each epoch that ends, and an `Evaluation` where one is due.

    The runs differ only in optimizer hyperparameters (one optimizer family). All start from the same weights and see
    the same batches; a run that diverges goes on as NaN and changes nothing for its neighbours.

    Raises:
        UserError: images too small for the model, training samples of one class only.
    """
    config = runs[0]
    data = data.limited(config.limit)
    if data.size < MIN_SIZE[config.model]:
        raise UserError(
            f"model {config.model} needs images of at least {MIN_SIZE[config.model]} pixels a side; "
            f"data set {config.data} has {data.size}"
        )
    if len(data.train_y.unique()) < 2:
        raise UserError(f"the {len(data.train_y)} training samples are all of one class; give a larger --limit")
    model = build(config.model, data.channels, data.size, len(data.classes), config.seed)
    stack = Stack(model, len(runs), device)
    optimizer = make_optimizer(stack, runs)
    group = optimizer.param_groups[0]
    base_lr = group["lr"]
    order = torch.Generator().manual_seed(config.seed)

    yield Evaluation(0, evaluate(stack, data), stack)
    for epoch in range(config.epochs):
        group["lr"] = base_lr * config.lr_factor(epoch)
        for batch in torch.randperm(len(data.train_y), generator=order).to(device).split(config.batch_size):
            _, logits = stack(data.train_x[batch], train=True)
            # Summed over runs: each run's gradient is that of its own mean loss.
            loss = _cross_entropy(logits, data.train_y[batch]).sum()
            (stack.flat.grad,) = torch.autograd.grad(loss, stack.flat)
            optimizer.step()
        yield epoch + 1
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            yield Evaluation(epoch + 1, evaluate(stack, data), stack)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each run, `[R]`, from logits `[R, B, K]` and labels `[B]`."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(logits.shape[0]), reduction="none")
    return losses.view(logits.shape[:2]).mean(1)


@torch.no_grad()
def evaluate(stack: Stack, data: Dataset) -> dict[str, list[float]]:
    """Every metric of every run: losses, accuracies, NC0–NC4 on the training data in evaluation mode."""
    features, logits = _forward(stack, data.train_x)
    stats = ClassStats(
        len(data.classes), features.shape[-1], runs=stack.runs, nan_policy="propagate", device=features.device
    )
    stats.update(features, data.train_y)
    values = of_head(stack.weight, stats)
    values["nc4"] = nc4(features, logits, stats)
    values["train_accuracy"] = (logits.argmax(-1) == data.train_y).double().mean(-1)
    values["train_loss"] = _cross_entropy(logits, data.train_y)
    values["weight_norm"] = stack.weight.double().flatten(1).norm(dim=1)
    values["feature_norm"] = stats.centred_means().norm(dim=-1).mean(-1)
    _, logits = _forward(stack, data.val_x)
    values["val_loss"] = _cross_entropy(logits, data.val_y)
    values["val_accuracy"] = (logits.argmax(-1) == data.val_y).double().mean(-1)
    return {name: value.double().tolist() for name, value in values.items()}


def _forward(stack: Stack, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[R, N, d]` and logits `[R, N, K]` of all images, in evaluation mode."""
    parts = [stack(some, train=False) for some in images.split(_EVAL_BATCH)]
    return torch.cat([features for features, _ in parts], 1), torch.cat([logits for _, logits in parts], 1)
