"""Pictures of a result: what is drawn is what was measured."""

import io
from typing import Any

import numpy as np
import pytest
import torch

from ncollapse import ClassStats, NCResult, plot
from ncollapse.result import further_of_head


def result_of(k: int, *, matrices: bool = True) -> tuple[NCResult, dict[str, torch.Tensor]]:
    labels = torch.arange(20 * k) % k
    features, weight = torch.eye(k, 6)[labels] + 0.1 * torch.randn(len(labels), 6), torch.randn(k, 6)
    stats = ClassStats(k, 6)
    stats.update(features, labels)
    numbers: dict[str, Any] = dict.fromkeys(
        (
            "nc0", "nc1", "nc1_trace_ratio", "nc1_cdnv", "nc2", "nc2_equinorm", "nc2_equiangularity", "nc2_weight",
            "nc2_weight_equinorm", "nc2_weight_equiangularity", "nc3", "nc3_difference", "nc4", "train_accuracy",
        ), 0.0,
    )  # fmt: skip
    kept = further_of_head(weight, None, stats)[1] if matrices else {}
    result = NCResult(**numbers, degenerate=False, layers={}, means=stats.means, matrices=kept)
    return result, {"features": features, "labels": labels, "weight": weight}


@pytest.mark.parametrize("k", [2, 3, 5])
def test_five_panels(k: int) -> None:
    result, data = result_of(k)
    figure = plot.geometry(result, **data)
    panels = {panel.get_title(): panel for panel in figure.axes if panel.get_title()}
    for title, name in (("cosines of class means", "means"), ("cosines of W", "weight"), ("W Mᵀ", "product")):
        np.testing.assert_array_equal(panels[title].images[0].get_array(), result.matrices[name])
    spectrum = panels["singular values of W"].collections[0]
    np.testing.assert_allclose(spectrum.get_offsets()[:, 1], result.matrices["singular_values"])
    np.testing.assert_allclose(spectrum.get_array(), result.matrices["row_sum"])
    if k == 2:
        assert "three classes" not in panels
    else:
        points = [c.get_offsets() for c in panels["three classes"].collections]
        assert sorted(map(len, points)) == [1, 1, 1, 20, 20, 20]
        # Distances in the plane are those in space.
        corners = torch.tensor(np.concatenate([p for p in points if len(p) == 1]))
        torch.testing.assert_close(torch.pdist(corners), torch.pdist(result.means[:3]))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=20)
    assert file.getvalue().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused() -> None:
    result, data = result_of(4)
    plot.geometry(result, classes=(3, 1, 0))
    for options, words in (
        ({"classes": (0, 1, 7)}, "no samples of class 7"),
        ({"features": data["features"]}, "need labels"),
        ({"weight": torch.ones(4, 5)}, r"weight must be \(4, 6\); got \(4, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.geometry(result, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the result has no matrices"):
        plot.geometry(result_of(3, matrices=False)[0])
