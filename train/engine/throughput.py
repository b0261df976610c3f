"""Measure how fast a stack trains, and estimate the memory that it takes."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ncollapse.optimizer_table import TABLE
from ncollapse.train.config import RunConfig
from ncollapse.train.data.augment import draw_views
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.errors import out_of_memory
from ncollapse.train.limits import available_memory
from ncollapse.train.losses import make_loss
from ncollapse.train.networks.architecture import Architecture, build
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.plugins import Plugins, kept_with_plugins
from ncollapse.train.training.lane import Lane, TrainingSamples
from ncollapse.train.training.stack import make_stack
from ncollapse.train.training.step import Step, why_no_graph
from ncollapse.train.training.updates import make_updates

#: A measurement takes at least this many seconds, and this many steps, unless they take longer than `_LONG` seconds.
_SECONDS, _STEPS, _LONG = 0.1, 3, 2.0
#: Share of the time below which a measurement says nothing about a machine without other programs.
_LEAST_SHARE = 0.01
#: Share of the free memory that stacks may take by the estimate.
_MEMORY = 0.7
_NO_PLUGINS = Plugins()


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast stacks train.

    Attributes:
        steps: training steps per second, summed over all runs.
        share: of the time, that the processors worked for this process, in (0, 1]; the rest went to other programs.
            Known on a CPU with one thread, 1 elsewhere.
        graph: what CUDA graphs hold of a step, in words; empty on a CPU.
    """

    steps: float
    share: float = 1.0
    graph: str = ""

    @property
    def alone(self) -> float:
        """The steps per second of a machine without other programs: what sizes are compared by."""
        return self.steps / self.share

    @staticmethod
    def total(rates: Iterable["Rate"]) -> "Rate":
        """Return the rate of workers that train side by side."""
        rates = list(rates)
        steps = sum(rate.steps for rate in rates)
        return Rate(steps, steps / sum(rate.alone for rate in rates), rates[0].graph)


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """A data set without its samples.

    Attributes:
        input_shape, input_dtype: of one sample, `[C, H, W]` of images.
        num_classes: K.
        samples: number of those to train on.
        fingerprint: a hash of the data.
        streamed: whether its samples are not in memory, so that its runs train one by one.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    samples: int
    fingerprint: str
    input_dtype: torch.dtype = torch.float32
    streamed: bool = False

    @staticmethod
    def of(data: Dataset) -> "DataFacts":
        """Return the facts of a data set."""
        return DataFacts(
            data.input_shape, data.num_classes, len(data.train_y), data.fingerprint, data.input_dtype,
            isinstance(data, Streamed),
        )  # fmt: skip

    def samples_of(self, key: StackKey) -> int:
        """Return how many training samples the runs of a stack use."""
        return min(self.samples, key.limit or self.samples)


def measure_rate(
    key: StackKey, facts: DataFacts, size: int, device: torch.device, *,
    branches: bool = False, quick: bool = False, runs: Sequence[RunConfig] = (), plugins: Plugins = _NO_PLUGINS,
) -> Rate | None:  # fmt: skip
    """Measure how fast a stack of `size` runs trains, on random samples.

    None where the stack does not fit in memory.

    Args:
        branches: its runs are branches of one CUDA graph; see `Training`.
        quick: time a single step.
        runs: of the stack, where `key.needs_runs`: their optimizers and loss are used.
        plugins: the user's code.
    """
    try:
        return _rate(key, facts, size, device, branches, quick, runs, plugins)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes may share the GPU


def _rate(
    key: StackKey, facts: DataFacts, size: int, device: torch.device, branches: bool, quick: bool,
    runs: Sequence[RunConfig], plugins: Plugins,
) -> Rate:  # fmt: skip
    """As `measure_rate`; its own frame, so that what it takes of the memory is free when it has ended."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    batch = max(2, min(key.batch_size, facts.samples))  # a batch norm may refuse a single sample
    step = _step(key, facts, size, device, batch, branches, runs, plugins)
    index = torch.arange(batch, device=device)
    views = draw_views(key.augment, batch, torch.Generator())
    views = views if views is None else views.to(device)
    with arithmetic(key.precision):
        for _ in range(1 if device.type == "cpu" else 5):  # libraries choose kernels; on a GPU a graph is captured
            step(index, views)
        synchronize(device)
        started, worked, steps = time.perf_counter(), time.thread_time(), 0
        while True:
            step(index, views)
            steps += 1
            synchronize(device)
            elapsed = time.perf_counter() - started
            if quick or (elapsed >= _SECONDS and (steps >= _STEPS or elapsed >= _LONG)):
                # Other threads of this process may work while this one waits for them.
                counted = device.type == "cpu" and torch.get_num_threads() == 1
                share = (time.thread_time() - worked) / elapsed if counted else 1.0
                graph = step.captured if device.type == "cuda" else ""
                return Rate(size * steps / elapsed, min(1.0, max(_LEAST_SHARE, share)), graph)


def _step(
    key: StackKey, facts: DataFacts, size: int, device: torch.device, batch: int, branches: bool,
    runs: Sequence[RunConfig], plugins: Plugins,
) -> Step:  # fmt: skip
    architecture = Architecture.of(key, facts)
    x, labels = architecture.example(batch).to(device), torch.arange(batch, device=device) % facts.num_classes
    data = Dataset(x, labels, x[:0], labels[:0], tuple(str(k) for k in range(facts.num_classes)), "")
    if not key.needs_runs:
        rules = [row.name for row in TABLE.values() if (row.family if row.own_stack else None) == key.own_family]
        shared: dict[str, Any] = {n: getattr(key, n) for n in ("precision", "loss", "loss_options", "label_smoothing")}
        runs = [RunConfig(optimizer=rule, lr=1e-3, **shared) for rule in rules]
    runs = [runs[i % len(runs)] for i in range(size)]
    samples, loss, lanes = TrainingSamples(data, key.augment), make_loss(runs[0], plugins), []
    for members in [[run] for run in runs] if branches else [runs]:
        model = build(architecture, 0, plugins)
        stack = make_stack([model] * len(members), architecture, device, key.precision, plugins)
        lanes.append(Lane(stack, make_updates(stack, members, plugins), samples, loss))
    return Step(lanes, why_no_graph(architecture, key.precision, plugins))


@kept_with_plugins
def has_convolutions(key: StackKey, facts: DataFacts, plugins: Plugins = _NO_PLUGINS) -> bool:
    """Return whether the model of a key has convolutions, which several runs compute in groups."""
    model = build(Architecture.of(key, facts), 0, plugins)
    return any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in model.modules())


@kept_with_plugins
def bytes_per_run(key: StackKey, facts: DataFacts, plugins: Plugins = _NO_PLUGINS) -> int:
    """Estimate the memory of a run in a stack: weights, gradients, states, activations, and features for NC4."""
    batch = min(key.batch_size, facts.samples)
    architecture, cpu = Architecture.of(key, facts), torch.device("cpu")
    stack = make_stack([build(architecture, 0, plugins)], architecture, cpu, key.precision, plugins)
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features, _ = stack(architecture.example(2), train=True)
    weights = sum(p.nbytes for p in stack.params.values())
    # Autograd saves these for two samples, with the weights; the gradients of activations take about as much again.
    activations = 2 * max(sum(saved) - weights, 0) // 2 * batch
    kept = (features.shape[-1] + facts.num_classes) * 4 * facts.samples
    return 5 * weights + max(activations, kept)


def room_on(
    device: torch.device, key: StackKey, facts: DataFacts, reserved: int = 0, *, plugins: Plugins = _NO_PLUGINS
) -> int:
    """Estimate how many runs fit into the free memory of a device; at least 1, which training tries in any case.

    Args:
        reserved: bytes of the processor's memory that are free, but will be taken otherwise.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else max(0, available_memory() - reserved)
    try:
        return max(1, int(_MEMORY * free / bytes_per_run(key, facts, plugins)))
    except (MemoryError, RuntimeError) as error:  # even the estimate of a very wide network needs its weights
        if not out_of_memory(error):
            raise
        return 1
