"""Pictures of the geometry of class means and classifier, of a result or of the snapshots of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ncollapse.plot import style
from ncollapse.plot.three_classes import LEGEND, draw_plane, extent, labelled

if TYPE_CHECKING:
    from torch import Tensor

    from ncollapse.plot.three_classes import Snapshots
    from ncollapse.result import NCResult
    from ncollapse.snapshot import Snapshot

#: Epochs, at most: the start, mid-way and the end.
MOST_EPOCHS = 3
#: Letters of a label that fit beside a row.
_LONGEST = 18
#: Attribute of a snapshot -> title of its panel.
_MATRICES = {"means": "Class means", "weight": "Rows of W", "product": "W Mᵀ"}
_COLOURS = "RdBu_r"


def geometry(
    of: "NCResult | Snapshots", features: "Tensor | None" = None,
    labels: "Tensor | None" = None, weight: "Tensor | None" = None, *, classes: tuple[int, int, int] | None = None,
) -> "style.Figure":  # fmt: skip
    """Draw how near class means and classifier are to a simplex.

    A row of five panels for each snapshot: the cosines of the centred class means, those of the rows of W, and W Mᵀ
    over its largest absolute entry, each K × K; the singular values of W, the darker the more their direction is that
    of the row sum 1 (at collapse only the last, which is 0); and three classes in the plane of their means, as
    `simplex` draws them. Below a matrix stand mean and standard deviation off its diagonal: −1/(K − 1) and 0 for a
    simplex.

    Args:
        of: of `measure`; or a snapshot; or epoch → snapshot, as `ncollapse.train.load_geometry(folder)[run]` returns
            them, of which the first, the middle and the last are drawn; or label → snapshot, to compare runs.
        features, labels: of a result, `[N, d]` and `[N]` of the head's input, for the last panel; else it has the means
            alone.
        weight: of a result, W `[K, d]`, whose rows the last panel then has too.
        classes: of a result, the three of the last panel; by default the first three with samples. With fewer it is
            left empty.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("geometry.png")`.

    Raises:
        ValueError: a result without matrices, a class without samples, shapes that do not match, no snapshots, or
            something else.
        ModuleNotFoundError: no matplotlib.

    Example:
        >>> geometry(measure(model, loader, head="fc")).savefig("geometry.png")
    """
    from ncollapse.snapshot import Snapshot

    if not hasattr(of, "matrices") and not isinstance(of, Snapshot | Mapping):
        raise ValueError(f"plot.geometry: a result of `measure` or snapshots are drawn; got {type(of).__name__}")
    if isinstance(of, Snapshot | Mapping):
        if any(option is not None for option in (features, labels, weight, classes)):
            raise ValueError("plot.geometry: features, labels, weight and classes are for a result of `measure`")
        rows = labelled(of, MOST_EPOCHS)
    else:
        from ncollapse.plot.result_snapshot import snapshot_of  # which needs torch; a store's snapshots do not

        rows = [("", snapshot_of(of, features, labels, weight, classes))]
    if not rows:
        raise ValueError("plot.geometry: no snapshots")
    with style.styled():
        return _panels(rows)


def _panels(rows: "list[tuple[str, Snapshot]]") -> "style.Figure":
    left, right, bottom, top = (0.62 if rows[0][0] else 0.3), 0.06, 0.7, 0.3
    side, gap, below = 1.42, 0.3, 0.42
    count = len(rows)
    size = (left + right + 5 * side + 4 * gap, top + bottom + count * side + (count - 1) * below)
    figure, grid = style.panels(count, 5, size, margins=(left, right, bottom, top), gaps=(gap, below))
    planes = [snapshot for _, snapshot in rows if snapshot.three]
    half = extent(planes) if planes else 0.0
    for axes, (label, snapshot) in zip(grid, rows, strict=True):
        for panel, name in zip(axes, _MATRICES, strict=False):
            draw_matrix(panel, getattr(snapshot, name))
        draw_spectrum(axes[3], snapshot)
        if snapshot.three:
            draw_plane(axes[4], snapshot, half)
        else:
            axes[4].set_axis_off()
        axes[0].set_ylabel(
            label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…", fontweight="bold", labelpad=4
        )
    for panel, title in zip(grid[0], (*_MATRICES.values(), "Singular values", "Three classes"), strict=True):
        if panel.axison:
            panel.set_title(title)
    colour_bar(figure, (left, 0.26), 3 * side + 2 * gap)
    if planes:
        at = (left + 4 * (side + gap)) / size[0], 0.12 / size[1]
        figure.text(*at, LEGEND.replace("   →", "\n→"), color=style.QUIET, fontsize=8)
    note = "filled: direction of 1\nhollow: orthogonal to 1"
    figure.text((left + 3 * (side + gap)) / size[0], 0.12 / size[1], note, color=style.QUIET, fontsize=8)
    return figure


def draw_matrix(panel: "style.Axes", matrix: "np.ndarray[Any, np.dtype[np.float64]]") -> None:
    """Draw a matrix `[k, k]` with entries in [−1, 1]; those that are NaN are left empty."""
    k = len(matrix)
    # "none" keeps one pixel an entry in SVG, with hard edges at any size.
    panel.imshow(np.ma.masked_invalid(matrix), cmap=_COLOURS, vmin=-1, vmax=1, interpolation="none", aspect="equal")
    panel.grid(False)
    places = sorted({0, (k - 1) // 2, k - 1})
    panel.set(xticks=places, yticks=places)
    panel.tick_params(length=0, labelsize=8, pad=2)
    for spine in panel.spines.values():
        spine.set(visible=True, color=style.GRID)
    beside = matrix[~np.eye(k, dtype=bool)]
    beside = beside[np.isfinite(beside)]
    text = f"off diag. {beside.mean():.2f} ± {beside.std():.2f}".replace("-", "−") if beside.size else "undefined"
    panel.set_xlabel(text, fontsize=8, labelpad=1.5, color=style.QUIET)


def draw_spectrum(panel: "style.Axes", snapshot: "Snapshot") -> None:
    """Draw singular values, filled by the squared cosine of their direction with 1."""
    values, share = snapshot.singular_values, np.nan_to_num(snapshot.row_sum).clip(0, 1) ** 2
    index = np.arange(1, len(values) + 1)
    panel.scatter(index, values, s=22, facecolors=style.GROUND, edgecolors="none", zorder=2)
    filled = [(style.INK, float(part)) for part in share]
    panel.scatter(index, values, s=22, facecolors=filled, linewidths=0, zorder=3)
    panel.scatter(index, values, s=22, facecolors="none", edgecolors=style.INK, linewidths=0.8, zorder=4)
    largest = float(np.nanmax(values, initial=0.0)) or 1.0
    panel.set(xlim=(0.2, len(values) + 0.8), ylim=(-0.06 * largest, 1.1 * largest), xlabel="index")
    panel.set_xticks(sorted({1, (len(values) + 1) // 2, len(values)}))
    panel.tick_params(length=0, labelsize=8, pad=2)
    panel.xaxis.label.set(fontsize=8, color=style.QUIET)
    panel.xaxis.labelpad = 1.5
    panel.locator_params(axis="y", nbins=5)


def colour_bar(figure: "style.Figure", at: tuple[float, float], length: float) -> None:
    """Draw the colours of `draw_matrix`, from the place `at`; lengths are in inches."""
    width, height = figure.get_size_inches()
    bar = figure.add_axes((at[0] / width, at[1] / height, length / width, 0.08 / height))
    bar.imshow(np.linspace(-1, 1, 256)[None], cmap=_COLOURS, aspect="auto", extent=(-1, 1, 0, 1))
    bar.grid(False)
    bar.set(yticks=[], xticks=[-1, -0.5, 0, 0.5, 1])
    bar.tick_params(length=0, labelsize=8, pad=2)
    for spine in bar.spines.values():
        spine.set_visible(False)
