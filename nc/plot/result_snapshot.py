"""The snapshot of a result, for pictures: with all of its classes, and all samples that are given."""

from typing import TYPE_CHECKING

import torch

from ncollapse.snapshot import Snapshot
from ncollapse.snapshot_taking import in_plane

if TYPE_CHECKING:
    from torch import Tensor

    from ncollapse.result import NCResult


def snapshot_of(
    result: "NCResult", features: "Tensor | None", labels: "Tensor | None", weight: "Tensor | None",
    classes: tuple[int, int, int] | None,
) -> Snapshot:  # fmt: skip
    """Return what `geometry` draws of a result; its arguments are described there.

    Raises:
        ValueError: a result without matrices, a class without samples, shapes that do not match.
    """
    if not result.matrices:
        raise ValueError("plot.geometry: the result has no matrices; `measure` keeps them")
    means = result.means
    present = (~means.isnan().any(-1)).nonzero().flatten().tolist()
    three = list(classes) if classes is not None else present[:3]
    if missing := [k for k in three if k not in present]:
        raise ValueError(f"plot.geometry: no samples of class {', '.join(map(str, missing))}")
    if classes is not None and len(set(three)) != 3:
        raise ValueError(f"plot.geometry: classes must be three different ones; got {classes}")
    if (features is None) != (labels is None):
        raise ValueError(f"plot.geometry: features [N, {means.shape[-1]}] need labels [N], and labels features")
    if features is None or labels is None:
        features, labels = means.new_empty(0, means.shape[-1]), torch.empty(0, dtype=torch.int64, device="cpu")
    if features.shape != (len(labels), means.shape[-1]) or labels.dim() != 1:
        raise ValueError(
            f"plot.geometry: features must be [N, {means.shape[-1]}] and labels [N]; got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if weight is None:
        weight = torch.full_like(means, torch.nan)
    if weight.shape != means.shape:
        raise ValueError(f"plot.geometry: weight must be {tuple(means.shape)}; got {tuple(weight.shape)}")
    of_plane = {"corners": means.new_empty(0, 2), "rows": means.new_empty(0, 2), "samples": means.new_empty(0, 0, 2)}
    flat = False
    if len(three) == 3:
        w, x, y = (part.detach().cpu() for part in (weight, features, labels))
        found, planar = in_plane(
            w[three].double()[None], means[three][None], x[None], y, torch.tensor(three, device="cpu"), most=len(y)
        )  # fmt: skip
        if flat := bool(planar):
            of_plane = {name: part[0] for name, part in found.items()}
    matrices = {name: matrix.numpy() for name, matrix in result.matrices.items()}
    largest = float(result.matrices["product"].nan_to_num(0.0).abs().max()) or 1.0
    matrices["product"] = matrices["product"] / largest
    return Snapshot(
        len(means), **matrices, three=tuple(three) if flat else (),
        **{name: part.numpy() for name, part in of_plane.items()},
    )  # fmt: skip
