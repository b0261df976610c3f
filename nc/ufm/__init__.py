"""The unconstrained features model: NC0 as theory predicts it, and the model's training by any optimizer.

The features h are free variables, or fixed, in the place of what a network makes of its samples; what is left of the
network is its last layer W (Mixon et al., arXiv 2011.11619). `predict` says how NC0 = ‖Wᵀ1‖²
moves under an optimizer, and which of that holds in every network; `simulate` trains the model and measures NC0–NC3.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ncollapse.ufm.prediction import Prediction, predict, row_sum_factor

if TYPE_CHECKING:
    from ncollapse.ufm.simulation import Simulation, simulate

__all__ = ["Prediction", "Simulation", "predict", "row_sum_factor", "simulate"]


def __getattr__(name: str) -> Any:
    # On first use: a report that lays a prediction over its runs must not wait for torch.
    if name in ("Simulation", "simulate"):
        return getattr(import_module("ncollapse.ufm.simulation"), name)
    raise AttributeError(f"module 'ncollapse.ufm' has no attribute {name!r}")
