"""Heat maps of the final metrics over weight decay and learning rate or momentum: a block of cells per optimizer."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ncollapse.formatting import short_number
from ncollapse.plot import style
from ncollapse.plot.frames import complete, ended
from ncollapse.plot.heat_cells import AXES, SHOWN, binned, cells_of
from ncollapse.plot.looks import look_of, shown
from ncollapse.plot.settings import tried
from ncollapse.plot.style import GROUND, INK, ON_DARK, ON_LIGHT, QUIET, Drawing

if TYPE_CHECKING:
    from ncollapse.plot.style import Axes, Figure

#: Rows of cells of all optimizers beyond which cells have no numbers: the figure would be longer than a page.
_NUMBERED_ROWS = 18
#: Inches: height of a cell with and without a number; gap below an optimizer with and without labels.
_CELL, _BARE, _GAP, _NARROW = 0.25, 0.17, 0.3, 0.1
#: Inches: above and below a column of maps, for its colour bar and for what the axes are; around and between columns.
_ABOVE, _BELOW, _RIGHT, _BETWEEN = 0.62, 0.35, 0.2, 0.2
#: Inches: width of a map with and without numbers; left margin, for the optimizers' names.
_WIDE, _SLIM, _LEFT = 2.95, 1.75, 1.25
#: Characters of a name that it has room for, and inches for each more.
_SHORT, _PER_LETTER = 9, 0.085
#: Points: the size of all text of a map, and the width of a letter. The page shows a figure of this width with at least
#: 608 pixels, so that a letter has eight of them also on a phone.
_TEXT, _LETTER = 8.0, 4.9


def heat_map(runs: pd.DataFrame, axis: str = "lr", *, threshold: float = 0.999) -> "Figure":
    """Draw final NC0–NC3 over weight decay and another setting: a map per metric, in it a block of cells per optimizer.

    A cell shows the smallest value of its settings that reached the threshold; a setting is its runs that differ only
    in the seed, and its value is their median. Cells where none reached it are hatched. Few cells also have their
    values as numbers.

    Args:
        runs: a row per run, as `ncollapse.train.load_runs` returns it. Needed: optimizer, weight_decay, `axis`, at
            least one of nc0, nc1, nc2, nc3. Used where they are there: the other settings and seed, which tell what a
            setting is; status and train_accuracy, for the threshold.
        axis: the vertical one, "lr" or "momentum".
        threshold: training accuracy that runs must reach to count.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("heat.png")`. `figure.get_label()` says what it
        shows.

    Raises:
        ValueError: another axis, a missing column, no run that has ended.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> plot.heat_map(load_runs("results"), "momentum", threshold=0.99).savefig("heat.png")
    """
    if axis not in AXES:
        raise ValueError(f"plot.heat_map: axis must be one of {', '.join(AXES)}; got {axis!r}")
    runs = complete("heat_map", runs, ("weight_decay", axis))
    if not set(SHOWN) & set(runs):
        raise ValueError(
            f"plot.heat_map: runs has none of the columns {', '.join(SHOWN)}; it has {', '.join(map(str, runs))}"
        )
    placed = ended(runs.dropna(subset=["weight_decay", axis]))
    if placed.empty:
        raise ValueError(
            f"plot.heat_map: none of the {len(runs)} runs has ended with a weight decay and a value of {axis}"
        )
    few, note = binned(placed, axis)
    cells = cells_of(few, axis, threshold)
    with shown(runs.optimizer):
        return draw_heat_map("heat_map", cells, axis, f"{100 * threshold:g} %", note).labelled()


def draw_heat_map(name: str, cells: pd.DataFrame, axis: str, threshold: str, note: str = "") -> Drawing:
    """Draw the cells that `cells_of` returns: a column of blocks per metric; the setting `axis` of `AXES` is vertical.

    Args:
        threshold: as text.
        note: the sentence of `binned`, for the caption.
    """
    blocks = [_Block(optimizer, cells[cells.optimizer == optimizer], axis) for optimizer in tried(cells)]
    measured = [metric for metric in SHOWN if metric in cells]
    metrics = [metric for metric in measured if cells[metric].notna().any()] or measured[:1]
    digits = _digits(blocks, cells[metrics].to_numpy())
    numbered = digits > 0
    cell = _CELL if numbered else _BARE
    bottom = 0.0  # of the current block; in cells, decreasing from the top down
    for block, below in zip(blocks, [*blocks[1:], None], strict=True):
        bottom -= len(block.rows)
        block.bottom = bottom
        block.labelled = below is None or list(below.decays) != list(block.decays)
        bottom -= (_GAP if block.labelled else _NARROW) / cell
    margin = _LEFT + _PER_LETTER * max(0, *(len(look_of(block.optimizer).label) - _SHORT for block in blocks))
    columns = min(len(metrics), 2 if numbered else len(SHOWN))
    rows = -(-len(metrics) // columns)
    wide = _WIDE if numbered else _SLIM
    size = (
        margin + columns * wide + (columns - 1) * _BETWEEN + _RIGHT,
        rows * (-bottom * cell - _GAP + _ABOVE) + (rows - 1) * _BETWEEN + _BELOW,
    )
    with style.styled():
        figure, grid = style.panels(
            rows, columns, size, margins=(margin, _RIGHT, _BELOW, _ABOVE),
            gaps=(_BETWEEN, _ABOVE + _BETWEEN), sharey=True,
        )  # fmt: skip
        for axes, metric in zip(grid.flat, metrics, strict=False):
            limits = _limits(cells[metric], cells.settings_reached > 0)
            axes.set_xlim(0, 1)
            axes.set_ylim(bottom + _GAP / cell, 0)
            for block in blocks:
                mesh = block.draw(axes, metric, limits, 72 * wide, digits)
            dots = np.concatenate([block.dots() for block in blocks], axis=1)
            axes.plot(*dots, "o", ms=2.6, mfc=ON_DARK, mec=ON_LIGHT, mew=0.4, zorder=4)
            axes.tick_params(length=0, labelcolor=INK, labelsize=_TEXT, labelbottom=False)
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            _colour_bar(figure, axes, mesh, metric, log="norm" in limits)
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        for first in grid[:, 0]:
            labels = [
                (block.bottom + i + 0.5, short_number(v, 3)) for block in blocks for i, v in enumerate(block.rows)
            ]
            first.set_yticks([at for at, _ in labels], [text for _, text in labels])
            left = (0.1 - margin) / wide
            for block in blocks:
                look = look_of(block.optimizer)
                bold: dict[str, Any] = {
                    "color": look.colour,
                    "weight": "bold",
                    "transform": first.get_yaxis_transform(),
                }
                first.text(left, block.bottom + len(block.rows) / 2, look.label, va="center", **bold)
        about = f"horizontal: weight decay λ; vertical: {AXES[axis]}"
        figure.text(margin / size[0], 0.1 / size[1], about, color=QUIET, fontsize=_TEXT)
    return Drawing(name, _caption(cells, axis, threshold, numbered=numbered) + note, figure)


def _caption(cells: pd.DataFrame, axis: str, threshold: str, *, numbered: bool) -> str:
    several = bool((cells.seeds > 1).any())
    smallest = f"A cell shows the smallest value of its runs that reached {threshold} training accuracy."
    all_of = "the smallest value of all runs that ended well"
    if several:
        smallest = (
            "A cell shows the median over the seeds, the smallest of its settings that "
            f"reached {threshold} training accuracy: those of which more than half of the seeds did."
        )
        all_of = "the smallest median over the seeds that ended well"
    if (several and (cells.settings > 1).any()) or (not several and (cells.reached > 1).any()):
        smallest += f" So it is the best of up to {cells.settings.max()}."
    left_out = "" if numbered else " Numbers are left out: there are too many cells for them to be read."
    return (
        f"Final metrics over weight decay λ (horizontal) and {AXES[axis]} (vertical), for each optimizer; darker is "
        f"closer to collapse. {smallest} Hatched: none reached it; {all_of} is shown. Dot: some of the cell's runs "
        f"missed it. Empty: no run ended well; all diverged, degenerated, were hopeless or failed.{left_out}"
    )


def _digits(blocks: "list[_Block]", values: "np.ndarray[Any, np.dtype[Any]]") -> int:
    """Return the significant digits of the numbers in cells, 3 or 2; 0 where they could not be read in all of them."""
    if sum(len(block.rows) for block in blocks) > _NUMBERED_ROWS:
        return 0
    narrowest = 72 * _WIDE / max(len(block.decays) for block in blocks)
    for digits in (3, 2):
        longest = max((len(short_number(value, digits)) for value in values.flat), default=0)
        if _LETTER * (longest + 1.5) <= narrowest:
            return digits
    return 0


def _limits(values: "pd.Series[float]", counted: "pd.Series[bool]") -> dict[str, Any]:
    """Return the range of colours, common to all optimizers; cells that are not counted matter only if none is."""
    finite = values[np.isfinite(values)]
    finite = finite[counted] if counted[finite.index].any() else finite
    if finite.empty:
        return {"vmin": 0.0, "vmax": 1.0}
    if style.spans_decades(finite):
        return {"norm": "log", "vmin": finite[finite > 0].min(), "vmax": finite.max()}
    low, high = finite.min(), finite.max()
    return {"vmin": low, "vmax": high if high > low else low + 1}


def _colour_bar(figure: "Figure", axes: "Axes", mesh: Any, metric: str, *, log: bool) -> None:
    """Draw the colour bar above a column of maps."""
    place, height = axes.get_position(), figure.get_figheight()
    place_above = (place.x0, place.y1 + 0.13 / height, place.width, 0.09 / height)
    bar = figure.colorbar(mesh, cax=figure.add_axes(place_above), location="top")
    assert bar.solids
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", length=0, labelsize=_TEXT, labelcolor=INK, pad=1)
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

    def draw(self, axes: "Axes", metric: str, limits: dict[str, Any], wide: float, digits: int) -> Any:
        """Draw colours, hatches, numbers and labels; return the mesh, which the colour bar needs.

        Args:
            wide: width of the map, in points.
            digits: of the numbers in cells; 0 for none.
        """
        edges = np.linspace(0, 1, len(self.decays) + 1), self.bottom + np.arange(len(self.rows) + 1)
        values = np.ma.masked_invalid(self._table(self.cells[metric]))
        if "norm" in limits:  # a logarithmic scale has no zero: show it as the smallest value
            values = np.ma.maximum(values, limits["vmin"])
        mesh = axes.pcolormesh(*edges, values, cmap="viridis", edgecolors=GROUND, linewidth=0.8, **limits)
        hatched = self.cells.settings_reached == 0
        missed = np.ma.masked_invalid(self._table(self.cells[metric].where(hatched)))
        if missed.count():
            axes.pcolor(*edges, missed, hatch="////", facecolor="none", edgecolor=ON_DARK, linewidth=0)
        x, y = (self.column + 0.5) / len(self.decays), self.bottom + self.row + 0.5
        for at_x, at_y, value, behind in zip(x, y, self.cells[metric], hatched, strict=True) if digits else ():
            if np.isfinite(value):
                cell = mesh.cmap(mesh.norm(max(value, limits["vmin"])))
                colour = ON_LIGHT if 0.21 * cell[0] + 0.72 * cell[1] + 0.07 * cell[2] > 0.45 else ON_DARK
                # The hatch ends before the number.
                box = {"facecolor": cell, "edgecolor": "none", "pad": 1.2} if behind else None
                centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": _TEXT, "color": colour}
                axes.text(at_x, at_y, short_number(value, digits), bbox=box, zorder=3, **centred)
        if self.labelled:
            texts = [short_number(decay, 3) for decay in self.decays]
            room = wide / len(texts) / _LETTER - 0.8
            every = -(-max(map(len, texts)) // max(int(room), 1))
            for i in range(0, len(texts), every):
                at = (i + 0.5) / len(texts), self.bottom - 0.15
                axes.text(*at, texts[i], ha="center", va="top", fontsize=_TEXT)
        return mesh

    def dots(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Return the positions of the dots in cells of which only some runs reached the threshold, `[2, n]`."""
        some = ((self.cells.settings_reached > 0) & (self.cells.missed > 0)).to_numpy()
        return np.stack([(self.column + 0.92) / len(self.decays), self.bottom + self.row + 0.8])[:, some]

    def _table(self, values: "pd.Series[float]") -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Return the values as `[rows, decays]`, NaN where there is no cell."""
        table = np.full((len(self.rows), len(self.decays)), np.nan)
        table[self.row, self.column] = values
        return table
