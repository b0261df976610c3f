"""Three classes in the plane of their means, in which a simplex is an equilateral triangle.

The picture is that of Papyan, Han and Donoho (PNAS 117(40), 2020): features, class means and classifier in one plane.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ncollapse.plot import style
from ncollapse.plot.looks import PAGE_COLOURS

if TYPE_CHECKING:
    from ncollapse.snapshot import Snapshot

    #: What `geometry` and `simplex` draw.
    Snapshots = Mapping[int, Snapshot] | Mapping[str, Snapshot] | Snapshot

#: Of the three classes: CSS variables of the page, whose colours no optimizer of ncollapse's has.
CLASS_COLOURS = ("other1", "other5", "other3")
#: The class means of a simplex `[3, 2]`, in the units of `Snapshot.corners`.
TRIANGLE = np.array([[0.0, 1.0], [0.75**0.5, -0.5], [-(0.75**0.5), -0.5]])
#: Centre of the pictures: that of the square around the triangle.
CENTRE = np.array([0.0, 0.25])
#: Pictures side by side, at most.
_MOST = 5
#: A picture shows at least the triangle and the names of the classes, and no more than makes the triangle too small.
_NEAREST, _FARTHEST = 1.4, 2.0


def simplex(snapshots: "Snapshots") -> "style.Figure":
    """Draw three classes in the plane of their means, up to five epochs side by side.

    Small points are samples, large ones class means, arrows rows of W. All are in units of the mean distance of the
    class means from their centre, the origin; the rows of W are divided by their own mean length. The thin triangle is
    the simplex: at collapse the samples, means and arrows of a class meet at its corner.

    Args:
        snapshots: epoch → snapshot, as `ncollapse.train.load_geometry(folder)[run]` returns them, of which five at even
            distances are drawn; or label → snapshot, to compare runs; or one. Those without three classes are left out.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("simplex.png")`.

    Raises:
        ValueError: no snapshot has three classes with samples whose means span a plane, or something else is given.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> run = load_runs("results").query("optimizer == 'sgd'").id.iloc[0]
        >>> simplex(load_geometry("results")[run]).savefig("simplex.png")
    """
    shown = labelled(snapshots, _MOST, planar=True)
    if not shown:
        raise ValueError("plot.simplex: no snapshot has three classes with samples whose means span a plane")
    half = extent([snapshot for _, snapshot in shown])
    with style.styled():
        side, right = 1.8, 0.05
        figure, grid = style.panels(
            1, len(shown), (len(shown) * (side + 0.05) + right, side + 0.62), margins=(0.05, right, 0.32, 0.3),
            gaps=(0.05, 0),
        )  # fmt: skip
        for axes, (label, snapshot) in zip(grid[0], shown, strict=True):
            draw_plane(axes, snapshot, half)
            axes.set_title(label)
        height = figure.get_figheight()
        figure.text(0.05 / figure.get_figwidth(), 0.1 / height, LEGEND, color=style.QUIET, fontsize=8)
    return figure


#: What the signs in the pictures are.
LEGEND = "· samples   ● means   → rows of W   △ simplex"


def labelled(snapshots: "Snapshots", most: int, *, planar: bool = False) -> "list[tuple[str, Snapshot]]":
    """Return a label and a snapshot for each that is drawn; a single one has an empty label.

    Args:
        most: of more epochs those at even distances are drawn.
        planar: whether those without three classes are left out.

    Raises:
        ValueError: something else than snapshots.
    """
    from ncollapse.snapshot import Snapshot

    if not isinstance(snapshots, Mapping):
        snapshots = {"": snapshots}
    if others := [one for one in snapshots.values() if not isinstance(one, Snapshot)]:
        hint = "; of the runs that load_geometry returns, give one: load_geometry(folder)[run]"
        raise ValueError(
            f"plot: a snapshot, or epochs or labels with a snapshot each, are drawn; got {type(others[0]).__name__}"
            f"{hint if isinstance(others[0], Mapping) else ''}"
        )
    usable = {key: snapshot for key, snapshot in snapshots.items() if snapshot.three or not planar}
    named = [key for key in usable if isinstance(key, str)]
    epochs = evenly(sorted(key for key in usable if not isinstance(key, str)), most)
    return [(f"epoch {key}", usable[key]) for key in epochs] + [(key, usable[key]) for key in named]


def evenly(items: list[Any], most: int) -> list[Any]:
    """Return at most so many items, at even distances, the first and the last among them."""
    count = min(len(items), most)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def extent(snapshots: "list[Snapshot]") -> float:
    """Return half the side of pictures that show all corners and rows, and samples as far as the triangle stays large.

    Pictures that are compared have it in common.
    """
    needed = max(float(np.nanmax(np.abs([*s.corners, *s.rows] - CENTRE), initial=0.0)) for s in snapshots)
    samples = np.abs(np.concatenate([(snapshot.samples - CENTRE).ravel() for snapshot in snapshots]))
    far = np.quantile(samples[np.isfinite(samples)], 0.95) if np.isfinite(samples).any() else 0.0
    return float(max(np.clip(1.15 * far, _NEAREST, _FARTHEST), 1.12 * needed))


def draw_plane(axes: "style.Axes", snapshot: "Snapshot", half: float) -> None:
    """Draw a snapshot that has three classes into axes of the half-side `half`; what is beyond is not shown."""
    (left, bottom), (right, top) = CENTRE - half, CENTRE + half
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(visible=True, color=style.GRID)
    axes.plot(*np.vstack([TRIANGLE, TRIANGLE[:1]]).T, color=style.QUIET, linewidth=0.7)
    for k, name, samples, corner, row, outward in zip(
        snapshot.three, CLASS_COLOURS, snapshot.samples, snapshot.corners, snapshot.rows, TRIANGLE, strict=True
    ):
        colour = PAGE_COLOURS[name][0]
        known = samples[np.isfinite(samples).all(-1)]
        axes.plot(*known.T, ".", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        if np.isfinite(row).all():
            axes.annotate(
                "", row, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0,
                "shrinkB": 0, "mutation_scale": 8}, zorder=3,
            )  # fmt: skip
        axes.plot(*corner, "o", color=colour, markersize=6, markeredgecolor=style.INK, markeredgewidth=0.8, zorder=4)
        x, y = CENTRE + 0.9 * half * outward
        axes.text(x, y, str(k), ha="center", va="center", fontsize=8, color=style.INK)
