"""The trainer: data, models, the training loop, grids, the store, the report and the command line.

Train one model of yours, or a grid of settings:

    from ncollapse.train import Data, sweep, train
    result = train(MyNet, Data(x, y, x_test, y_test), optimizer="adamw", lr=1e-3, epochs=50)
    runs = sweep({"model": "mine", "lr": [0.1, 0.01]}, "results/mine", models={"mine": MyNet})

Load a results folder, finished or not, as DataFrames:

    from ncollapse.train import load_metrics, load_runs
    runs, epochs = load_runs("results/demo"), load_metrics("results/demo")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncollapse.train.api import TrainResult, sweep, train
    from ncollapse.train.data.own import Data
    from ncollapse.train.results.reader import iter_metrics, load_geometry, load_layers, load_metrics, load_runs

#: Name -> the module that it is loaded from on first use, so that `ncollapse --help` does not wait for pandas.
_HOMES = {
    **dict.fromkeys(("TrainResult", "sweep", "train"), "api"),
    "Data": "data.own",
    **dict.fromkeys(("iter_metrics", "load_geometry", "load_layers", "load_metrics", "load_runs"), "results.reader"),
}
__all__ = [
    "Data", "TrainResult", "iter_metrics", "load_geometry", "load_layers", "load_metrics", "load_runs", "sweep",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"ncollapse.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ncollapse.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
