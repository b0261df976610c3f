"""What all figures share: palette, style, axes, legends, PNG and SVG. The only module that imports matplotlib."""

import dataclasses
import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ncollapse.formatting import superscript
from ncollapse.plot.looks import look_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    __all__ = ["Axes", "Axis", "Figure"]  # types for the files that draw, which do not import matplotlib

#: Text, axes and notes, grid lines, background. The page replaces them by CSS variables.
INK, QUIET, GRID, GROUND = "#1b1b1b", "#5b6066", "#e4e6e8", "#fdfdfd"
#: Numbers and marks on dark and on light cells. The page keeps them, since the cells' colours stay the same.
ON_DARK, ON_LIGHT = "#ffffff", "#101010"

#: Points in axes beyond which those that cover each other are not all drawn, and fields of the grid for it, each way.
_MOST_POINTS, _FIELDS = 5_000, 120
#: Inches of an entry of a legend: without its label, and for each of its letters.
_ENTRY, _PER_LETTER = 0.55, 0.073

STYLE: Any = {
    "font.size": 9, "text.color": INK, "text.parse_math": False, "figure.facecolor": "white",
    "axes.facecolor": "none", "axes.labelcolor": INK, "axes.edgecolor": QUIET, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titley": 1.0,  # otherwise matplotlib measures the surroundings of every title to place it
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "xtick.color": QUIET, "ytick.color": QUIET, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "lines.linewidth": 1.8, "lines.markersize": 4.5, "legend.frameon": False, "legend.fontsize": 9,
    "hatch.color": ON_DARK, "hatch.linewidth": 0.6, "svg.fonttype": "none", "svg.hashsalt": "ncollapse",
}  # fmt: skip


@dataclasses.dataclass
class Drawing:
    """A figure with its caption; `name` is the stem of its files."""

    name: str
    caption: str
    figure: "Figure"
    runs: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Id of a group of points in the SVG -> the run of each point, in the order in which they are drawn."""

    left_out: int = 0
    """Number of points that are not drawn, since another one of their group covers them."""

    def points(self, axes: "Axes", groups: "Iterable[tuple[Any, Any, Iterable[str], dict[str, Any]]]") -> None:
        """Draw points into axes: groups of x, y, the run of each point, and the style that the group has in common.

        Points that are not finite, or not positive on a logarithmic axis, are left out. Of more than `_MOST_POINTS`,
        each group has one in every field of a fine grid.
        """
        scales = axes.get_xscale(), axes.get_yscale()
        found = []
        for x, y, runs, look in groups:
            at = np.asarray([x, y], dtype=float)
            shown = np.isfinite(at).all(0)
            for values, scale in zip(at, scales, strict=True):
                shown &= (values > 0) | (scale != "log")
            found.append((at[:, shown], np.asarray(list(runs), dtype=object)[shown], look))
        every = np.concatenate([at for at, _, _ in found] or [np.empty((2, 0))], axis=1)
        for at, runs, look in found:
            kept = _first_of_fields(at, every, scales) if every.shape[1] > _MOST_POINTS else slice(None)
            drawn = at[:, kept]
            self.left_out += at.shape[1] - drawn.shape[1]
            if drawn.size:
                group = f"runs-{len(self.runs)}"
                self.runs[group] = list(runs[kept])
                axes.plot(*drawn, linestyle="", gid=group, **look)

    def labelled(self) -> "Figure":
        """Return the figure with its caption as its label, for `get_label`."""
        self.figure.set_label(self.caption)
        return self.figure

    @property
    def note(self) -> str:
        """A sentence on the points that are not drawn, for the caption; empty where all are."""
        if not self.left_out:
            return ""
        return f" {self.left_out:,} points are not drawn, since one of the same kind is drawn in the same place."


def _first_of_fields(at: Any, every: Any, scales: tuple[str, str]) -> Any:
    """Return the indices, ascending, of the first point in each field of a grid over the points `every`, `[2, n]`."""
    fields = np.zeros(at.shape[1], dtype=np.int64)
    for values, others, scale in zip(at, every, scales, strict=True):
        place = np.log if scale == "log" else np.asarray
        low, high = place(others.min()), place(others.max())
        fields *= _FIELDS
        fields += np.minimum((place(values) - low) / max(high - low, 1e-300) * _FIELDS, _FIELDS - 1).astype(np.int64)
    return np.sort(np.unique(fields, return_index=True)[1])


def styled() -> Any:
    """Return the context in which figures are made and saved."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def panels(
    rows: int, columns: int, size: tuple[float, float], *,
    margins: tuple[float, float, float, float] = (0.65, 0.15, 0.5, 0.3), gaps: tuple[float, float] = (0.55, 0.45),
    **options: Any,
) -> "tuple[Figure, np.ndarray[Any, np.dtype[Any]]]":  # fmt: skip
    """Return an empty figure, and its axes as an array `[rows, columns]`. Lengths are in inches.

    Margins (left, right, bottom, top) and gaps (horizontal, vertical) are given, because measuring labels and titles,
    as matplotlib's layouts do, takes as long as drawing them. `one_legend` adds its own height to the top.
    """
    # The object interface draws off screen, whatever backend the user has configured.
    from matplotlib.figure import Figure

    (width, height), (left, right, bottom, top) = size, margins
    figure = Figure(figsize=size)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=gaps[0] * columns / (width - left - right - gaps[0] * (columns - 1)),
        hspace=gaps[1] * rows / (height - top - bottom - gaps[1] * (rows - 1)),
    )  # fmt: skip
    return figure, grid


def encode(figure: "Figure") -> tuple[bytes, str]:
    """Return the figure as the bytes of a PNG file and the text of an SVG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    image, vectors = io.BytesIO(), io.StringIO()
    # `savefig` would draw everything twice.
    with styled():
        figure.set_dpi(160)
        FigureCanvasAgg(figure).print_png(image, pil_kwargs={"compress_level": 4})
        FigureCanvasSVG(figure).print_svg(vectors, metadata={"Date": None, "Creator": None})
    return image.getvalue(), vectors.getvalue()


def line(optimizer: str, coupling: float) -> dict[str, Any]:
    """Return the style of a line: the family's colour; solid where decay is coupled, even in part, dashed where not.

    It is dash-dotted for an optimizer that is not ncollapse's.
    """
    look = look_of(optimizer)
    kind = (0, (6, 1.5, 1.2, 1.5)) if look.foreign else "-" if coupling > 0 else (0, (3.2, 1.6))
    return {"color": look.colour, "linestyle": kind}


def run_lines(axes: "Axes", best: "pd.DataFrame", rows: "pd.DataFrame", x: str, y: str, **options: Any) -> None:
    """Draw a line per run: the column `y` of its rows over their column `x`."""
    for _, run in best.iterrows():
        shown = rows[rows.run == run["id"]].dropna(subset=[y])
        axes.plot(shown[x], shown[y], **line(run.optimizer, run.coupling), **options)


def medians(
    axes: "Axes", rows: "pd.DataFrame", x: str, y: str, places: "np.ndarray[Any, Any] | None" = None, *, band: bool
) -> None:
    """Draw the median of `y` over `x`, a line per optimizer with and without coupled decay.

    Args:
        places: draw the values of `x` at their index in this array, which is sorted.
        band: also draw the range from the 10th to the 90th percentile.
    """
    for (optimizer, coupled), part in rows.groupby(["optimizer", rows.coupling > 0]):
        found = part.groupby(x)[y].quantile(np.array([0.1, 0.5, 0.9])).unstack()
        at = found.index if places is None else np.searchsorted(places, found.index)
        axes.plot(at, found[0.5], **line(str(optimizer), float(bool(coupled))))
        if band:
            axes.fill_between(at, found[0.1], found[0.9], color=look_of(str(optimizer)).colour, alpha=0.12, linewidth=0)


def marker(optimizer: str, coupling: float, *, reached: bool) -> dict[str, Any]:
    """Return the style of a point: a disc where decay is coupled, otherwise a diamond; hollow below the threshold.

    It is a triangle for an optimizer that is not ncollapse's.
    """
    look = look_of(optimizer)
    colour = look.colour
    shape = {"marker": "o", "markersize": 4.5} if coupling > 0 else {"marker": "D", "markersize": 4.0}
    if look.foreign:
        shape = {"marker": "^", "markersize": 5.0}
    return shape | {"mec": colour, "mfc": colour if reached else GROUND, "mew": 0.8, "alpha": 0.75 if reached else 0.6}


#: Metrics that are shares, whose axes are in percent.
PERCENT = ("train_error", "train_accuracy", "val_accuracy", "nc4")
_TITLES = {
    "train_loss": "training loss", "val_loss": "validation loss", "train_error": "training error, %", "nc4": "NC4, %",
    "train_accuracy": "training accuracy, %", "val_accuracy": "validation accuracy, %",
}  # fmt: skip


def title_of(metric: str) -> str:
    """Return how a panel or an axis names a metric; one of the user's by its name."""
    return _TITLES.get(metric, metric.upper() if metric in ("nc0", "nc1", "nc2", "nc3") else metric)


def factor_of(metric: str) -> int:
    """Return what the values of a metric are multiplied by for its axis."""
    return 100 if metric in PERCENT else 1


def spans_decades(values: Any) -> bool:
    """Return whether values need a logarithmic axis: none is negative, and the positive ones span a decade."""
    positive = _positive(values)
    return bool(len(positive) and positive.max() > 10 * positive.min() and not _negative(values))


def scale(axes: "Axes", which: str, values: Any) -> None:
    """Make an axis, "x" or "y", logarithmic if its values span decades."""
    if spans_decades(values):
        positive = _positive(values)
        getattr(axes, f"set_{which}scale")("log")
        ticks(getattr(axes, f"{which}axis"), float(positive.min()), float(positive.max()))


def _positive(values: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return the finite positive values."""
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array) & (array > 0)]


def _negative(values: Any) -> bool:
    """Return whether a finite value is negative, and so would not be on a logarithmic axis."""
    array = np.asarray(values, dtype=float)
    return bool((np.isfinite(array) & (array < 0)).any())


def epochs_below(axes: "Axes", *, labelled: bool = True) -> None:
    """Make epochs of the horizontal axis, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    if labelled:
        axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def ticks(axis: "Axis", low: float, high: float) -> None:
    """Set the ticks of a logarithmic axis: powers of ten, also 2 and 5 times them where there are few."""
    from matplotlib.ticker import LogLocator, NullLocator

    few = high < 300 * low
    axis.set_major_formatter(_plain if low >= 1e-3 and high < 1e5 else _power_of_ten)
    axis.set_minor_locator(LogLocator(subs=(2.0, 5.0)) if few else NullLocator())
    if few:
        axis.set_minor_formatter(_plain)


def _plain(value: float, _: float) -> str:
    return f"{value:.6g}"


def _power_of_ten(value: float, _: float) -> str:
    # matplotlib's own mathematics would take more time than the rest of a figure.
    return f"10{superscript(round(math.log10(value)))}" if value > 0 else f"{value:.6g}"


def legend_entries(
    axes: "Axes", optimizers: Iterable[tuple[str, float]], *, points: bool = False, hollow: str = ""
) -> None:
    """Add an entry per optimizer and coupling, as a point or as a line, and one that says what hollow circles mean."""
    for optimizer, coupling in optimizers:
        point = marker(optimizer, coupling, reached=True) | {"linestyle": "", "alpha": 1}
        axes.plot([], [], label=look_of(optimizer).label, **(point if points else line(optimizer, coupling)))
    if hollow:
        axes.plot([], [], "o", mfc=GROUND, mec=QUIET, label=hollow)


def one_legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Draw one legend above the whole figure, with the labelled entries of one of its axes, in so many columns at most.

    Names of the user's are long: there are as many columns as fit.
    """
    handles, labels = axes.get_legend_handles_labels()
    height, width = figure.get_figheight(), figure.get_figwidth()
    sizes = [_ENTRY + _PER_LETTER * len(label) for label in labels]
    # As matplotlib divides them.
    wide = {n: sum(max(part) for part in np.array_split(sizes, n) if len(part)) for n in range(1, columns + 1)}
    columns = max((n for n in wide if wide[n] <= width), default=1)
    figure.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.01, 1 - 0.03 / height), borderaxespad=0,
        ncols=columns, columnspacing=1.4, handlelength=2.2,
    )  # fmt: skip
    rows = -(-len(labels) // columns)
    figure.subplots_adjust(top=figure.subplotpars.top - (0.2 * rows + 0.12) / height)
