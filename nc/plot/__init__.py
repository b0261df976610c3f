"""Pictures of a result and of runs, a function each; the report shows the same. They need matplotlib, runs pandas too.

`geometry` and `simplex` draw the last layer of a result. The others draw runs: a DataFrame as
`ncollapse.train.load_runs` returns it, or one of yours with some of its columns, and for some a second one as
`load_metrics` returns it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncollapse.plot.block_lines import over_depth
    from ncollapse.plot.collapse_panels import geometry
    from ncollapse.plot.coupling_lines import over_coupling
    from ncollapse.plot.heat_panels import heat_map
    from ncollapse.plot.momentum_lines import over_momentum
    from ncollapse.plot.over_epochs import curves, phase
    from ncollapse.plot.run_panels import row_sum
    from ncollapse.plot.scatter_panels import metric_pairs, validation_accuracy
    from ncollapse.plot.step_lines import Trajectory, nc0_over_steps
    from ncollapse.plot.three_classes import simplex

__all__ = [
    "Trajectory", "curves", "geometry", "heat_map", "metric_pairs", "nc0_over_steps", "over_coupling",
    "over_depth", "over_momentum", "phase", "row_sum", "simplex", "validation_accuracy",
]  # fmt: skip

_MODULE_OF = {
    "Trajectory": "step_lines", "curves": "over_epochs", "geometry": "collapse_panels",
    "heat_map": "heat_panels", "metric_pairs": "scatter_panels", "nc0_over_steps": "step_lines",
    "over_coupling": "coupling_lines", "over_depth": "block_lines", "over_momentum": "momentum_lines",
    "phase": "over_epochs", "row_sum": "run_panels", "simplex": "three_classes",
    "validation_accuracy": "scatter_panels",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import ncollapse.plot` must stay quick, and pictures of a result need no pandas.
    if name in _MODULE_OF:
        return getattr(import_module(f"ncollapse.plot.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'ncollapse.plot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]
