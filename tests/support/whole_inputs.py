"""What is whole, before the fuzz tests damage it: a results folder, a checkpoint, a folder of images. Made once."""

import atexit
import contextlib
import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine import this_machine
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.errors import InterruptError
from ncollapse.train.grid import Grid
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")


@functools.cache
def _home() -> Path:
    folder = tempfile.mkdtemp(prefix="fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def digits(name: str, device: torch.device) -> Dataset:
    """A few digits."""
    data = load("digits", CPU, data_dir=None, download=False)
    few = {
        "train_x": data.train_x[:60],
        "train_y": data.train_y[:60],
        "val_x": data.val_x[:20],
        "val_y": data.val_y[:20],
    }
    return Dataset(**few, classes=data.classes, fingerprint="few")


GRID = Grid(
    "fuzz",
    tuple(
        RunConfig(model="mlp", optimizer=name, width=12, lr=0.01, epochs=4, eval_every=2, layers="all", seed=seed)  # type: ignore[arg-type]
        for name in ("sgd", "adamw")
        for seed in (0, 1)
    ),
)


@functools.cache
def whole_store() -> Path:
    """A results folder: one stack has ended, one is at a checkpoint; with weights."""
    out, real, left = _home() / "whole", this_machine.train_stack, itertools.count()

    def stopping(*args: Any) -> Iterator[Any]:
        for event in real(*args):
            if next(left) == 13:
                raise KeyboardInterrupt
            yield event

    options = Options(stack=2, workers=1, checkpoint_minutes=0, save_weights=True)
    with mock.patch.object(this_machine, "train_stack", stopping), contextlib.suppress(InterruptError):
        sweep(GRID, out, digits, CPU, options, Console(quiet=True))
    assert len(list((out / "checkpoints").glob("*.pt"))) == 1
    return out


@functools.cache
def whole_checkpoint() -> bytes:
    """The state of a training after an epoch."""
    training = Training(GRID.runs[:2], digits("digits", CPU), CPU)
    return next(training.checkpoint() for event in training if event == 1)


@functools.cache
def whole_images() -> Path:
    """A folder of images: two classes, 8 × 8."""
    out, rng = _home() / "images", np.random.default_rng(0)
    for split, name, i in itertools.product(("train", "test"), ("cat", "dog"), range(2)):
        (out / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(out / split / name / f"{i}.png")
    return out
