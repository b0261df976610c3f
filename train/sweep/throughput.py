"""How fast a stack trains and what memory it takes: what the size of stacks is chosen by."""

import dataclasses
import time
from typing import Any

import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.augment import draw
from ncollapse.train.data.sets import Dataset
from ncollapse.train.networks.models import Classifier, build
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.optimizers import TABLE
from ncollapse.train.sweep.grouping import Shape
from ncollapse.train.sweep.messages import out_of_memory
from ncollapse.train.training.stack import Stack, make_optimizer
from ncollapse.train.training.step import Step

_SECONDS = 0.1  # that a measurement lasts at least
_STEPS = 3  # that it takes at least, unless one of them takes longer than `_LONG`
_LONG = 2.0


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a data set without its images."""

    channels: int
    size: int
    classes: int
    samples: int
    fingerprint: str

    @staticmethod
    def of(data: Dataset) -> "Facts":
        """The facts of a data set."""
        return Facts(data.channels, data.size, len(data.classes), len(data.train_y), data.fingerprint)

    def samples_of(self, shape: Shape) -> int:
        """Training samples that the runs of a shape use."""
        return min(self.samples, shape.limit or self.samples)


def measure(shape: Shape, facts: Facts, size: int, device: torch.device, *, quick: bool = False) -> float | None:
    """Training steps a second of all runs together, in a stack of `size` runs; None where it does not fit in memory.

    Args:
        quick: time a single step.
    """
    try:
        batch = max(2, min(shape.batch_size, facts.samples))  # a batch norm may refuse a single one
        step = _step(shape, facts, size, device, batch)
        index = torch.arange(batch, device=device)
        views = draw(shape.augment, batch, torch.Generator())
        views = views if views is None else views.to(device)
        with arithmetic(shape.precision):
            for _ in range(1 if device.type == "cpu" else 5):  # libraries choose kernels; on a GPU a graph is captured
                step(index, views)
            _wait(device)
            started, steps = time.perf_counter(), 0
            while True:
                step(index, views)
                steps += 1
                _wait(device)
                elapsed = time.perf_counter() - started
                if quick or (elapsed >= _SECONDS and (steps >= _STEPS or elapsed >= _LONG)):
                    return size * steps / elapsed
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # other processes may share the GPU


def _step(shape: Shape, facts: Facts, size: int, device: torch.device, batch: int) -> Step:
    images = torch.randn(batch, facts.channels, facts.size, facts.size, device=device)
    labels = torch.arange(batch, device=device) % facts.classes
    names = tuple(str(k) for k in range(facts.classes))
    data = Dataset(images, labels, images[:0], labels[:0], names, "")
    rules = [row.name for row in TABLE.values() if row.own_stack == shape.muon]
    runs = [
        RunConfig(optimizer=rules[i % len(rules)], lr=1e-3, precision=shape.precision)  # type: ignore[arg-type]
        for i in range(size)
    ]
    stack = Stack.of([_model(shape, facts)] * size, device)
    return Step(stack, make_optimizer(stack, runs), data, shape.augment)


def _model(shape: Shape, facts: Facts) -> Classifier:
    return build(shape.model, facts.channels, facts.size, facts.classes, 0, shape.width)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_run(shape: Shape, facts: Facts) -> int:
    """About how much memory a run takes in a stack: weights, gradients, states, activations, features for NC4."""
    cpu = torch.device("cpu")
    batch = min(shape.batch_size, facts.samples)
    images = torch.randn(2, facts.channels, facts.size, facts.size)
    stack = Stack.of([_model(shape, facts)], cpu)
    saved = 0

    def pack(tensor: torch.Tensor) -> Any:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features, _ = stack(images, train=True)
    weights = sum(p.nbytes for p in stack.params.values())
    # Saved by autograd for two images, weights among it; gradients of activations take about as much again.
    activations = 2 * max(saved - weights, 0) // 2 * batch
    kept = (features.shape[-1] + facts.classes) * 4 * facts.samples
    return 5 * weights + max(activations, kept)
