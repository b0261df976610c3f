"""The figures of the report. matplotlib is imported here alone, inside functions."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nc.train.config import OPTIMIZERS
from nc.train.report.selection import Selection
from nc.train.report.tables import best_runs, predicted_nc0

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: One colour per optimizer (Okabe & Ito's palette, safe for the colour-blind); decoupled decay is dashed.
COLOURS = {
    "sgd": "#0072B2",
    "sgdw": "#56B4E9",
    "signum": "#009E73",
    "signumw": "#CC79A7",
    "adam": "#D55E00",
    "adamw": "#E69F00",
}
LABELS = dict(zip(OPTIMIZERS, ("SGD", "SGDW", "Signum", "SignumW", "Adam", "AdamW"), strict=True))

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


def _line(optimizer: str) -> dict[str, Any]:
    return {"color": COLOURS[optimizer], "linestyle": "--" if optimizer.endswith("w") else "-"}


def _axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> "tuple[Figure, np.ndarray[Any, Any]]":
    # The object interface draws off screen whatever backend the user's matplotlib is set to.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def nc0_over_epochs(runs: pd.DataFrame, metrics: pd.DataFrame, selection: Selection) -> "Figure":
    """NC0 over epochs of each optimizer's best run, with the exact prediction for SGD and SGDW."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, grid = _axes(1, 1, (7.6, 4.4))
        axes: Axes = grid[0, 0]
        ends: list[tuple[float, str]] = []
        predicted = False
        for _, run in best_runs(runs, selection).iterrows():
            history = metrics[metrics.run == run["id"]]
            name = str(run.optimizer)
            axes.plot(history.epoch, history.nc0, **_line(name))
            ends.append((float(history.nc0.iloc[-1]), name))
            prediction = predicted_nc0(run)
            if prediction is not None:
                # At evaluated epochs, where the line is measured and not drawn through.
                at = history.epoch.to_numpy()[:: max(1, len(history) // 14)]
                axes.plot(at, prediction[at], "o", mfc="white", mec=COLOURS[name], ms=4.5)
                predicted = True
        axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel("NC0 = ‖Wᵀ1‖²")
        axes.margins(x=0)
        axes.set_xlim(right=float(runs.epochs.max()) * 1.005)
        if predicted:
            axes.plot([], [], "o", mfc="white", mec="#555555", ms=4.5, label="exact prediction (SGD, SGDW)")
        axes.plot([], [], "-", color="#555555", label="coupled weight decay")
        axes.plot([], [], "--", color="#555555", label="decoupled weight decay")
        figure.legend(loc="outside upper left", fontsize=9, ncols=3)
        _label_ends(axes, ends)
    return figure


def _label_ends(axes: "Axes", ends: list[tuple[float, str]]) -> None:
    """Names at the right end of the lines, pushed apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    positive = sorted((value, name) for value, name in ends if value > 0)
    heights = [float(to_axes.transform((0, value))[1]) for value, _ in positive]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + 0.055)
    for height, (_, name) in zip(heights, positive, strict=True):
        axes.text(1.01, height, LABELS[name], color=COLOURS[name], transform=axes.transAxes, va="center", weight="bold")


def metrics_over_decay(runs: pd.DataFrame, selection: Selection) -> "Figure":
    """Final NC0–NC3 over weight decay: every run a dot, the median of the eligible ones a line."""
    import matplotlib as mpl

    eligible = selection.eligible(runs)
    decays = np.sort(runs.weight_decay.unique())
    present = [name for name in OPTIMIZERS if name in set(runs.optimizer)]
    place = {decay: i for i, decay in enumerate(decays)}  # evenly spaced: decays span decades, and may be 0
    with mpl.rc_context(_STYLE):
        figure, grid = _axes(2, 2, (9.6, 6.6), sharex=True)
        for axes, metric in zip(grid.flat, ("nc0", "nc1", "nc2", "nc3"), strict=True):
            for k, name in enumerate(present):
                offset = (k - (len(present) - 1) / 2) * 0.07
                mine = runs[(runs.optimizer == name) & (runs.status == "done")]
                counted = mine.id.isin(eligible.id)
                for part, face in ((mine[~counted], "none"), (mine[counted], COLOURS[name])):
                    x = part.weight_decay.map(place) + offset
                    axes.scatter(x, part[metric], s=16, facecolors=face, edgecolors=COLOURS[name], alpha=0.55, lw=1)
                median = mine[counted].groupby("weight_decay")[metric].median()
                axes.plot([place[d] + offset for d in median.index], median, **_line(name), label=LABELS[name])
            shown = runs[metric][runs[metric] > 0]
            if len(shown) and shown.max() > 30 * shown.min():
                axes.set_yscale("log")
            axes.set_title(metric.upper(), loc="left", weight="bold")
        start = float(runs.nc0_start.median())
        if start > 0:
            grid[0, 0].axhline(start, color="#888888", lw=1, ls=":")
            at = {"xy": (1.01, start), "xycoords": ("axes fraction", "data")}
            grid[0, 0].annotate("start", **at, va="center", color="#666666", fontsize=9)
        for axes in grid[1]:
            axes.set_xticks(range(len(decays)), [f"{d:g}" for d in decays])
            axes.set_xlabel("weight decay λ")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(present))
    return figure
