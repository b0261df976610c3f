"""What all figures share: palette, style, axes, PNG and SVG. matplotlib is imported here alone, inside functions."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ncollapse.train.optimizers import LABELS, TABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    __all__ = ["Axes", "Axis", "Figure"]  # types for the files that draw, which import no matplotlib of their own

#: Optimizer -> colour, one per family; to name a colour needs no matplotlib.
COLOURS = {name: row.colour for name, row in TABLE.items()}
#: Text and axes, what is said aside, the lines of the grid, the ground: the page has its own for light and dark.
INK, QUIET, GRID, GROUND = "#1b1b1b", "#5b6066", "#e4e6e8", "#fdfdfd"
#: Numbers and marks on coloured cells, dark and light ones: the same whatever the page's ground.
ON_DARK, ON_LIGHT = "#ffffff", "#101010"

STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # or every title is placed by what lies about it, which is measured anew
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": ON_DARK,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "ncollapse",
}


@dataclasses.dataclass
class Drawing:
    """A figure with what is said of it.

    Attributes:
        name: of its files, without the ending.
        runs: group of points, as named in the SVG -> the run of each point, in the order in which they are drawn.
    """

    name: str
    caption: str
    figure: "Figure"
    runs: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def points(self, axes: "Axes", x: Any, y: Any, runs: Iterable[str], **style: Any) -> None:
        """Draw a run a point; points that are not finite, or not positive on a logarithmic axis, are left out."""
        at = np.asarray([x, y], dtype=float)
        shown = np.isfinite(at).all(0)
        for values, scale in zip(at, (axes.get_xscale(), axes.get_yscale()), strict=True):
            shown &= (values > 0) | (scale != "log")
        if shown.any():
            group = f"runs-{len(self.runs)}"
            self.runs[group] = [run for run, there in zip(runs, shown, strict=True) if there]
            axes.plot(*at[:, shown], linestyle="", gid=group, **style)


def styled() -> Any:
    """The context in which figures are made and saved."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)


def panels(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    margins: tuple[float, float, float, float] = (0.65, 0.15, 0.5, 0.3),
    gaps: tuple[float, float] = (0.55, 0.45),
    **options: Any,
) -> "tuple[Figure, np.ndarray[Any, np.dtype[Any]]]":
    """An empty figure, and its axes as an array `[rows, columns]`. Lengths are in inches.

    What lies about the axes is of known size: to measure it, as matplotlib's layouts do, takes as long as to draw it.

    Args:
        margins: left, right, bottom, top; `one_legend` makes room for itself.
        gaps: across and down between axes.
    """
    # The object interface draws off screen whatever backend the user's matplotlib is set to.
    from matplotlib.figure import Figure

    (width, height), (left, right, bottom, top) = size, margins
    figure = Figure(figsize=size)
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=gaps[0] * columns / (width - left - right - gaps[0] * (columns - 1)),
        hspace=gaps[1] * rows / (height - top - bottom - gaps[1] * (rows - 1)),
    )
    return figure, grid


def encode(figure: "Figure") -> tuple[bytes, str]:
    """The figure as a PNG and as an SVG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    image, vectors = io.BytesIO(), io.StringIO()
    # Not `savefig`, which draws everything twice.
    with styled():
        figure.set_dpi(160)
        FigureCanvasAgg(figure).print_png(image, pil_kwargs={"compress_level": 4})
        FigureCanvasSVG(figure).print_svg(vectors, metadata={"Date": None, "Creator": None})
    return image.getvalue(), vectors.getvalue()


def line(optimizer: str, coupling: float) -> dict[str, Any]:
    """The colour of the family; solid where decay is coupled, wholly or in part, dashed where it is decoupled."""
    return {"color": COLOURS[optimizer], "linestyle": "-" if coupling > 0 else (0, (3.2, 1.6))}


def marker(optimizer: str, coupling: float, *, reached: bool) -> dict[str, Any]:
    """A disc where decay is coupled, a diamond where it is decoupled; hollow where the run missed the threshold."""
    colour = COLOURS[optimizer]
    shape = {"marker": "o", "markersize": 4.5} if coupling > 0 else {"marker": "D", "markersize": 4.0}
    return shape | {"mec": colour, "mfc": colour if reached else GROUND, "mew": 0.8, "alpha": 0.75 if reached else 0.6}


def spans_decades(values: Any) -> bool:
    """Whether values are told apart on a logarithmic axis alone: the positive ones span a factor of 30 or more."""
    positive = np.asarray(values, dtype=float)
    positive = positive[np.isfinite(positive) & (positive > 0)]
    return bool(len(positive) and positive.max() > 30 * positive.min())


def scale(axes: "Axes", which: str, values: Any) -> None:
    """Make an axis, "x" or "y", logarithmic where its values span decades, with ticks that can be read."""
    if spans_decades(values):
        positive = np.asarray(values, dtype=float)
        positive = positive[np.isfinite(positive) & (positive > 0)]
        getattr(axes, f"set_{which}scale")("log")
        ticks(getattr(axes, f"{which}axis"), float(positive.min()), float(positive.max()))


def ticks(axis: "Axis", low: float, high: float) -> None:
    """Ticks of a logarithmic axis: powers of ten, and 2 and 5 between them where there are few; no small ones."""
    plain = low >= 1e-3 and high < 1e5
    axis.set_major_formatter(_formatter(plain))
    if high < 300 * low:
        axis.set_minor_locator(_locator(2.0, 5.0))
        axis.set_minor_formatter(_formatter(True))
    else:
        axis.set_minor_locator(_locator())


def _locator(*digits: float) -> Any:
    from matplotlib.ticker import LogLocator, NullLocator

    return LogLocator(subs=digits) if digits else NullLocator()


def _formatter(plain: bool) -> Callable[[float, float], str]:
    def text(value: float, _: float) -> str:
        if plain or value <= 0:
            return f"{value:.6g}"
        return f"10{superscript(round(math.log10(value)))}"

    return text


def superscript(exponent: int) -> str:
    """An integer in raised digits: matplotlib's own mathematics costs more time than the rest of a figure."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def short(value: float, digits: int = 2) -> str:
    """So many digits in as few characters as can be: 0.0005 is 5e-4."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.{digits}g}" if abs(value) < 99 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def lines_legend(axes: "Axes", optimizers: Iterable[tuple[str, float]], *, predicted: bool = False) -> None:
    """Entries for the legend of a figure of lines: optimizers with their coupling."""
    for optimizer, coupling in optimizers:
        axes.plot([], [], label=LABELS[optimizer], **line(optimizer, coupling))
    if predicted:
        axes.plot([], [], "o", mfc=GROUND, mec=QUIET, label="exact prediction")


def points_legend(axes: "Axes", optimizers: Iterable[tuple[str, float]], *, missed: bool = False) -> None:
    """Entries for the legend of a figure of points."""
    for optimizer, coupling in optimizers:
        axes.plot(
            [], [], linestyle="", label=LABELS[optimizer], **marker(optimizer, coupling, reached=True) | {"alpha": 1}
        )
    if missed:
        axes.plot([], [], "o", mfc=GROUND, mec=QUIET, label="missed the threshold")


def one_legend(figure: "Figure", axes: "Axes", columns: int) -> None:
    """One legend over the whole figure, of the labelled entries of one of its axes."""
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // columns)
    height = figure.get_figheight()
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0.01, 1 - 0.03 / height),
        borderaxespad=0,
        ncols=columns,
        columnspacing=1.4,
        handlelength=2.2,
    )
    figure.subplots_adjust(top=figure.subplotpars.top - (0.2 * rows + 0.12) / height)
