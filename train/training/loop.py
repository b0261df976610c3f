"""The training loop: a stack of runs from its initial weights, or a checkpoint, to the last epoch of the last run."""

import io
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncollapse.train.config import RunConfig
from ncollapse.train.data.augment import PAD, draw
from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import CheckpointError, UserError
from ncollapse.train.networks.models import MIN_SIZE, MULTIPLE, SHRINKS, build
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.results.record import Ended, Evaluation, Values
from ncollapse.train.training.evaluate import evaluate_stack
from ncollapse.train.training.stack import Stack, make_optimizer
from ncollapse.train.training.step import Step

#: Runs that have ended are taken out of the stack when no more than this share of it is left: on a GPU that means a new
#: CUDA graph.
_LEFT = 0.75
_FORMAT = 2


class Training:
    """Runs that train as one program; an iterator over their `Evaluation`s, and the number of each epoch that ends.

    The runs are of one `Shape` (`sweep/grouping.py`); all else may differ. A run's numbers are those that it has
    when trained alone, but for the rounding of sums taken in another order: nothing flows between runs. Runs of one
    seed start from the same weights and see the same batches. A run that has ended, or diverged, is not trained
    further.

    Args:
        runs: R of them.
        data: the data set, on the device.
        device: that trains.
        checkpoint: what `checkpoint()` gave in a training of the same runs: goes on from there, bit for bit on the same
            device with the same versions.
        keep_weights: have evaluations hold the final weights of the runs that end.

    Raises:
        UserError: images that the model or the augmentation cannot take, training samples of one class only, a
            checkpoint of other runs.
    """

    def __init__(
        self,
        runs: Sequence[RunConfig],
        data: Dataset,
        device: torch.device,
        *,
        checkpoint: bytes | None = None,
        keep_weights: bool = False,
    ) -> None:
        config = runs[0]
        self.runs = list(runs)
        self.data = data = data.limited(config.limit)
        _check_size(config, data.size)
        _check_last_batch(config, data)
        if len(data.train_y.unique()) < 2:
            raise UserError(f"the {len(data.train_y)} training samples are all of one class; give a larger --limit")
        self._device, self._keep_weights = device, keep_weights
        self.epoch = 0
        self._rows = list(range(len(runs)))  # of the runs in the stack
        self._over: set[int] = set()  # runs that have ended and may still be in the stack
        self._seconds = [0.0] * len(runs)
        seeds = {run.seed for run in runs}
        self._orders = {seed: torch.Generator().manual_seed(seed) for seed in sorted(seeds)}
        kind = (config.model, data.channels, data.size, len(data.classes))
        models = {seed: build(*kind, seed, config.width) for seed in seeds}
        self._take(Stack.of([models[run.seed] for run in runs], device))
        if checkpoint is not None:
            self._restore(checkpoint)

    def __iter__(self) -> Iterator[Evaluation | int]:
        if self.epoch == 0:
            yield self._evaluate(time.perf_counter())
        while left := self._left():
            started = time.perf_counter()
            self._train_epoch()
            self.epoch += 1
            if any(self._due(i) for i in left):
                yield self._evaluate(started)
            else:
                self._spend(started)
            yield self.epoch

    def _left(self) -> list[int]:
        """The runs that have not ended."""
        return [i for i in self._rows if i not in self._over]

    def _spend(self, started: float) -> None:
        """Divide the time since `started` among the runs that have not ended."""
        left = self._left()
        for i in left:
            self._seconds[i] += (time.perf_counter() - started) / len(left)

    def _due(self, i: int) -> bool:
        run = self.runs[i]
        return self.epoch in (0, run.epochs) or self.epoch % run.eval_every == 0

    def _take(self, stack: Stack, optimizer_state: dict[int, Any] | None = None) -> None:
        """Go on with another stack, of the runs `self._rows`."""
        own = [self.runs[i] for i in self._rows]
        self._stack, self._optimizer = stack, make_optimizer(stack, own)
        if optimizer_state:
            # Without the runs of Adam that have left, there is less to keep.
            kept = set(self._optimizer.state_names)
            own_state = {p: {n: v for n, v in each.items() if n in kept} for p, each in optimizer_state.items()}
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": own_state, "param_groups": groups})
        self._lr = self._optimizer.param_groups[0]["lr"]
        self._base_lr = self._lr.clone()
        self._step = Step(stack, self._optimizer, self.data, self.runs[0].augment)

    def _train_epoch(self) -> None:
        own = [self.runs[i] for i in self._rows]
        factors = [run.lr_factor(self.epoch) for run in own]
        # In place: CUDA graphs read it there.
        self._lr.copy_(self._base_lr * torch.tensor(factors, dtype=torch.float64, device=self._device))
        samples, augment, size = len(self.data.train_y), own[0].augment, own[0].batch_size
        orders = {seed: torch.randperm(samples, generator=g) for seed, g in self._orders.items()}
        drawn = {seed: draw(augment, samples, g) for seed, g in self._orders.items()}
        batches = _of_runs(orders, own).to(self._device).split(size, dim=-1)
        # Views are drawn for places in the order, so that they are cut as it is.
        views: Sequence[Tensor | None] = [None] * len(batches)
        if augment != "none":
            views = _of_runs(drawn, own).to(self._device).split(size, dim=-2)
        with arithmetic(own[0].precision):
            for batch, seen in zip(batches, views, strict=True):
                self._step(batch, seen)

    def _evaluate(self, started: float) -> Evaluation:
        """Measure; the time since `started` counts for the runs, those that end now included."""
        first = self.runs[0]
        with arithmetic(first.precision):
            values, layers = evaluate_stack(
                self._stack, self.data, layers=first.layers == "all"
            )  # waits for the device
        self._spend(started)
        rows, ended = [], {}
        for place, i in enumerate(self._rows):
            if i in self._over or not self._due(i):
                continue
            rows.append(i)
            diverged = not abs(values["train_loss"][place]) < float("inf")
            if diverged or self.epoch == self.runs[i].epochs:
                status = "diverged" if diverged else "degenerate" if values["degenerate"][place] else "done"
                ended[i] = Ended(status, self.epoch if diverged else None, self._seconds[i])
        places = [self._rows.index(i) for i in rows]
        weights = {i: self._weights(i) for i in ended} if self._keep_weights else {}
        self._over |= ended.keys()
        self._shrink()

        def taken(values: Values) -> Values:
            return {name: [each[place] for place in places] for name, each in values.items()}

        of_layers = {name: taken(each) for name, each in layers.items()}
        return Evaluation(self.epoch, tuple(rows), taken(values), of_layers, ended, weights)

    def _weights(self, i: int) -> bytes:
        state = self._stack.state_dict(self._rows.index(i))
        return _saved({"config": self.runs[i].as_dict(), "state_dict": state})

    def _shrink(self) -> None:
        """Take the runs that have ended out of the stack, if they are enough of them."""
        keep = [place for place, i in enumerate(self._rows) if i not in self._over]
        if not keep or len(keep) > _LEFT * len(self._rows):
            return
        places = torch.tensor(keep, device=self._device)
        state = self._optimizer.state_dict()["state"]
        # A state has the shape of its parameter, but for the step, which all runs of the stack have in common.
        kept = {p: {n: v[places] if v.dim() else v for n, v in own.items()} for p, own in state.items()}
        self._rows = [self._rows[place] for place in keep]
        self._take(self._stack.select(places), kept)

    def checkpoint(self) -> bytes:
        """Everything that the rest of the training depends on; taken when the iteration has given an epoch's number."""
        content = {
            "format": _FORMAT,
            "runs": [run.id for run in self.runs],
            "epoch": self.epoch,
            "rows": self._rows,
            "over": sorted(self._over),
            "seconds": self._seconds,
            "orders": {seed: generator.get_state() for seed, generator in self._orders.items()},
            "tensors": self._stack.tensors(),
            "optimizer": self._optimizer.state_dict()["state"],
        }
        return _saved(content)

    def _restore(self, checkpoint: bytes) -> None:
        try:
            content = torch.load(io.BytesIO(checkpoint), map_location=self._device, weights_only=True)
        except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"a checkpoint cannot be read ({type(error).__name__})") from None
        if content["format"] != _FORMAT or content["runs"] != [run.id for run in self.runs]:
            raise CheckpointError("a checkpoint is of other runs, or of another version of ncollapse")
        self.epoch, self._rows, self._over = content["epoch"], content["rows"], set(content["over"])
        self._seconds = content["seconds"]
        for seed, generator in self._orders.items():
            generator.set_state(content["orders"][seed].cpu())
        self._take(self._stack.with_tensors(content["tensors"]), content["optimizer"])


def _check_size(config: RunConfig, size: int) -> None:
    """Raise UserError for images that the model or the augmentation cannot take."""
    least, multiple = MIN_SIZE[config.model], MULTIPLE.get(config.model, 1)
    has = f"data set {config.data} has {size}"
    if size < least:
        raise UserError(f"model {config.model} needs images of at least {least} pixels a side; {has}")
    if size % multiple:
        raise UserError(f"model {config.model} needs images whose side is a multiple of {multiple} pixels; {has}")
    if "crop" in config.augment and size <= PAD:
        raise UserError(f"augment {config.augment} mirrors {PAD} pixels at the edges: images must be larger; {has}")


def _check_last_batch(config: RunConfig, data: Dataset) -> None:
    """Raise UserError for a batch that a batch norm cannot train with: a single sample whose maps are one pixel."""
    last = (len(data.train_y) - 1) % config.batch_size + 1
    if last == 1 and data.size // SHRINKS.get(config.model, 1) == 1:
        raise UserError(
            f"the last of the batches of {config.batch_size} has a single sample of the {len(data.train_y)}, and one "
            f"pixel of it in the last maps of {config.model}, from which batch norm can take no variance; give another "
            "--batch-size or --limit"
        )


def _of_runs(by_seed: Mapping[int, Any], runs: Sequence[RunConfig]) -> Tensor:
    """What was drawn for each seed, for all runs: as it is if they have one seed, else stacked `[R, …]`."""
    seeds = [run.seed for run in runs]
    return by_seed[seeds[0]] if len(set(seeds)) == 1 else torch.stack([by_seed[seed] for seed in seeds])


def _saved(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
