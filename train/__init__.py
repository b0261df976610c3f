"""The trainer: data, models, the training loop, grids, the store, the report and the command line.

What a results folder holds, as DataFrames, finished or not:

    from ncollapse.train import load_metrics, load_runs
    runs, epochs = load_runs("results/demo"), load_metrics("results/demo")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncollapse.train.results.reader import load_layers, load_metrics, load_runs

__all__ = ["load_layers", "load_metrics", "load_runs"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `ncollapse --help` must not wait for pandas.
    if name in __all__:
        return getattr(import_module("ncollapse.train.results.reader"), name)
    raise AttributeError(f"module 'ncollapse.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
