"""Heat maps of the final metrics over weight decay and learning rate or momentum, a row per optimizer."""

from typing import Any

import numpy as np
import pandas as pd

from ncollapse.formatting import short_number
from ncollapse.plot import style
from ncollapse.plot.looks import look_of
from ncollapse.plot.settings import in_order, tried
from ncollapse.plot.style import GROUND, INK, ON_DARK, ON_LIGHT, QUIET
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.results.schema import FINISHED

#: Setting on the vertical axis -> its name in texts.
AXES = {"lr": "learning rate", "momentum": "momentum β"}
#: Weight decays beyond which cells are too narrow for their numbers, and cells beyond which nobody reads them.
_NUMBERED, _NUMBERED_CELLS = 5, 400
#: Values of a setting that a map tells apart, and rows of all maps together; neighbouring values share a row beyond.
_MOST_VALUES, _MOST_ROWS = 25, 150
#: Inches: height of a cell with and without a number; gap below an optimizer with and without labels.
_CELL, _BARE, _GAP, _NARROW = 0.25, 0.17, 0.3, 0.1
#: Inches: left margin, for the optimizers' names.
_LEFT = 1.25
#: Characters of a name that it has room for, and inches for each more.
_SHORT, _PER_LETTER = 9, 0.085


def cells(runs: pd.DataFrame, axis: str, selection: Selection) -> pd.DataFrame:
    """Return final metrics over weight decay and the setting `axis`: a row per optimizer and cell with a finished run.

    The value of a cell is the smallest of its runs that reached the threshold; where none did, of all its runs that
    ended well. Columns: optimizer, weight_decay, `axis`, done, reached, missed (counts), NC0–NC3.
    """
    runs = runs[runs.status.isin(FINISHED)]
    done = runs.status == "done"
    reached = runs.id.isin(selection.eligible(runs).id)
    keys = ["optimizer", "weight_decay", axis]
    groups = runs.assign(done=done, reached=reached, missed=~reached).groupby(keys)
    frame = groups[["done", "reached", "missed"]].sum()
    best = runs[reached].groupby(keys)[list(NC)].min()
    others = runs[done].groupby(keys)[list(NC)].min()
    frame[list(NC)] = best.reindex(frame.index).where(frame.reached > 0, others.reindex(frame.index))
    return in_order(frame.reset_index())


def binned(runs: pd.DataFrame, axis: str) -> tuple[pd.DataFrame, str]:
    """Return the runs with so few weight decays and values of `axis` as maps can show, and a sentence that says so.

    Neighbouring values of an optimizer share the smallest of them; the sentence is empty where all values are few.
    """
    most = {"weight_decay": _MOST_VALUES, axis: max(4, min(_MOST_VALUES, _MOST_ROWS // runs.optimizer.nunique()))}
    largest = 0
    runs = runs.copy()
    for _, group in runs.groupby("optimizer"):
        for name, count in most.items():
            values = np.sort(group[name].unique())
            if len(values) > count:
                firsts = np.arange(len(values)) * count // len(values)  # of each value, its bin
                starts = np.searchsorted(firsts, np.arange(count))
                shared = values[starts][firsts]
                runs.loc[group.index, name] = shared[np.searchsorted(values, group[name])]
                largest = max(largest, int(np.bincount(firsts).max()))
    if not largest:
        return runs, ""
    return runs, (
        f" There are too many values to tell apart: up to {largest} neighbouring ones share a row or a column, which "
        "is labelled with the smallest; the table has them all."
    )


def heat_maps(slug: str, frame: pd.DataFrame, axis: str, threshold: str, note: str = "") -> style.Drawing:
    """Draw `cells`: a row of maps per optimizer, a column per metric; the setting `axis` of `AXES` is vertical.

    `note` is the sentence of `binned`, for the caption.
    """
    blocks = [_Block(name, frame[frame.optimizer == name], axis) for name in tried(frame)]
    metrics = [name for name in NC if frame[name].notna().any()]
    numbered = len(frame) <= _NUMBERED_CELLS and all(len(block.decays) <= _NUMBERED for block in blocks)
    cell = _CELL if numbered else _BARE
    bottom = 0.0  # of the current block; in cells, decreasing from the top down
    for block, below in zip(blocks, [*blocks[1:], None], strict=True):
        bottom -= len(block.rows)
        block.bottom = bottom
        block.labelled = below is None or list(below.decays) != list(block.decays)
        bottom -= (_GAP if block.labelled else _NARROW) / cell
    margin = _LEFT + _PER_LETTER * max(0, *(len(look_of(block.optimizer).label) - _SHORT for block in blocks))
    size = (8.35 + margin, -bottom * cell + 0.97 - _GAP)
    with style.styled():
        figure, grid = style.panels(
            1, len(metrics), size, margins=(margin, 0.1, 0.35, 0.62), gaps=(0.18, 0), sharey=True
        )
        for axes, metric in zip(grid[0], metrics, strict=True):
            limits = _limits(frame[metric], frame.reached > 0)
            axes.set_xlim(0, 1)
            axes.set_ylim(bottom + _GAP / cell, 0)
            for block in blocks:
                mesh = block.draw(axes, metric, limits, numbered=numbered)
            dots = np.concatenate([block.dots() for block in blocks], axis=1)
            axes.plot(*dots, ".", ms=3.5, color=ON_DARK)
            axes.tick_params(length=0, labelcolor=INK, labelsize=7.5, labelbottom=False)
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            _colour_bar(figure, axes, mesh, metric, log="norm" in limits)
        first = grid[0, 0]
        rows = [(block.bottom + i + 0.5, short_number(v, 3)) for block in blocks for i, v in enumerate(block.rows)]
        first.set_yticks([at for at, _ in rows], [text for _, text in rows])
        left = (0.1 - margin) / (size[0] * first.get_position().width)
        for block in blocks:
            look = look_of(block.optimizer)
            name = {"color": look.colour, "weight": "bold", "transform": first.get_yaxis_transform()}
            first.text(left, block.bottom + len(block.rows) / 2, look.label, va="center", **name)
        about = f"horizontal: weight decay λ; vertical: {AXES[axis]}"
        figure.text(margin / size[0], 0.1 / size[1], about, color=QUIET, fontsize=8)
    caption = (
        f"Final metrics over weight decay λ (horizontal) and {AXES[axis]} (vertical), for each optimizer; darker is "
        f"closer to collapse. A cell shows the smallest value of its runs that reached {threshold} training accuracy. "
        "Hatched: no run reached it; the smallest value of all runs that ended well is shown. Dot: some of the cell's "
        f"runs missed it. Empty: no run ended well; all diverged, degenerated, were hopeless or failed.{note}"
    )
    return style.Drawing(f"heat-{axis}-{slug}", caption, figure)


def _limits(values: "pd.Series[float]", counted: "pd.Series[bool]") -> dict[str, Any]:
    """Return the range of colours, common to all optimizers; cells that are not counted matter only if none is."""
    finite = values[np.isfinite(values)]
    finite = finite[counted] if counted[finite.index].any() else finite
    if style.spans_decades(finite):
        return {"norm": "log", "vmin": finite[finite > 0].min(), "vmax": finite.max()}
    low, high = finite.min(), finite.max()
    return {"vmin": low, "vmax": high if high > low else low + 1}


def _colour_bar(figure: "style.Figure", axes: "style.Axes", mesh: Any, metric: str, *, log: bool) -> None:
    """Draw the colour bar above a column of maps."""
    place, height = axes.get_position(), figure.get_figheight()
    place_above = (place.x0, place.y1 + 0.13 / height, place.width, 0.09 / height)
    bar = figure.colorbar(mesh, cax=figure.add_axes(place_above), location="top")
    assert bar.solids
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0, labelsize=7.5, labelcolor=INK, pad=1)
    if log:
        style.ticks(bar.ax.xaxis, mesh.norm.vmin, mesh.norm.vmax)
        bar.ax.locator_params(axis="x", numticks=5)
    else:
        bar.ax.locator_params(axis="x", nbins=4)
    bar.ax.set_title(metric.upper(), pad=13)


class _Block:
    """The cells of an optimizer: the block is 1 wide, and each row of cells 1 high, upwards from `bottom`.

    `decays` and `rows` are the values of weight decay and of the other setting, in order.
    """

    def __init__(self, optimizer: str, cells: pd.DataFrame, axis: str) -> None:
        self.optimizer, self.cells = optimizer, cells
        self.decays, self.rows = np.sort(cells.weight_decay.unique()), np.sort(cells[axis].unique())
        self.column = np.searchsorted(self.decays, cells.weight_decay)
        self.row = np.searchsorted(self.rows, cells[axis])
        self.bottom = 0.0
        self.labelled = True  # whether the weight decays are written below

    def draw(self, axes: "style.Axes", metric: str, limits: dict[str, Any], *, numbered: bool) -> Any:
        """Draw colours, hatches, numbers and labels; return the mesh, which the colour bar needs."""
        edges = np.linspace(0, 1, len(self.decays) + 1), self.bottom + np.arange(len(self.rows) + 1)
        shown = np.ma.masked_invalid(self._table(self.cells[metric]))
        if "norm" in limits:  # a logarithmic scale has no zero: show it as the smallest value
            shown = np.ma.maximum(shown, limits["vmin"])
        mesh = axes.pcolormesh(*edges, shown, cmap="viridis", edgecolors=GROUND, linewidth=0.8, **limits)
        missed = np.ma.masked_invalid(self._table(self.cells[metric].where(self.cells.reached == 0)))
        if missed.count():
            axes.pcolor(*edges, missed, hatch="////", facecolor="none", edgecolor=ON_DARK, linewidth=0)
        x, y = (self.column + 0.5) / len(self.decays), self.bottom + self.row + 0.5
        if numbered:
            for at_x, at_y, value in zip(x, y, self.cells[metric], strict=True):
                if np.isfinite(value):
                    red, green, blue, _ = mesh.cmap(mesh.norm(max(value, limits["vmin"])))
                    colour = ON_LIGHT if 0.21 * red + 0.72 * green + 0.07 * blue > 0.45 else ON_DARK
                    axes.text(at_x, at_y, short_number(value), ha="center", va="center", fontsize=6.5, color=colour)
        for i, decay in enumerate(self.decays if self.labelled else ()):
            at = (i + 0.5) / len(self.decays), self.bottom - 0.15
            axes.text(*at, short_number(decay, 3), ha="center", va="top", fontsize=7.5)
        return mesh

    def dots(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Return the positions of the dots in cells of which only some runs reached the threshold, `[2, n]`."""
        some = ((self.cells.reached > 0) & (self.cells.missed > 0)).to_numpy()
        return np.stack([(self.column + 0.9) / len(self.decays), self.bottom + self.row + 0.78])[:, some]

    def _table(self, values: "pd.Series[float]") -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Return the values as `[rows, decays]`, NaN where there is no cell."""
        table = np.full((len(self.rows), len(self.decays)), np.nan)
        table[self.row, self.column] = values
        return table
