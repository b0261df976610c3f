"""NC0 over steps in the unconstrained features model, with its prediction: the figure of `ncollapse theory`."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ncollapse.optimizer_table import TABLE
from ncollapse.plot import style

if TYPE_CHECKING:
    from ncollapse.ufm import Prediction

_DOTTED: dict[str, Any] = {
    "exact": {"color": style.INK, "lw": 1.0, "ls": ":"},
    "bound": {"color": style.QUIET, "lw": 1.0, "ls": (0, (1, 4))},
}
#: The axis ends at this share of the start: without noise, Adam goes on to the rounding errors of float64.
_SHOWN = 1e-10


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """NC0 under one optimizer: as simulated, at the recorded steps, and as predicted, over all steps."""

    optimizer: str
    coupling: float
    steps: NDArray[np.int64]  # [T]
    nc0: NDArray[np.float64]  # [T]
    prediction: "Prediction | None"


def nc0_over_steps(found: Sequence[Trajectory]) -> "style.Figure":
    """Draw NC0 of optimizers over steps, with its prediction: dotted in black if exact, in grey if a bound.

    Args:
        found: a trajectory per optimizer, all over the same steps, of `ncollapse.ufm.simulate` and `predict`.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("theory.png")`.

    Raises:
        ValueError: no trajectory.
        ModuleNotFoundError: no matplotlib.
    """
    if not found:
        raise ValueError("plot.nc0_over_steps: there is no trajectory to draw")
    with style.styled():
        figure, grid = style.panels(1, 1, (8.0, 4.8))
        axes: style.Axes = grid[0, 0]
        axes.set_xscale("log")
        style.scale(axes, "y", np.concatenate([one.nc0 for one in found]))
        for one in found:
            # Optimizers with the same theory have the same curve: the later one is narrower, so both are visible.
            width = TABLE[one.optimizer].theory_width
            axes.plot(one.steps[1:], one.nc0[1:], **style.line(one.optimizer, one.coupling) | {"lw": width})
        for one in found:
            if one.prediction is not None:
                axes.plot(one.steps[1:], one.prediction.nc0[one.steps[1:]], **_DOTTED[one.prediction.kind])
        axes.set_xlabel("step")
        axes.set_ylabel("NC0 = ‖Wᵀ1‖²")
        axes.set_xlim(1, int(found[0].steps[-1]))
        style.ticks(axes.xaxis, 1, float(found[0].steps[-1]))
        if axes.get_yscale() == "log":
            axes.set_ylim(bottom=max(axes.get_ylim()[0], _SHOWN * float(found[0].nc0[0])))
        style.legend_entries(axes, [(one.optimizer, one.coupling) for one in found])
        for kind, label in (("exact", "predicted"), ("bound", "upper bound")):
            axes.plot([], [], label=label, **_DOTTED[kind])
        style.one_legend(figure, axes, 6)
    return figure
