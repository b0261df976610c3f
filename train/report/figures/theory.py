"""NC0 over steps in the unconstrained features model, with its prediction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ncollapse.train.optimizers import TABLE
from ncollapse.train.report.figures.style import (
    INK,
    QUIET,
    line,
    lines_legend,
    one_legend,
    panels,
    scale,
    styled,
    ticks,
)
from ncollapse.train.report.tables.trajectory import Trajectory

if TYPE_CHECKING:
    from ncollapse.train.report.figures.style import Axes, Figure

_DOTTED: dict[str, Any] = {
    "exact": {"color": INK, "lw": 1.0, "ls": ":"},
    "bound": {"color": QUIET, "lw": 1.0, "ls": (0, (1, 4))},
}
#: The axis ends at this share of the start: without noise, Adam goes on to the rounding errors of float64.
_SHOWN = 1e-10


def nc0_over_steps(found: Sequence[Trajectory]) -> "Figure":
    """Draw NC0 of every optimizer over steps, with its prediction: dotted in black if exact, in grey if a bound."""
    with styled():
        figure, grid = panels(1, 1, (8.0, 4.8))
        axes: Axes = grid[0, 0]
        axes.set_xscale("log")
        scale(axes, "y", np.concatenate([one.nc0 for one in found]))
        for one in found:
            # Optimizers with the same theory have the same curve: the later one is narrower, so both are visible.
            width = TABLE[one.optimizer].theory_width
            axes.plot(one.steps[1:], one.nc0[1:], **line(one.optimizer, one.coupling) | {"lw": width})
        for one in found:
            if one.prediction is not None:
                axes.plot(one.steps[1:], one.prediction.nc0[one.steps[1:]], **_DOTTED[one.prediction.kind])
        axes.set_xlabel("step")
        axes.set_ylabel("NC0 = ‖Wᵀ1‖²")
        axes.set_xlim(1, int(found[0].steps[-1]))
        ticks(axes.xaxis, 1, float(found[0].steps[-1]))
        if axes.get_yscale() == "log":
            axes.set_ylim(bottom=max(axes.get_ylim()[0], _SHOWN * float(found[0].nc0[0])))
        lines_legend(axes, [(one.optimizer, one.coupling) for one in found])
        for kind, label in (("exact", "predicted"), ("bound", "upper bound")):
            axes.plot([], [], label=label, **_DOTTED[kind])
        one_legend(figure, axes, 6)
    return figure
