"""ncollapse: which optimizers drive a classifier into neural collapse, and why (arXiv 2602.16642).

`ncollapse.optim` has the optimizers, `ncollapse.metrics` NC0–NC4 and `ncollapse.ufm` the theory. `measure` computes the
metrics of a model; `ClassStats` gathers the statistics for them.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncollapse import metrics, optim, plot, ufm
    from ncollapse.classifier import NCCallback, measure
    from ncollapse.heads import Head
    from ncollapse.kernels.cross_entropy import cross_entropy
    from ncollapse.result import NCResult
    from ncollapse.stats import ClassStats

try:
    __version__ = version("ncollapse")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ClassStats", "Head", "NCCallback", "NCResult", "cross_entropy", "measure", "metrics", "optim", "plot", "ufm",
]  # fmt: skip

_MODULE_OF = {
    "ClassStats": "stats", "Head": "heads", "NCCallback": "classifier", "NCResult": "result", "measure": "classifier",
    "cross_entropy": "kernels.cross_entropy",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import ncollapse` must stay quick, and `ncollapse --help` must not wait for torch.
    if name in _MODULE_OF:
        return getattr(import_module(f"ncollapse.{_MODULE_OF[name]}"), name)
    if name in __all__:
        return import_module(f"ncollapse.{name}")
    raise AttributeError(f"module 'ncollapse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
