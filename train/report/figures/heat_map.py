"""Heat maps of the final metrics over weight decay and learning rate or momentum, an optimizer a row."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ncollapse.train.optimizers import LABELS
from ncollapse.train.report.figures.style import (
    COLOURS,
    GROUND,
    INK,
    ON_DARK,
    ON_LIGHT,
    QUIET,
    Drawing,
    panels,
    short,
    spans_decades,
    styled,
    ticks,
)
from ncollapse.train.report.tables.comparisons import NC
from ncollapse.train.report.tables.main import tried

if TYPE_CHECKING:
    from ncollapse.train.report.figures.style import Axes, Figure

#: Setting that a row of cells has -> how it is written.
AXES = {"lr": "learning rate", "momentum": "momentum β"}
#: Cells side by side beyond which there is no room for their numbers.
_NUMBERED = 5
#: Inches: height of a cell with and without a number, and between optimizers, with and without labels of their own.
_CELL, _BARE, _GAP, _NARROW = 0.25, 0.17, 0.3, 0.1
_LEFT = 1.25  # for the names


def heat_maps(slug: str, cells: pd.DataFrame, axis: str, threshold: str) -> Drawing:
    """The cells of `comparisons.cells` as a figure: a row of maps per optimizer, a column per metric."""
    blocks = [_Block(name, cells[cells.optimizer == name], axis) for name in tried(cells)]
    metrics = [name for name in NC if cells[name].notna().any()]
    cell = _CELL if all(len(block.across) <= _NUMBERED for block in blocks) else _BARE
    bottom = 0.0  # of a block, in cells, from the top down
    for block, below in zip(blocks, [*blocks[1:], None], strict=True):
        bottom -= len(block.up)
        block.bottom = bottom
        block.labelled = below is None or list(below.across) != list(block.across)
        bottom -= (_GAP if block.labelled else _NARROW) / cell
    size = (9.6, -bottom * cell + 0.97 - _GAP)
    with styled():
        figure, grid = panels(1, len(metrics), size, margins=(_LEFT, 0.1, 0.35, 0.62), gaps=(0.18, 0), sharey=True)
        for axes, metric in zip(grid[0], metrics, strict=True):
            limits = _limits(cells[metric], cells.reached > 0)
            axes.set_xlim(0, 1)
            axes.set_ylim(bottom + _GAP / cell, 0)
            for block in blocks:
                mesh = block.draw(axes, metric, limits)
            dots = np.concatenate([block.dots() for block in blocks], axis=1)
            axes.plot(*dots, ".", ms=3.5, color=ON_DARK)
            axes.tick_params(length=0, labelcolor=INK, labelsize=7.5, labelbottom=False)
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            _bar(figure, axes, mesh, metric, log="norm" in limits)
        first = grid[0, 0]
        rows = [(block.bottom + i + 0.5, short(v, 3)) for block in blocks for i, v in enumerate(block.up)]
        first.set_yticks([at for at, _ in rows], [text for _, text in rows])
        left = (0.1 - _LEFT) / (size[0] * first.get_position().width)
        for block in blocks:
            name = {"color": COLOURS[block.optimizer], "weight": "bold", "transform": first.get_yaxis_transform()}
            first.text(left, block.bottom + len(block.up) / 2, LABELS[block.optimizer], va="center", **name)
        about = f"across: weight decay λ; up: {AXES[axis]}"
        figure.text(_LEFT / size[0], 0.1 / size[1], about, color=QUIET, fontsize=8)
    caption = (
        f"Final metrics over weight decay λ (across) and {AXES[axis]} (up), for each optimizer; dark is closer to "
        f"collapse. A cell is the smallest value of its runs that reached {threshold} training accuracy. Hatched: none "
        "did, the smallest of all that ended well is shown. A dot: some of its runs missed it. Empty: none ended well."
    )
    return Drawing(f"heat-{axis}-{slug}", caption, figure)


def _limits(values: "pd.Series[float]", counted: "pd.Series[bool]") -> dict[str, Any]:
    """One scale of colours for all optimizers, of the cells with a run that reached the threshold if there are any."""
    finite = values[np.isfinite(values)]
    finite = finite[counted] if counted[finite.index].any() else finite
    if spans_decades(finite):
        return {"norm": "log", "vmin": finite[finite > 0].min(), "vmax": finite.max()}
    low, high = finite.min(), finite.max()
    return {"vmin": low, "vmax": high if high > low else low + 1}


def _bar(figure: "Figure", axes: "Axes", mesh: Any, metric: str, *, log: bool) -> None:
    """The scale of colours over a column."""
    place, height = axes.get_position(), figure.get_figheight()
    bar = figure.colorbar(
        mesh, cax=figure.add_axes((place.x0, place.y1 + 0.13 / height, place.width, 0.09 / height)), location="top"
    )
    assert bar.solids
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0, labelsize=7.5, labelcolor=INK, pad=1)
    if log:
        ticks(bar.ax.xaxis, mesh.norm.vmin, mesh.norm.vmax)
        bar.ax.locator_params(axis="x", numticks=5)
    else:
        bar.ax.locator_params(axis="x", nbins=4)
    bar.ax.set_title(metric.upper(), pad=13)


class _Block:
    """The cells of an optimizer: unit squares up from `bottom`, over a width of 1."""

    def __init__(self, optimizer: str, cells: pd.DataFrame, axis: str) -> None:
        self.optimizer, self.cells = optimizer, cells
        self.across, self.up = np.sort(cells.weight_decay.unique()), np.sort(cells[axis].unique())
        self.column = np.searchsorted(self.across, cells.weight_decay)
        self.row = np.searchsorted(self.up, cells[axis])
        self.bottom, self.labelled = 0.0, True

    def draw(self, axes: "Axes", metric: str, limits: dict[str, Any]) -> Any:
        """Colours, marks and numbers; returns what the scale of colours is drawn from."""
        edges = np.linspace(0, 1, len(self.across) + 1), self.bottom + np.arange(len(self.up) + 1)
        shown = np.ma.masked_invalid(self._table(self.cells[metric]))
        if "norm" in limits:  # logarithmic; a zero is as dark as it gets
            shown = np.ma.maximum(shown, limits["vmin"])
        mesh = axes.pcolormesh(*edges, shown, cmap="viridis", edgecolors=GROUND, linewidth=0.8, **limits)
        missed = np.ma.masked_invalid(self._table(self.cells[metric].where(self.cells.reached == 0)))
        if missed.count():
            axes.pcolor(*edges, missed, hatch="////", facecolor="none", edgecolor=ON_DARK, linewidth=0)
        x, y = (self.column + 0.5) / len(self.across), self.bottom + self.row + 0.5
        if len(self.across) <= _NUMBERED:
            for at_x, at_y, value in zip(x, y, self.cells[metric], strict=True):
                if np.isfinite(value):
                    red, green, blue, _ = mesh.cmap(mesh.norm(max(value, limits["vmin"])))
                    colour = ON_LIGHT if 0.21 * red + 0.72 * green + 0.07 * blue > 0.45 else ON_DARK
                    axes.text(at_x, at_y, short(value), ha="center", va="center", fontsize=6.5, color=colour)
        for i, decay in enumerate(self.across if self.labelled else ()):
            at = (i + 0.5) / len(self.across), self.bottom - 0.15
            axes.text(*at, short(decay, 3), ha="center", va="top", fontsize=7.5)
        return mesh

    def dots(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Where cells are marked that some runs missed the threshold in, `[2, n]`."""
        some = ((self.cells.reached > 0) & (self.cells.missed > 0)).to_numpy()
        return np.stack([(self.column + 0.9) / len(self.across), self.bottom + self.row + 0.78])[:, some]

    def _table(self, values: "pd.Series[float]") -> "np.ndarray[Any, np.dtype[np.float64]]":
        table = np.full((len(self.up), len(self.across)), np.nan)
        table[self.row, self.column] = values
        return table
