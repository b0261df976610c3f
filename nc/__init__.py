"""ncollapse: which optimizers drive a classifier into neural collapse, and why (arXiv 2602.16642).

`nc.optim` holds the optimizers, `nc.metrics` NC0–NC4, `ClassStats` and `measure` what feeds them, `nc.ufm` the theory.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nc import metrics, optim, ufm
    from nc.probe import NCCallback, NCResult, measure
    from nc.stats import ClassStats

try:
    __version__ = version("ncollapse")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["ClassStats", "NCCallback", "NCResult", "measure", "metrics", "optim", "ufm"]

_HOME = {"ClassStats": "nc.stats", "NCCallback": "nc.probe", "NCResult": "nc.probe", "measure": "nc.probe"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import nc` must stay quick, and `ncollapse --help` must not wait for torch.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in __all__:
        return import_module(f"nc.{name}")
    raise AttributeError(f"module 'nc' has no attribute {name!r}")
