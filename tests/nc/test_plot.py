"""Pictures of geometry, of a result and of snapshots: what is drawn is what was measured."""

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch

from ncollapse import ClassStats, NCResult, plot
from ncollapse.plot.three_classes import CENTRE, TRIANGLE, evenly, extent, simplex
from ncollapse.result import further_of_head
from ncollapse.snapshot import Snapshot
from ncollapse.snapshot_taking import take_snapshots

TITLES = {"means": "Class means", "weight": "Rows of W", "product": "W Mᵀ"}


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


def snapshot_of(k: int, noise: float = 0.1) -> Snapshot:
    """Class means at the corners of a simplex in k dimensions but for noise, of features and of W."""
    labels = torch.arange(20 * k) % k
    features = torch.eye(k)[labels] + noise * torch.randn(len(labels), k)
    weight = torch.eye(k) - 1 / k + noise * torch.randn(k, k)
    stats = ClassStats(k, k, runs=1)
    stats.update(features[None], labels)
    (snapshot,) = take_snapshots(weight[None], stats, features[None], labels)
    assert snapshot is not None
    return snapshot


def png(figure: Any) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=20)
    assert file.getvalue().startswith(b"\x89PNG")


def by_title(figure: Any) -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def lines_of(axes: Any, marker: str) -> list[np.ndarray[Any, Any]]:
    """The points of each group with a marker, a class each."""
    return [np.stack(line.get_data(), -1) for line in axes.lines if line.get_marker() == marker]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_panels_of_a_result(k: int) -> None:
    result, data = result_of(k)
    figure = plot.geometry(result, **data)
    panels = by_title(figure)
    for name, title in TITLES.items():
        expected = result.matrices[name] / (result.matrices[name].abs().max() if name == "product" else 1)
        np.testing.assert_array_equal(panels[title].images[0].get_array(), expected)
    filled = panels["Singular values"].collections[1]
    np.testing.assert_allclose(filled.get_offsets()[:, 1], result.matrices["singular_values"])
    np.testing.assert_allclose(filled.get_facecolor()[:, 3], result.matrices["row_sum"] ** 2)
    if k == 2:
        assert "Three classes" not in panels
    else:
        plane = panels["Three classes"]
        samples, means = lines_of(plane, "."), np.concatenate(lines_of(plane, "o"))
        assert [len(part) for part in samples] == [20, 20, 20]
        assert len([text for text in plane.texts if text.get_text() == ""]) == 3  # the arrows
        # Distances in the plane are those in space, but for the unit.
        found, true = torch.pdist(torch.tensor(means)), torch.pdist(result.means[:3])
        torch.testing.assert_close(found / found[0], true / true[0])
        np.testing.assert_allclose(np.mean(samples, axis=1), means, atol=1e-7)
    png(figure)


def test_a_result_alone_has_no_samples_and_no_arrows() -> None:
    result, data = result_of(4)
    plane = by_title(plot.geometry(result))["Three classes"]
    assert [len(part) for part in lines_of(plane, ".")] == [0, 0, 0]
    assert len(lines_of(plane, "o")) == 3
    assert [text.get_text() for text in plane.texts] == ["0", "1", "2"]
    chosen = by_title(plot.geometry(result, **data, classes=(3, 1, 0)))["Three classes"]
    assert [text.get_text() for text in chosen.texts if text.get_text()] == ["3", "1", "0"]


def test_what_cannot_be_drawn_is_refused() -> None:
    result, data = result_of(4)
    for options, words in (
        ({"classes": (0, 1, 7)}, "no samples of class 7"),
        ({"classes": (0, 1, 1)}, "three different ones"),
        ({"features": data["features"]}, "need labels"),
        ({"features": data["features"][:, :5], "labels": data["labels"]}, r"must be \[N, 6\] and labels \[N\]"),
        ({"weight": torch.ones(4, 5)}, r"weight must be \(4, 6\); got \(4, 5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            plot.geometry(result, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the result has no matrices"):
        plot.geometry(result_of(3, matrices=False)[0])
    with pytest.raises(ValueError, match="no snapshots"):
        plot.geometry({})
    with pytest.raises(ValueError, match="are for a result"):
        plot.geometry(snapshot_of(3), classes=(0, 1, 2))
    with pytest.raises(ValueError, match="no snapshot has three classes"):
        simplex({0: snapshot_of(2)})
    of_runs: Any = {"run": {0: snapshot_of(3)}}  # as load_geometry returns them
    for draw in (plot.geometry, simplex):
        with pytest.raises(ValueError, match=r"give one: load_geometry\(folder\)\[run\]"):
            draw(of_runs)
        with pytest.raises(ValueError, match="are drawn; got list"):
            draw([snapshot_of(3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trajectory"):
        plot.nc0_over_steps([])


def test_a_row_of_panels_for_the_start_the_middle_and_the_end() -> None:
    snapshots = {epoch: snapshot_of(5, noise) for epoch, noise in ((40, 0.01), (0, 1.0), (10, 0.5), (30, 0.1))}
    snapshots[20] = snapshot_of(5, 0.3)
    figure = plot.geometry(snapshots)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    expected = [getattr(snapshots[epoch], name) for epoch in (0, 20, 40) for name in TITLES]
    for image, matrix in zip(images, expected, strict=False):
        np.testing.assert_array_equal(image, matrix)
    assert len(images) == len(expected) + 1  # the colour bar
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["epoch 0", "epoch 20", "epoch 40"]
    # Pictures that are compared have one scale.
    assert len({axes.get_xlim() for axes in figure.axes if lines_of(axes, "o")}) == 1
    png(figure)


def test_the_numbers_below_a_matrix_are_those_of_a_simplex_at_collapse() -> None:
    axes = by_title(plot.geometry(snapshot_of(5, 1e-4)))
    assert {axes[title].get_xlabel() for title in TITLES.values()} == {"off diag. −0.25 ± 0.00"}


def test_classes_without_samples_are_left_empty() -> None:
    snapshot = snapshot_of(5)
    means = snapshot.means.copy()
    means[1], means[:, 1] = np.nan, np.nan
    lacking = dataclasses.replace(snapshot, means=means, product=np.full((5, 5), np.nan))
    axes = by_title(plot.geometry(lacking))
    assert axes["Class means"].images[0].get_array().mask.sum() == 9
    assert axes["W Mᵀ"].get_xlabel() == "undefined"
    nothing = dataclasses.replace(snapshot, singular_values=np.full(5, np.nan), row_sum=np.full(5, np.nan))
    png(plot.geometry(nothing))


def test_three_classes_over_epochs() -> None:
    snapshots = {epoch: snapshot_of(4, 1 / (1 + epoch)) for epoch in range(8)}
    snapshots[3] = snapshot_of(2)  # has no plane
    figure = simplex(snapshots)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"epoch {epoch}" for epoch in (0, 2, 4, 5, 7)]
    for axes, title in zip(figure.axes, titles, strict=True):
        snapshot = snapshots[int(title.split()[1])]
        np.testing.assert_array_equal(np.concatenate(lines_of(axes, "o")), snapshot.corners)
        np.testing.assert_array_equal(lines_of(axes, "."), snapshot.samples)
        np.testing.assert_array_equal([arrow.xy for arrow in axes.texts if not arrow.get_text()], snapshot.rows)
    png(figure)
    png(simplex(snapshot_of(3)))


def test_runs_are_compared_by_label() -> None:
    snapshots = {name: snapshot_of(4) for name in ("z", "a", "an optimizer of one's own", "b", "c", "d")}
    figure = plot.geometry(snapshots)
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["z", "a", "an optimizer of o…", "b", "c", "d"]
    assert [axes.get_title(loc="left") for axes in simplex(snapshots).axes] == list(snapshots)
    (axes,) = simplex({np.int64(3): snapshots["a"]}).axes
    assert axes.get_title(loc="left") == "epoch 3"


def test_samples_that_are_missing_or_far_away() -> None:
    snapshot = snapshot_of(3)
    samples = snapshot.samples.copy()
    samples[0, 3:] = np.nan
    samples[1, 0] = 60_000
    few = dataclasses.replace(snapshot, samples=samples, rows=np.full((3, 2), np.nan))
    (axes,) = simplex(few).axes
    assert [len(part) for part in lines_of(axes, ".")] == [3, 20, 20]
    assert not [text for text in axes.texts if not text.get_text()]
    assert axes.get_xlim()[1] < 3


def test_a_picture_holds_means_and_arrows() -> None:
    for noise in (0.01, 0.3, 3.0):
        snapshot = snapshot_of(3, noise)
        half = extent([snapshot])
        for points in (snapshot.corners, snapshot.rows, TRIANGLE):
            assert np.abs(points - CENTRE).max() < half


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(0, 3, []), (1, 3, [0]), (2, 3, [0, 1]), (5, 3, [0, 2, 4]), (9, 5, [0, 2, 4, 6, 8]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_moments_at_even_distances(count: int, most: int, expected: list[int]) -> None:
    assert evenly(list(range(count)), most) == expected
