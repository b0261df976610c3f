"""Pictures of a result: the geometry of class means and classifier. They need matplotlib."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ncollapse.result import NCResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("tab:blue", "tab:orange", "tab:green")


def geometry(
    result: NCResult, features: Tensor | None = None, labels: Tensor | None = None, weight: Tensor | None = None,
    *, classes: tuple[int, int, int] | None = None,
) -> "Figure":  # fmt: skip
    """Draw how near class means and classifier are to a simplex.

    Five panels: the cosines of the centred class means, those of the rows of W, and W Mᵀ, each K × K; the singular
    values of W, in a colour that tells how far their direction is that of the row sum 1 (at collapse only the last,
    which is 0); and three classes in the plane of their means, in which a simplex is an equilateral triangle.

    Args:
        result: of `measure`.
        features, labels: `[N, d]` and `[N]` of the head's input, for the last panel; else it has the means alone.
        weight: W `[K, d]`, whose rows the last panel then has too, scaled to the means.
        classes: the three of the last panel; by default the first three with samples. With fewer it is left empty.

    Returns:
        A matplotlib figure, which belongs to no window: `figure.savefig("geometry.png")`.

    Raises:
        ValueError: a result without matrices, a class without samples, shapes that do not match.
        ModuleNotFoundError: no matplotlib.
    """
    from matplotlib.figure import Figure

    if not result.matrices:
        raise ValueError("plot.geometry: the result has no matrices; `measure` keeps them")
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    axes = figure.subplots(1, 5)
    for panel, (name, title) in zip(
        axes, (("means", "cosines of class means"), ("weight", "cosines of W"), ("product", "W Mᵀ")), strict=False
    ):
        matrix = result.matrices[name]
        most = 1.0 if name != "product" else float(matrix.nan_to_num(0.0).abs().max()) or 1.0
        image = panel.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        panel.set(title=title, xlabel="class", ylabel="class")
        figure.colorbar(image, ax=panel, shrink=0.7)
    _spectrum(figure, axes[3], result)
    _triangle(axes[4], result, features, labels, weight, classes)
    return figure


def _spectrum(figure: "Figure", panel: "Axes", result: NCResult) -> None:
    values, share = (result.matrices[name].numpy() for name in ("singular_values", "row_sum"))
    points = panel.scatter(range(1, len(values) + 1), values, c=share, cmap="viridis", vmin=0, vmax=1)
    panel.set(title="singular values of W", xlabel="index", ylabel="σ", ylim=(0, None))
    figure.colorbar(points, ax=panel, shrink=0.7, label="|cos(u, 1)|")


def _triangle(
    panel: "Axes", result: NCResult, features: Tensor | None, labels: Tensor | None, weight: Tensor | None,
    classes: tuple[int, int, int] | None,
) -> None:  # fmt: skip
    """Project onto the plane of three class means, with their centre as the origin."""
    means = result.means
    present = (~means.isnan().any(-1)).nonzero().flatten().tolist()
    chosen = list(classes) if classes is not None else present[:3]
    if missing := [k for k in chosen if k not in present]:
        raise ValueError(f"plot.geometry: no samples of class {', '.join(map(str, missing))}")
    if (features is None) != (labels is None) or (features is not None and features.shape[-1] != means.shape[-1]):
        raise ValueError(f"plot.geometry: features [N, {means.shape[-1]}] need labels [N], and labels features")
    if weight is not None and weight.shape != means.shape:
        raise ValueError(f"plot.geometry: weight must be {tuple(means.shape)}; got {tuple(weight.shape)}")
    if len(set(chosen)) < 3:
        panel.set_axis_off()
        return
    three = means[chosen]
    centre = three.mean(0)
    # The two directions of the plane; the third singular value is rounding error, since the rows sum to zero.
    plane = torch.linalg.svd(three - centre, full_matrices=False).Vh[:2]
    corners = (three - centre) @ plane.mT
    drawn: dict[str, Any] = {"edgecolors": "black", "zorder": 3}
    for k, colour, corner in zip(chosen, _COLOURS, corners, strict=True):
        if features is not None and labels is not None:
            samples = (features[labels == k].detach().cpu().double() - centre) @ plane.mT
            panel.scatter(samples[:, 0].numpy(), samples[:, 1].numpy(), s=4, color=colour, alpha=0.4, linewidths=0)
        panel.scatter(float(corner[0]), float(corner[1]), s=60, color=colour, label=f"class {k}", **drawn)
    if weight is not None:
        rows = weight[chosen].detach().cpu().double() @ plane.mT
        rows = rows * (corners.norm() / rows.norm())
        for row, colour in zip(rows.numpy(), _COLOURS, strict=True):
            panel.annotate("", row, (0, 0), arrowprops={"arrowstyle": "->", "color": colour})
    panel.set(title="three classes", aspect="equal")
    panel.legend(fontsize="small")
