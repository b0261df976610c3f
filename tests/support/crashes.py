"""Sweeps in separate processes that are killed: by themselves at a chosen point, or from outside at any instant."""

import functools
import itertools
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fork_server import fork_context
from ncollapse.optimizer_table import PAPER_OPTIMIZERS
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.grid import Grid
from ncollapse.train.results import atomic_write as files
from ncollapse.train.results import schema

#: Two stacks; in each a run that diverges, and runs that end at different epochs.
GRID = Grid(
    "crash",
    tuple(
        RunConfig(optimizer=optimizer, lr=lr, epochs=epochs, limit=200, eval_every=1)  # type: ignore[arg-type]
        for optimizer in PAPER_OPTIMIZERS
        for lr, epochs in ((2e-3, 3), (1e30, 3), (0.01, 2))
        if optimizer.startswith("sgd") or lr < 1
    ),
)


def start(out: Path, die_at: int | None = None) -> BaseProcess:
    """Start a process that sweeps into a folder; with `die_at` it kills itself at its `die_at`-th chance."""
    process = fork_context().Process(target=sweep_into, args=(out, die_at), daemon=True)
    process.start()
    return process


def finish(out: Path) -> None:
    """Sweep to the end in a separate process."""
    process = start(out)
    process.join()
    assert process.exitcode == 0


def chances(out: Path) -> int:
    """Count the chances to die in a sweep to the end."""
    process = start(out, die_at=_NEVER)
    process.join()
    assert process.exitcode == 0
    return int((out.parent / "chances").read_text())


_NEVER = 2**62


@functools.cache
def _data(name: str, device: torch.device) -> Dataset:
    return load(name, device, data_dir=None, download=False)


def sweep_into(out: Path, die_at: int | None) -> None:
    """Sweep; see `start`."""
    torch.set_num_threads(1)
    counter = itertools.count(1)
    if die_at is not None:
        _die(lambda: next(counter) == die_at)
    sweep(
        GRID,
        out,
        _data,
        torch.device("cpu"),
        Options(stack=8, workers=1, checkpoint_minutes=0, save_weights=True),
        Console(quiet=True),
    )
    if die_at == _NEVER:
        (out.parent / "chances").write_text(str(next(counter)))


def _die(now: Callable[[], bool]) -> None:
    """Have this process kill itself when `now` returns True, asked before and after all that reaches the disk."""

    def chance() -> None:
        if now():
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def guarded(act: Callable[..., Any]) -> Callable[..., Any]:
        def acting(*args: Any, **options: Any) -> Any:
            chance()
            result = act(*args, **options)
            chance()
            return result

        return acting

    connect = schema.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.set_trace_callback(lambda statement: chance())  # before each statement, COMMIT included
        return connection

    schema.connect = traced
    for name in ("replace", "fsync"):
        setattr(files.os, name, guarded(getattr(os, name)))
    Path.unlink = guarded(Path.unlink)  # type: ignore[method-assign]
