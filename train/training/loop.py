"""Train a stack of runs, from initial weights or a checkpoint, to the last epoch of the last run."""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ncollapse.train.config import RunConfig, is_own
from ncollapse.train.data.augment import PAD, draw_views
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.errors import CheckpointError, OwnCodeError, UserError, out_of_memory
from ncollapse.train.losses import chance_level, make_loss
from ncollapse.train.networks.architecture import Architecture, build
from ncollapse.train.networks.models import DOWNSAMPLING, MIN_SIZE, SIZE_MULTIPLE
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Ended, Evaluation, Values, shown_epochs
from ncollapse.train.training.checkpoints import OptimizerStates, read_state, serialised, write_state
from ncollapse.train.training.evaluate import evaluate_stack
from ncollapse.train.training.lane import Lane, TrainingSamples
from ncollapse.train.training.metric_functions import MetricFunctions
from ncollapse.train.training.randomness import Generators, seeded
from ncollapse.train.training.stack import Stack, make_stack
from ncollapse.train.training.step import Step, why_no_graph
from ncollapse.train.training.updates import make_updates

# Runs that have ended are removed from the stack once at most this share of it still trains: on a GPU the smaller stack
# needs a new CUDA graph.
_SHRINK_BELOW = 0.75
#: A training loss has left chance level where it is below this share of it.
_LEFT_CHANCE = 0.99


class Training:
    """Train R runs side by side; iterate over their `Evaluation`s and the number of each epoch that ends.

    The runs must agree in the settings that all runs of a stack share (`engine/grouping.py`). They do not influence
    each other: each has the numbers that it has when trained alone, up to the rounding of sums in another order. Runs
    of one seed start from the same weights and see the same batches. A run that has ended or diverged is not trained
    further.

    Args:
        runs: settings of the R runs.
        data: on the device.
        branches: train each run as a program of its own, all of which share each step's CUDA graph as its branches,
            instead of all runs as one program. A run then has the bits that it has when trained alone on the same
            device, unless its optimizer draws random numbers within a graph. What cannot be captured, and on a CPU
            everything, is computed run by run.
        checkpoint: the result of `checkpoint()` in a training of the same runs. Training continues from it, bit for bit
            on the same device with the same versions; in the other form of `branches` up to rounding.
        keep_weights: whether evaluations hold the final weights of the runs that end.
        hopeless_after: share of a run's epochs after which it ends as hopeless at an evaluation where its training loss
            has not left chance level, or is above it; None: never.
        plugins: the user's code, which the runs name.
        metrics: names of metrics of the user's, whose values evaluations hold after ours.

    What the user's code draws from the global generators of torch, NumPy and Python depends on a run's seed and the
    epoch; their states stay as they were.

    Attributes:
        epoch: the number of epochs that have ended.

    Raises:
        UserError: images of a size that the model or the augmentation cannot use, training samples of one class only,
            labels outside `[0, K)`, streamed data with augmentation or runs of several seeds.
        OwnCodeError: the user's code raises an error, here or in an epoch; `run` is the id of the run, if it is known.
        CheckpointError: a checkpoint that is unreadable, of other runs, or whose parts contradict each other.
    """

    def __init__(
        self, runs: Sequence[RunConfig], data: Dataset, device: torch.device, *, branches: bool = False,
        checkpoint: bytes | None = None, keep_weights: bool = False, hopeless_after: float | None = None,
        plugins: Plugins | None = None, metrics: Sequence[str] = (),
    ) -> None:  # fmt: skip
        config = runs[0]
        self.runs = list(runs)
        self.data = data = data.limited(config.limit)
        _check_data(self.runs, data)
        self._device, self._keep_weights = device, keep_weights
        self._plugins = plugins or Plugins()
        self._metrics = MetricFunctions.of(metrics, self._plugins)
        self._own = bool(config.own or metrics)
        self.epoch = 0
        self._stacked = list(range(len(runs)))  # index of each run in the stack
        self._ended: set[int] = set()  # runs that have ended; some may still be in the stack
        self._seconds = [0.0] * len(runs)
        self._shown = [frozenset(shown_epochs(run)) for run in runs]
        seeds = {run.seed for run in runs}
        self._generators = {seed: torch.Generator().manual_seed(seed) for seed in sorted(seeds)}
        architecture = Architecture.of(config, data)
        with self._blaming():
            self._loss = make_loss(config, self._plugins)
            self._hopeless_after, self._hopeless_loss = math.inf, math.inf
            if hopeless_after is not None:
                self._hopeless_after = hopeless_after
                plain = config.loss == "cross_entropy" and not config.label_smoothing
                chance = (
                    chance_loss(data.train_y) if plain else chance_level(self._loss, data.train_y, data.num_classes)
                )
                self._hopeless_loss = _LEFT_CHANCE * chance
            self._why_no_graph = why_no_graph(architecture, config.precision, self._plugins)
            if branches:  # each with a module of its own, which may hold the run's weights
                parts = [[build(architecture, run.seed, self._plugins)] for run in runs]
            else:
                models = {seed: build(architecture, seed, self._plugins) for seed in seeds}
                parts = [[models[run.seed] for run in runs]]
            stacks = [make_stack(part, architecture, device, config.precision, self._plugins) for part in parts]
            self._samples = TrainingSamples(data, config.augment)
            self._use(stacks)
            if checkpoint is not None:
                self._restore(checkpoint)

    def __iter__(self) -> Iterator[Evaluation | int]:
        if self.epoch == 0:
            with self._blaming():
                evaluation = self._evaluate(time.perf_counter())
            yield evaluation
        while active := self._active():
            started = time.perf_counter()
            with self._blaming():
                with self._seeded(0, self._stacked[0]):
                    self._train_epoch()
                self.epoch += 1
                due = any(self._due(i) for i in active)
                if due:
                    evaluation = self._evaluate(started)
                else:
                    self._add_seconds(started)
            if due:
                yield evaluation
            yield self.epoch

    @property
    def ended(self) -> bool:
        """Whether all runs have ended."""
        return not self._active()

    @property
    def stack(self) -> Stack:
        """The runs that still train, and ended ones that have not been removed yet; of branches the first run."""
        return self._step.lanes[0].stack

    def _lanes(self) -> Iterator[tuple[Lane, list[int]]]:
        """Yield each lane, and the runs in it."""
        left = iter(self._stacked)
        for lane in self._step.lanes:
            yield lane, list(itertools.islice(left, lane.stack.runs))

    def _active(self) -> list[int]:
        """Return the runs that have not ended."""
        return [i for i in self._stacked if i not in self._ended]

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Give the user's code, and a run that trains alone, the blame for an error.

        Optimizers, losses, metrics and streamed data say which of their errors are the user's. A model runs within our
        forward and backward pass: if it is the user's, all errors are.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            blamed, config = error, self.runs[0]
            if isinstance(error, SystemExit):  # only the user's code ends the process
                blamed = OwnCodeError.of("your code", error)
            elif not isinstance(error, UserError) and "model" in config.own and not out_of_memory(error):
                blamed = OwnCodeError.of(f"model {config.model}", error)
            active = self._active()
            if isinstance(blamed, OwnCodeError) and not blamed.run and len(active) == 1:
                blamed.run = self.runs[active[0]].id
            if blamed is error:
                raise
            raise blamed from error

    def _seeded(self, phase: int, i: int) -> AbstractContextManager[None]:
        """Seed the global generators for an epoch's training (0) or evaluation (1), if the user's code may draw.

        Args:
            i: the run with whose seed.
        """
        return seeded(self._device, self.runs[i].seed, self.epoch, phase) if self._own else nullcontext()

    def _add_seconds(self, started: float) -> None:
        """Divide the time since `started` among the runs that have not ended."""
        active = self._active()
        for i in active:
            self._seconds[i] += (time.perf_counter() - started) / len(active)

    def _due(self, i: int) -> bool:
        run = self.runs[i]
        return self.epoch in (0, run.epochs) or self.epoch % run.eval_every == 0

    def _use(self, stacks: Sequence[Stack], states: OptimizerStates | None = None) -> None:
        """Continue with other stacks, of the runs `self._stacked`: one of all of them, or one each."""
        runs = [self.runs[i] for i in self._stacked]
        parts = [(runs, states)]
        if len(stacks) > 1:
            parts = [([run], None if states is None else states.select([row])) for row, run in enumerate(runs)]
        updates = [
            make_updates(stack, members, self._plugins, of) for stack, (members, of) in zip(stacks, parts, strict=True)
        ]
        lanes = [Lane(stack, of, self._samples, self._loss) for stack, of in zip(stacks, updates, strict=True)]
        self._step = Step(lanes, self._why_no_graph)

    def _train_epoch(self) -> None:
        runs = [self.runs[i] for i in self._stacked]
        for lane in self._step.lanes:
            lane.updates.begin_epoch(self.epoch)
        if len(self._step.lanes) > 1 and runs[0].own:  # what a run draws is what it would draw alone
            self._step.generators = [Generators.of(self._device, run.seed, self.epoch, 0) for run in runs]
        samples, augment, size = len(self.data.train_y), runs[0].augment, runs[0].batch_size
        orders = {seed: torch.randperm(samples, generator=g, device="cpu") for seed, g in self._generators.items()}
        if isinstance(self.data, Streamed):
            with arithmetic(runs[0].precision):
                for x, y in self.data.batches(orders[runs[0].seed], size, self._device):
                    self._step(x, y)
            return
        views = {seed: draw_views(augment, samples, g) for seed, g in self._generators.items()}
        batches = _for_runs(orders, runs).to(self._device).split(size, dim=-1)
        # Row j of the views belongs to position j of the order, so both are split alike.
        batch_views: Sequence[Tensor | None] = [None] * len(batches)
        if augment != "none":
            batch_views = _for_runs(views, runs).to(self._device).split(size, dim=-2)
        with arithmetic(runs[0].precision):
            for batch, view in zip(batches, batch_views, strict=True):
                self._step(batch, view)

    def _evaluate(self, started: float) -> Evaluation:
        """Measure; add the time since `started` to the runs, including those that end now."""
        due: dict[int, tuple[Stack, int]] = {}  # run -> where it is
        values, layers = Values(), dict[str, Values]()
        shown, weights = dict[int, bytes](), dict[int, bytes]()
        evaluated = []
        for lane, members in self._lanes():
            rows = {i: row for row, i in enumerate(members) if i not in self._ended and self._due(i)}
            if rows:
                evaluated.append((lane, members))
                due |= {i: (lane.stack, row) for i, row in rows.items()}
                of_lane, of_layers, snapshots = self._evaluate_lane(lane, members, rows)
                _extend(values, of_lane, rows.values())
                for name, of_layer in of_layers.items():
                    _extend(layers.setdefault(name, Values()), of_layer, rows.values())
                shown |= {i: snapshots[row] for i, row in rows.items() if row in snapshots}
        self._add_seconds(started)
        ended = {}
        for position, i in enumerate(due):
            if status := self._status(i, position, values):
                ended[i] = Ended(status, self.epoch if status == "diverged" else None, self._seconds[i])
        for i in ended if self._keep_weights else ():
            stack, row = due[i]
            weights[i] = serialised({"config": self.runs[i].as_dict(), "state_dict": stack.state_dict(row)})
        self._ended |= ended.keys()
        for lane, members in evaluated:
            lane.updates.train([row for row, i in enumerate(members) if i not in self._ended])
        self._shrink()
        return Evaluation(self.epoch, tuple(due), values, layers, ended, weights, shown)

    def _evaluate_lane(
        self, lane: Lane, members: Sequence[int], due: Mapping[int, int]
    ) -> tuple[Values, dict[str, Values], dict[int, bytes]]:
        """Measure the runs of a lane, of which some are `due`: run -> row; see `evaluate_stack`."""
        first = self.runs[0]
        lane.updates.eval([row for row, i in enumerate(members) if i not in self._ended])

        def show(values: Values) -> list[int]:
            return [row for i, row in due.items() if self.epoch in self._shown[i] or self._status(i, row, values)]

        with arithmetic(first.precision), self._seeded(1, members[0]):
            return evaluate_stack(  # waits for the device
                lane.stack, self.data, layers=first.layers == "all", loss=self._loss, metrics=self._metrics,
                of_runs={row: self.runs[i] for i, row in due.items()}, epoch=self.epoch, show=show,
            )  # fmt: skip

    def _status(self, i: int, position: int, values: Values) -> str:
        """Return with which status a run ends at an evaluation; empty where it goes on."""
        loss, epochs = values["train_loss"][position], self.runs[i].epochs
        if not math.isfinite(loss):
            return "diverged"
        if loss >= self._hopeless_loss and self._hopeless_after * epochs <= self.epoch < epochs:
            return "hopeless"
        if self.epoch < epochs:
            return ""
        return "degenerate" if values["degenerate"][position] else "done"

    def _shrink(self) -> None:
        """Remove the runs that have ended, if few enough still train."""
        keep = [position for position, i in enumerate(self._stacked) if i not in self._ended]
        if not keep or len(keep) > _SHRINK_BELOW * len(self._stacked):
            return
        self._stacked = [self._stacked[position] for position in keep]
        if len(self._step.lanes) > 1:  # the others stay as they are
            self._step = Step([self._step.lanes[position] for position in keep], self._why_no_graph)
            return
        states = self._step.lanes[0].updates.states().select(keep)
        self._use([self.stack.select(torch.tensor(keep, device=self._device))], states)

    def checkpoint(self) -> bytes:
        """Serialise the state of the training; call it after the iteration yielded an epoch's number."""
        return write_state(
            self.runs, self.epoch, self._stacked, sorted(self._ended), self._seconds,
            {seed: generator.get_state() for seed, generator in self._generators.items()},
            self._tensors(), OptimizerStates.joined([lane.updates.states() for lane in self._step.lanes]),
        )  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name, `[R, …]`."""
        of_lanes = [lane.stack.tensors() for lane in self._step.lanes]
        return {n: torch.cat([of[n] for of in of_lanes]) for n in of_lanes[0]} if len(of_lanes) > 1 else of_lanes[0]

    def _with_tensors(self, tensors: Mapping[str, Tensor]) -> list[Stack]:
        """Return stacks of the runs `self._stacked` with these tensors, where the lanes are still those of all runs."""
        lanes = self._step.lanes
        if len(lanes) == 1:
            return [lanes[0].stack.with_tensors(tensors)]
        of_runs = [{name: value[[row]] for name, value in tensors.items()} for row in range(len(self._stacked))]
        return [lanes[i].stack.with_tensors(of) for i, of in zip(self._stacked, of_runs, strict=True)]

    def _restore(self, checkpoint: bytes) -> None:
        content = read_state(checkpoint, self.runs, self._device)
        mine, theirs = (
            {n: (v.shape[1:], v.dtype) for n, v in t.items()} for t in (self._tensors(), content["tensors"])
        )
        if mine != theirs:
            raise CheckpointError("the checkpoint is of another network, or of images of another size")
        self.epoch, self._stacked, self._ended = content["epoch"], content["rows"], set(content["over"])
        self._seconds = content["seconds"]
        try:
            for seed, generator in self._generators.items():
                generator.set_state(content["orders"][seed].cpu())
            self._use(self._with_tensors(content["tensors"]), content["optimizer"])
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(f"the checkpoint is of another state than the training's: {error}") from None


def _extend(values: Values, of_lane: Values, rows: Iterable[int]) -> None:
    """Append the values of some rows of a lane to those of the lanes before it."""
    for name, of_rows in of_lane.items():
        values.setdefault(name, []).extend(of_rows[row] for row in rows)


def chance_loss(labels: Tensor) -> float:
    """Return the smallest mean cross-entropy of a classifier that does not look at the images: the labels' entropy."""
    shares = labels.unique(return_counts=True)[1].double() / len(labels)
    return -float((shares * shares.log()).sum())


def _check_data(runs: Sequence[RunConfig], data: Dataset) -> None:
    """Raise UserError for data with which the runs cannot train."""
    config, samples, shape = runs[0], len(data.train_y), data.input_shape
    images = len(shape) == 3
    if not is_own("model", config.model):
        fits = images and shape[1] == shape[2]
        if not (fits or (config.model == "mlp" and len(shape) == 1)) or not data.input_dtype.is_floating_point:
            raise UserError(
                f"model {config.model} takes square images [C, H, W]; samples of data set {config.data} are "
                f"{list(shape)} of {data.input_dtype}"
            )
    if config.augment != "none" and isinstance(data, Streamed):
        raise UserError(f"augment = {config.augment} needs data in memory; let the transform of {config.data} do it")
    if isinstance(data, Streamed) and len({run.seed for run in runs}) > 1:
        raise UserError(f"streamed data: runs of several seeds cannot train together on {config.data}")
    for name, labels in (("training", data.train_y), ("validation", data.val_y)):
        least, most = labels.aminmax() if len(labels) else (0, 0)
        if not 0 <= least <= most < data.num_classes:
            raise UserError(
                f"data set {config.data}: labels lie in [0, {data.num_classes}), but {name} labels go from {least} to "
                f"{most}"
            )
    if images:
        _check_size(config, data)
    if len(data.train_y.unique()) < 2:
        raise UserError(f"the {samples} training samples are all of one class; give a larger --limit")


def _check_size(config: RunConfig, data: Dataset) -> None:
    """Raise UserError for images that are too small for the augmentation or for a model that comes with ncollapse."""
    size, samples = min(data.input_shape[1:]), len(data.train_y)
    least, multiple = MIN_SIZE.get(config.model, 1), SIZE_MULTIPLE.get(config.model, 1)
    has = f"data set {config.data} has {size}"
    if size < least:
        raise UserError(f"model {config.model} needs images of at least {least} pixels a side; {has}")
    if size % multiple:
        raise UserError(f"model {config.model} needs images whose side is a multiple of {multiple} pixels; {has}")
    if "crop" in config.augment and size <= PAD:
        raise UserError(f"augment {config.augment} mirrors {PAD} pixels at the edges: images must be larger; {has}")
    last_batch = (samples - 1) % config.batch_size + 1
    if config.model in DOWNSAMPLING and last_batch == 1 and size // DOWNSAMPLING[config.model] == 1:
        raise UserError(
            f"the last batch of {config.batch_size} has a single sample of the {samples}, and the last maps of "
            f"{config.model} have one pixel: batch norm cannot compute a variance from one value; give another "
            "--batch-size or --limit"
        )


def _for_runs(by_seed: Mapping[int, Any], runs: Sequence[RunConfig]) -> Tensor:
    """Return the seed's tensor if all runs have one seed, else the runs' tensors stacked as `[R, …]`."""
    seeds = [run.seed for run in runs]
    return by_seed[seeds[0]] if len(set(seeds)) == 1 else torch.stack([by_seed[seed] for seed in seeds])
