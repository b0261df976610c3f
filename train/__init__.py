"""The trainer: data, models, the training loop, grids, the store, the report and the command line.

Load a results folder, finished or not, as DataFrames:

    from ncollapse.train import load_metrics, load_runs
    runs, epochs = load_runs("results/demo"), load_metrics("results/demo")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncollapse.train.results.reader import iter_metrics, load_layers, load_metrics, load_runs

__all__ = ["iter_metrics", "load_layers", "load_metrics", "load_runs"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `ncollapse --help` does not wait for pandas.
    if name in __all__:
        return getattr(import_module("ncollapse.train.results.reader"), name)
    raise AttributeError(f"module 'ncollapse.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
