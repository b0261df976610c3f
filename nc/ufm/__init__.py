"""The unconstrained features model: predictions of NC0, and the model's training by any optimizer.

The features h are free variables, or fixed, instead of outputs of a network; only the last layer W of the network
remains (Mixon et al., arXiv 2011.11619). `predict` gives NC0 = ‖Wᵀ1‖² under an optimizer, in the model or in every
network; `simulate` trains the model and measures NC0–NC3.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ncollapse.ufm.prediction import Prediction, largest_gap, predict, row_sum_factor

if TYPE_CHECKING:
    from ncollapse.ufm.simulation import Simulation, simulate

__all__ = ["Prediction", "Simulation", "largest_gap", "predict", "row_sum_factor", "simulate"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a report that draws `row_sum_factor` over its runs must not wait for torch.
    if name in ("Simulation", "simulate"):
        return getattr(import_module("ncollapse.ufm.simulation"), name)
    raise AttributeError(f"module 'ncollapse.ufm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
