"""All metrics of a stack of runs: one pass over the training data and one over the validation data."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ncollapse.measurement import Measurement, to_numbers
from ncollapse.snapshot_taking import samples_to_show, take_snapshots
from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.losses import Loss, cross_entropy_loss
from ncollapse.train.results.record import Values
from ncollapse.train.training.metric_functions import MetricFunctions
from ncollapse.train.training.randomness import seeded
from ncollapse.train.training.stack import Stack

# Images per forward pass, of each run. On a CPU few enough that the activations stay in its cache; on a GPU enough to
# fill it: without gradients a pass of this size takes less memory than a training step.
_BATCH = {"cpu": 256, "cuda": 1024}


@torch.no_grad()
def evaluate_stack(
    stack: Stack, data: Dataset, *, layers: bool = False, keep_bytes: int = 2**30, loss: Loss | None = None,
    metrics: MetricFunctions | None = None, of_runs: Mapping[int, RunConfig] | None = None, epoch: int = 0,
    show: Callable[[Values], Iterable[int]] = lambda values: (),
) -> tuple[Values, dict[str, Values], dict[int, bytes]]:  # fmt: skip
    """Measure losses, accuracies, and NC0–NC4 on the training data in evaluation mode.

    Args:
        layers: whether to measure the output of every block too.
        keep_bytes: as in `Measurement`; also the most that features and logits of a run may take that the user's
            metrics name.
        loss: that of `train_loss` and `val_loss`; None: the cross-entropy.
        metrics: the user's.
        of_runs: place in the stack -> the run, of those for which they are computed; they are NaN for the others, and
            for runs that have diverged.
        epoch: from which, with the seed of a run, random numbers are drawn in the user's metrics.
        show: takes the metrics and returns the places in the stack of the runs whose geometry is to be kept.

    Returns:
        The metrics of each run; block -> metrics of its output, in the order of the blocks, empty without `layers`;
        and place in the stack -> the bytes of its `Snapshot`, of those to show that are finite.

    Raises:
        UserError: a metric of the user's needs more than `keep_bytes`.
        OwnCodeError: it raises an error, or returns no number.
    """
    device = stack.weight.device
    size, loss = _BATCH.get(device.type, 256), loss or cross_entropy_loss()
    metrics, of_runs = metrics or MetricFunctions(), of_runs or {}
    measurement = Measurement(stack.weight, keep_bytes=keep_bytes, nan_policy="propagate")
    kept = _Kept(metrics, len(data.train_y), keep_bytes)
    to_show = samples_to_show(data.train_y)
    shown: list[Tensor] = []

    def add_all() -> Tensor:
        """Add the training data to the measurement; return the loss of each sample, `[R, N]`."""
        parts, begin = [], 0
        shown.clear()
        for samples, labels in data.evaluation_batches("train", size, device):
            outputs: dict[str, Tensor] | None = {} if layers else None
            features, logits = stack(samples, train=False, outputs=outputs)
            measurement.add(features, logits, labels, outputs)
            kept.add(begin, {"features": features, "logits": logits, "labels": labels})
            here = to_show[(to_show >= begin) & (to_show < begin + len(labels))] - begin
            if len(here):
                shown.append(features[:, here.to(device)])
            begin += len(labels)
            parts.append(loss.of_runs(logits, labels))
        return torch.cat(parts, 1)

    losses = add_all()
    if measurement.end_pass():
        add_all()
    values, blocks = measurement.finish()
    values["train_loss"] = losses.mean(1)
    values["weight_norm"] = stack.weight.double().flatten(1).norm(dim=1)
    values["feature_norm"] = measurement.stats.centred_means().norm(dim=-1).mean(-1)
    val_losses, correct = [], []
    for samples, labels in data.evaluation_batches("val", size, device):
        logits = stack(samples, train=False)[1]
        val_losses.append(loss.of_runs(logits, labels))
        correct.append(logits.argmax(-1) == labels)
    values["val_loss"] = torch.cat(val_losses, 1).mean(1)
    values["val_accuracy"] = torch.cat(correct, 1).double().mean(-1)
    found = to_numbers(values)
    for name in metrics.functions:
        found[name] = [math.nan] * stack.runs
    for row, run in of_runs.items() if metrics.functions else ():
        if not math.isfinite(found["train_loss"][row]):
            continue
        try:
            with seeded(device, run.seed, epoch):
                own = metrics.compute(stack.weight[row].clone(), measurement.stats.of_run(row), kept.of_run(row))
        except OwnCodeError as error:
            error.run = run.id
            raise
        for name, value in own.items():
            found[name][row] = value
    snapshots: dict[int, bytes] = {}
    if rows := list(show(found)):
        of_all = take_snapshots(
            stack.weight, measurement.stats, torch.cat(shown, 1), data.train_y[to_show.to(data.train_y.device)]
        )
        snapshots = {row: snapshot.to_bytes() for row in rows if (snapshot := of_all[row]) is not None}
    return found, {name: to_numbers(blocks[name]) for name in stack.blocks if name in blocks}, snapshots


class _Kept:
    """Features, logits and labels of all training samples, as far as the user's metrics name them."""

    def __init__(self, metrics: MetricFunctions, samples: int, most: int) -> None:
        self._metrics, self._samples, self._most = metrics, samples, most
        self._tensors: dict[str, Tensor] = {}

    def add(self, begin: int, batch: Mapping[str, Tensor]) -> None:
        """Keep a batch, of features `[R, B, d]`, logits `[R, B, K]` and labels `[B]`, as samples from `begin` on."""
        batch = {name: batch[name] for name in self._metrics.needs}
        if batch and not self._tensors:
            self._allocate(batch)
        for name, values in batch.items():
            along = 0 if name == "labels" else 1
            self._tensors[name].narrow(along, begin, values.shape[along]).copy_(values)

    def _allocate(self, batch: Mapping[str, Tensor]) -> None:
        of_samples = {name: values for name, values in batch.items() if name != "labels"}
        needed = self._samples * sum(v.shape[-1] * v.element_size() for v in of_samples.values())
        if needed > self._most:
            raise UserError(
                f"metric {', '.join(self._metrics.functions)}: {' and '.join(of_samples)} of the {self._samples:,} "
                f"training samples take {needed / 2**30:.1f} GiB a run, and at most {self._most / 2**30:.1f} GiB are "
                "kept; compute it from weight and statistics, or give a smaller --limit"
            )
        for name, values in batch.items():
            shape = (self._samples,) if name == "labels" else (len(values), self._samples, values.shape[-1])
            self._tensors[name] = values.new_empty(shape)

    def of_run(self, row: int) -> dict[str, Tensor]:
        """Return what was kept of one run, without its dimension R."""
        return {name: values if name == "labels" else values[row] for name, values in self._tensors.items()}
