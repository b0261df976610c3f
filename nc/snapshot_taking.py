"""Snapshots of stacked runs: matrices, singular values, and the plane of three class means with some samples."""

import numpy as np
import torch
from torch import Tensor

from ncollapse.further_metrics import matrices, spectrum
from ncollapse.snapshot import MOST_CLASSES, MOST_SAMPLES, Snapshot
from ncollapse.stats import ClassStats
from ncollapse.usable import finite, vanished


@torch.no_grad()
def take_snapshots(
    weight: Tensor, stats: ClassStats, features: Tensor, labels: Tensor
) -> list[Snapshot | None]:  # fmt: skip
    """Compute the snapshots of R stacked runs; None for a run whose weights or features are not finite.

    Args:
        weight: W `[R, K, d]`, any floating dtype.
        stats: of the features `[R, B, d]` of all samples.
        features, labels: `[R, m, d]` and `[m]`, some samples to show, of which the first 24 of each of the three
            classes are taken.

    Raises:
        ValueError: shapes that disagree.
    """
    runs, classes, dim = weight.shape if weight.dim() == 3 else (0, 0, 0)
    if (stats.runs, stats.num_classes, stats.dim) != (runs, classes, dim) or (
        tuple(features.shape) != (runs, len(labels), dim)
    ):
        raise ValueError(
            f"take_snapshots: W {tuple(weight.shape)}, features {tuple(features.shape)} and labels "
            f"{tuple(labels.shape)} do not go with statistics of (R, K, d) = "
            f"{(stats.runs, stats.num_classes, stats.dim)}"
        )
    w, k = weight.double(), min(classes, MOST_CLASSES)
    present = stats.present
    centred = stats.centred_means()
    usable, lost = finite(w) & finite(centred), vanished(stats, centred)
    found = {name: matrix[:, :k, :k] for name, matrix in matrices(w, stats).items()}
    for name in ("means", "product"):
        found[name] = found[name].masked_fill(lost[:, None, None], torch.nan)
    largest = found["product"].nan_to_num(0.0).abs().amax((1, 2), keepdim=True)
    found["product"] = found["product"] / largest
    left, values = spectrum(w, weight.dtype)
    found["singular_values"] = values[:, :MOST_CLASSES]
    found["row_sum"] = (left.sum(1).abs() / classes**0.5)[:, :MOST_CLASSES]
    three = present.nonzero().flatten()[:3]
    planar = torch.zeros_like(usable)
    if len(three) == 3:
        plane, planar = in_plane(w[:, three], stats.means[:, three], features, labels, three)
        found |= plane
    arrays = {name: tensor.cpu().numpy() for name, tensor in found.items()}
    names, nothing = tuple(three.tolist()), {"corners": (0, 2), "rows": (0, 2), "samples": (0, 0, 2)}
    snapshots: list[Snapshot | None] = []
    for row, (good, flat) in enumerate(zip(usable.tolist(), (planar & ~lost).tolist(), strict=True)):
        of_run = {name: array[row] for name, array in arrays.items()}
        if not flat:
            of_run |= {name: np.empty(shape) for name, shape in nothing.items()}
        snapshots.append(Snapshot(classes, three=names if flat else (), **of_run) if good else None)
    return snapshots


def samples_to_show(labels: Tensor) -> Tensor:
    """Return the numbers of the samples that a snapshot shows, in order: 24 of each of the first three classes, `[m]`.

    Args:
        labels: of all samples, `[N]` in [0, K).

    They are on the CPU, so that batches can be asked for theirs without a wait for a GPU.
    """
    labels = labels.cpu()
    three = labels.bincount().nonzero().flatten()[:3]
    return torch.cat([(labels == k).nonzero().flatten()[:MOST_SAMPLES] for k in three]).sort().values


def in_plane(
    w: Tensor, means: Tensor, features: Tensor, labels: Tensor, three: Tensor, most: int = MOST_SAMPLES
) -> tuple[dict[str, Tensor], Tensor]:
    """Project on the plane of three class means `[R, 3, d]`, float64.

    Args:
        w: their rows of W, `[R, 3, d]`.
        features, labels: `[R, m, d]` and `[m]`, of which the first `most` of each of the classes `three` `[3]` are
            taken.

    Returns:
        `corners`, `rows` and `samples` `[R, …]`, and for each run whether its means span a plane, `[R]` bool.
    """
    centre = means.mean(1, keepdim=True)
    arms = means - centre
    up = arms[:, 0] / arms[:, 0].norm(dim=-1, keepdim=True)
    across = arms[:, 1] - (arms[:, 1] * up).sum(-1, keepdim=True) * up
    width = across.norm(dim=-1, keepdim=True)
    # Of means on one line what remains is the rounding of the means.
    planar = (width > 1e-6 * arms[:, 1].norm(dim=-1, keepdim=True)).squeeze(-1)
    axes = torch.stack((across / width, up), -1)  # [R, d, 2]
    corners = arms @ axes
    unit = corners.norm(dim=-1).mean(-1)[:, None, None]
    rows = w @ axes
    chosen = [(labels == k).nonzero().flatten()[:most] for k in three]
    n = max(map(len, chosen))
    samples = means.new_full((len(means), 3, n, 2), torch.nan)
    for i, index in enumerate(chosen):
        samples[:, i, : len(index)] = (features[:, index].double() - centre) @ axes / unit
    scale = rows.norm(dim=-1).mean(-1)[:, None, None]
    return {"corners": corners / unit, "rows": rows / scale, "samples": samples}, planar
