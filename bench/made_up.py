"""Stores of finished sweeps with made-up metrics, of any size: nothing is trained."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ncollapse.train.config import RunConfig
from ncollapse.train.grid import Grid
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.provenance import describe_machine, device_name
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store


def make_store(folder: Path, grid: Grid, keep_pending: int = 0) -> int:
    """Write a finished sweep of made-up metrics, but for so many runs at the end; return the rows of metrics."""
    with Store(folder, grid) as store:
        store.begin_session(f"ncollapse sweep {grid.name}", describe_machine(device_name("cpu")))
    rng = np.random.default_rng(0)
    names = list(METRICS)
    places = ", ".join("?" * (2 + len(names)))
    rows = 0
    connection = sqlite3.connect(folder / FILE)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA cache_size = -500000")
    finished = grid.runs[: len(grid.runs) - keep_pending]
    # In the order of the key, as SQLite packs them best; a sweep writes them in that of the epochs.
    for run in sorted(finished, key=lambda run: run.id):
        epochs, table = _metrics(run, names, rng)
        connection.executemany(
            f"INSERT INTO metrics (run, epoch, {', '.join(names)}) VALUES ({places})",
            ((run.id, epoch, *row) for epoch, row in zip(epochs.tolist(), table.tolist(), strict=True)),
        )
        rows += len(epochs)
    connection.executemany(
        "UPDATE runs SET status = ?, seconds = ?, train_samples = 60000 WHERE id = ?", _ends(finished, rng)
    )
    connection.commit()
    connection.close()
    return rows


def _ends(runs: Iterable[RunConfig], rng: np.random.Generator) -> Iterable[tuple[str, float, str]]:
    return (("diverged" if rng.random() < 0.02 else "done", float(rng.random()), run.id) for run in runs)


def _metrics(
    run: RunConfig, names: list[str], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the evaluated epochs of a run and its metrics `[epochs, names]`."""
    epochs = np.unique([*range(0, run.epochs, run.eval_every), run.epochs])
    part = epochs / run.epochs
    coupled = run.decay_coupling
    pull = np.tanh(30 * run.weight_decay**0.5 * (0.2 + run.momentum) * run.lr**0.2)  # in 0 … 1
    last = np.full(len(names), 2.0 - 3.0 * pull * (0.5 + 0.5 * coupled))  # logarithm to base e
    last[names.index("nc0")] = 5.0 - 13.0 * pull * coupled
    last[names.index("train_loss")] = -5.0 - run.momentum
    slope = last - 1 + 0.3 * rng.standard_normal(len(names))
    table = np.exp(1 + slope * part[:, None] + 0.02 * rng.standard_normal((len(epochs), len(names))))
    accuracy = 1 - 0.9 * np.exp(-(6 + rng.random() * 8) * part)
    table[:, names.index("train_accuracy")] = accuracy
    table[:, names.index("val_accuracy")] = 0.93 * accuracy + 0.01 * rng.random()
    table[:, names.index("nc4")] = 1.02 - accuracy
    table[:, names.index("degenerate")] = 0.0
    return epochs, table
