"""Snapshots against NumPy in float64: any number of classes, near collapse, no samples, vanished, damaged."""

import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ncollapse.snapshot import MOST_SAMPLES, Snapshot
from ncollapse.snapshot_taking import samples_to_show, take_snapshots
from ncollapse.stats import ClassStats

FIELDS = ("means", "weight", "product", "singular_values", "row_sum", "corners", "rows", "samples")


def taken(weight: Tensor, features: Tensor, labels: Tensor) -> list[Snapshot | None]:
    """The snapshots of runs with W `[R, K, d]` and all features `[R, N, d]`."""
    runs, classes, dim = weight.shape
    stats = ClassStats(classes, dim, runs=runs, moment="trace", nan_policy="propagate")
    stats.update(features, labels)
    shown = samples_to_show(labels)
    return take_snapshots(weight, stats, features[:, shown], labels[shown])


def one(weight: Tensor, features: Tensor, labels: Tensor) -> Snapshot:
    (snapshot,) = taken(weight[None], features[None], labels)
    assert snapshot is not None
    return snapshot


def made(classes: int, dim: int, noise: float = 1.0, seed: int = 0, per_class: int = 30) -> tuple[Tensor, ...]:
    """W, features around distant means, labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * per_class) % classes
    means = torch.randn(classes, dim, generator=generator)
    features = means[labels] + noise * torch.randn(len(labels), dim, generator=generator) + 5
    return torch.randn(classes, dim, generator=generator), features, labels


def by_hand(weight: Tensor, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """All fields by NumPy, for classes which all have samples."""
    w, h, y = weight.double().numpy(), features.double().numpy(), labels.numpy()
    classes = len(w)
    k = min(classes, 16)
    mu = np.stack([h[y == c].mean(0) for c in range(classes)])
    m = mu - mu.mean(0)

    def cosines(rows: np.ndarray) -> np.ndarray:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return (unit @ unit.T)[:k, :k]

    product = (w @ m.T)[:k, :k]
    u, s, _ = np.linalg.svd(w, full_matrices=False)
    found: dict[str, Any] = {
        "means": cosines(m), "weight": cosines(w), "product": product / np.abs(product).max(),
        "singular_values": s[:16], "row_sum": np.abs(u.T @ np.ones(classes) / np.sqrt(classes))[:16],
    }  # fmt: skip
    if classes < 3:
        return found | {"corners": np.empty((0, 2)), "rows": np.empty((0, 2)), "samples": np.empty((0, 0, 2))}
    centre = mu[:3].mean(0)
    a, b = mu[0] - centre, mu[1] - centre
    up = a / np.linalg.norm(a)
    right = b - (b @ up) * up
    axes = np.stack([right / np.linalg.norm(right), up], 1)
    corners, rows = (mu[:3] - centre) @ axes, w[:3] @ axes
    unit = np.linalg.norm(corners, axis=1).mean()
    samples = np.stack([((h[y == c][:MOST_SAMPLES] - centre) @ axes) / unit for c in range(3)])
    return found | {
        "corners": corners / unit, "rows": rows / np.linalg.norm(rows, axis=1).mean(), "samples": samples,
    }  # fmt: skip


@pytest.mark.parametrize(("classes", "dim"), [(2, 5), (3, 2), (3, 8), (10, 4), (10, 40), (16, 20), (40, 64)])
@pytest.mark.parametrize("noise", [1.0, 1e-5])
def test_it_is_what_numpy_computes(classes: int, dim: int, noise: float) -> None:
    """Also near total collapse, where samples lie within a rounding of their means."""
    inputs = made(classes, dim, noise)
    snapshot, expected = one(*inputs), by_hand(*inputs)
    assert snapshot.classes == classes
    assert snapshot.three == ((0, 1, 2) if classes > 2 else ())
    for name in FIELDS:
        value = getattr(snapshot, name)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6 * np.abs(expected[name]).max(initial=1.0))


def test_axes_do_not_turn_from_epoch_to_epoch() -> None:
    """The first class is above the origin and the second on the right, whatever the features' axes are."""
    for seed in range(5):
        snapshot = one(*made(4, 6, seed=seed))
        corners = snapshot.corners
        assert corners[0, 0] == pytest.approx(0, abs=1e-12)
        assert corners[0, 1] > 0
        assert corners[1, 0] > 0
        np.testing.assert_allclose(corners.sum(0), 0, atol=1e-12)
        assert np.linalg.norm(corners, axis=1).mean() == pytest.approx(1)
        assert np.linalg.norm(snapshot.rows, axis=1).mean() == pytest.approx(1)


def test_at_collapse_it_is_the_simplex() -> None:
    simplex = torch.eye(10) - 0.1
    labels = torch.arange(300) % 10
    snapshot = one(3 * simplex, 2 * simplex[labels] + 7, labels)
    etf = (10 * np.eye(10) - 1) / 9
    for name in ("means", "weight", "product"):
        np.testing.assert_allclose(getattr(snapshot, name), etf, atol=1e-5)
    np.testing.assert_allclose(snapshot.rows, snapshot.corners, atol=1e-6)
    np.testing.assert_allclose(snapshot.samples, snapshot.corners[:, None].repeat(24, 1), atol=1e-6)
    np.testing.assert_allclose(snapshot.singular_values, [3.0] * 9 + [0.0], atol=1e-6)
    np.testing.assert_allclose(snapshot.row_sum, [0.0] * 9 + [1.0], atol=1e-6)


def test_runs_of_a_stack_are_those_alone_and_those_that_are_not_finite_are_none() -> None:
    inputs = [made(4, 6, seed=seed) for seed in range(4)]
    weight, features = (torch.stack([each[i] for each in inputs]) for i in (0, 1))
    weight[1, 2, 3], features[2, 0, 0] = torch.inf, torch.nan
    found = taken(weight, features, inputs[0][2])
    assert [each is None for each in found] == [False, True, True, False]
    for i in (0, 3):
        snapshot, alone = found[i], one(*inputs[i])
        assert snapshot is not None
        for name in FIELDS:
            np.testing.assert_allclose(getattr(snapshot, name), getattr(alone, name), atol=1e-12)


def test_a_class_without_samples_is_nan_and_another_one_shown() -> None:
    weight, features, labels = made(5, 6)
    keep = labels != 1
    features, labels = features[keep], labels[keep]
    few = (labels == 2).nonzero().flatten()[7:]
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[few] = False
    snapshot = one(weight, features[keep], labels[keep])
    assert snapshot.three == (0, 2, 3)
    assert np.isnan(snapshot.means[1]).all()
    assert np.isnan(snapshot.product[:, 1]).all()
    assert np.isfinite(np.delete(np.delete(snapshot.means, 1, 0), 1, 1)).all()
    assert np.isfinite(snapshot.weight).all()
    assert np.abs(snapshot.product[np.isfinite(snapshot.product)]).max() == 1
    assert np.isfinite(snapshot.samples).all(-1).sum(1).tolist() == [24, 7, 24]
    two = one(weight, features[labels != 2][:60], labels[labels != 2][:60] % 2 * 3)
    assert two.three == ()
    assert two.corners.shape == (0, 2)


def test_what_has_vanished_is_nan() -> None:
    weight, features, labels = made(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gone = one(weight, torch.full_like(features, 3.0), labels)
        no_weight = one(torch.zeros_like(weight), features, labels)
        on_a_line = one(weight, labels[:, None] * torch.ones(6), labels)
    assert np.isnan(gone.means).all()
    assert np.isnan(gone.product).all()
    assert np.isfinite(gone.weight).all()
    assert gone.three == on_a_line.three == ()
    assert np.isnan(no_weight.weight).all()
    assert np.isnan(no_weight.singular_values).all()
    assert np.isnan(no_weight.rows).all()
    assert np.isfinite(no_weight.samples).all()
    for snapshot in (gone, no_weight, on_a_line):
        assert_equal(Snapshot.from_bytes(snapshot.to_bytes()), snapshot)


def assert_equal(read: Snapshot, written: Snapshot) -> None:
    """Up to the rounding of float16."""
    assert (read.classes, read.three) == (written.classes, written.three)
    for name in FIELDS:
        one, other = getattr(read, name), getattr(written, name)
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 3, 10, 40])
def test_bytes_are_few_and_give_it_back(classes: int) -> None:
    snapshot = one(*made(classes, 20))
    content = snapshot.to_bytes()
    assert len(content) < (850 if classes <= 10 else 1500)
    assert_equal(Snapshot.from_bytes(content), snapshot)
    assert Snapshot.from_bytes(content).to_bytes() == content


def test_values_beyond_float16_are_kept_within_it() -> None:
    weight, features, labels = made(4, 6)
    features[0] += 1e20  # one sample is far away, and draws its class's mean with it
    read = Snapshot.from_bytes(one(1e30 * weight, features, labels).to_bytes())
    assert read.singular_values.max() > 1e30
    assert np.isfinite(read.samples).all()


def damaged(content: bytes, **changes: Any) -> bytes:
    """A snapshot with other bytes, whose checksum is right."""
    rest = bytearray(content[4:])
    for at, value in changes.values():
        rest[at - 4 : at - 4 + len(value)] = value
    return struct.pack("<I", zlib.crc32(rest)) + bytes(rest)


def test_anything_else_is_refused() -> None:
    content = one(*made(4, 6)).to_bytes()
    others: list[object] = [None, "x", 3, b"", content[:20], content[:-2], content + b"\0\0", bytes(len(content))]
    others += [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content))]
    header = 4 + 1 + 4 + 1 + 1 + 12
    others += [
        damaged(content, version=(4, b"\2")), damaged(content, classes=(5, struct.pack("<I", 1))),
        damaged(content, classes=(5, struct.pack("<I", 2**31))), damaged(content, values=(9, b"\5")),
        damaged(content, samples=(10, b"\x19")), damaged(content, three=(11, struct.pack("<3I", 0, 0, 1))),
        damaged(content, three=(11, struct.pack("<3I", 0, 1, 4))),
        damaged(content, value=(header, struct.pack("<f", -1.0))),
        damaged(content, value=(header + 4, struct.pack("<f", 1e9))),
        damaged(content, cosine=(header + 16, struct.pack("<e", 1.5))),
        damaged(content, sample=(len(content) - 2, struct.pack("<e", float("inf")))),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(ValueError, match="snapshot"):
            Snapshot.from_bytes(other)
    assert damaged(content) == content


def test_shapes_that_disagree_are_refused() -> None:
    weight, features, labels = made(4, 6)
    stats = ClassStats(4, 6, runs=1)
    stats.update(features[None], labels)
    for w, h, y in (
        (weight, features[None], labels), (weight[None, :3], features[None], labels),
        (weight[None], features[None], labels[:-1]), (weight[None], features[None, :, :-1], labels),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="do not go with statistics"):
            take_snapshots(w, stats, h, y)
