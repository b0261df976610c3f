"""Small grids and stores that the trainer's tests share."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine import stack_size
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.grid import Grid

CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _no_measurement() -> Iterator[None]:
    """Stacks have their usual sizes, so that no test depends on how fast the machine is at the moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_size, "WORTH_MEASURING", math.inf)
        yield


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load("digits", CPU, data_dir=None, download=False)


@pytest.fixture(scope="session")
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def run_sweep(digits: Dataset, quiet: Console) -> Callable[..., int]:
    """sweep(grid, out, **options) on digits, on the CPU, in this process unless `workers` says more, without output."""

    def run(grid: Grid, out: Path, **options: Any) -> int:
        return sweep(grid, out, lambda name, device: digits, CPU, Options(**{"workers": 1} | options), quiet)

    return run


@pytest.fixture(scope="session")
def swept(run_sweep: Callable[..., int], small_grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small grid's results, undisturbed; not to be written to."""
    folder = tmp_path_factory.mktemp("swept")
    assert run_sweep(small_grid, folder) == len(small_grid.runs)
    return folder


@pytest.fixture(scope="session")
def small_grid() -> Grid:
    """Six optimizers × two decays, four epochs."""
    runs = [
        RunConfig(
            optimizer=optimizer,
            lr=0.05 if optimizer.startswith("sgd") else 2e-3,
            weight_decay=decay,
            epochs=4,
            eval_every=2,
        )
        for optimizer in ("sgd", "sgdw", "signum", "signumw", "adam", "adamw")
        for decay in (5e-4, 5e-2)
    ]
    return Grid("small", tuple(runs), "a small grid")
