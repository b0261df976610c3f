"""NC0–NC4: analytic cases, definitions in float64, invariances, and undefined cases."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ncollapse import ClassStats, metrics


def gather(features: Tensor, labels: Tensor, k: int) -> ClassStats:
    stats = ClassStats(k, features.shape[-1], dtype=torch.float64)
    stats.update(features, labels)
    return stats


def simplex(k: int, d: int) -> Tensor:
    """K points of a simplex ETF in d dimensions, randomly rotated."""
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return (torch.eye(k, d, dtype=torch.float64) - torch.eye(k, d, dtype=torch.float64).sum(0) / k) @ rotation


def blobs(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    labels = torch.cat([torch.arange(k), torch.randint(k, (n - k,))])
    return 3 * torch.randn(k, d, dtype=torch.float64)[labels] + torch.randn(n, d, dtype=torch.float64), labels


def every_metric(weight: Tensor, stats: ClassStats) -> dict[str, float]:
    values = {
        "nc1": metrics.nc1(stats),
        "nc1_trace_ratio": metrics.nc1(stats, kind="trace_ratio"),
        "nc1_cdnv": metrics.nc1(stats, kind="cdnv"),
        "nc2": metrics.nc2(stats),
        "nc2_equinorm": metrics.nc2(stats, kind="equinorm"),
        "nc2_equiangularity": metrics.nc2(stats, kind="equiangularity"),
        "nc3": metrics.nc3(weight, stats),
        "nc3_difference": metrics.nc3(weight, stats, kind="difference"),
    }
    return {name: value.item() for name, value in values.items()}


@pytest.mark.parametrize(("k", "d"), [(2, 1), (2, 5), (4, 4), (10, 64), (50, 60)])
def test_a_collapsed_classifier_is_zero_everywhere(k: int, d: int) -> None:
    points = simplex(k, d) if d >= k else torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    labels = torch.arange(k).repeat(5)
    features = 7 * points[labels] + 100
    stats = gather(features, labels, k)
    for name, value in every_metric(points, stats).items():
        assert value == pytest.approx(0, abs=1e-12), name
    for kind in ("etf", "equinorm", "equiangularity"):
        assert metrics.nc2(points, kind=kind).item() == pytest.approx(0, abs=1e-12)
    assert metrics.nc0(points).item() == pytest.approx(0, abs=1e-24)
    assert metrics.nc4(features, (features - 100) @ points.T, stats) == 0
    assert not metrics.degenerate(points, stats)


def test_nc0_is_the_norm_of_the_row_sum() -> None:
    weight = torch.tensor([[1.0, 2.0], [2.0, 2.0]])
    assert metrics.nc0(weight).item() == 25
    assert metrics.nc0(weight, kind="norm").item() == 5
    assert metrics.nc0(weight, kind="per_class").item() == 12.5
    assert metrics.nc0(weight.repeat(3, 1, 1)).tolist() == [25, 25, 25]
    with pytest.raises(ValueError, match="kind is 'squared', 'norm', 'per_class'; got 'root'"):
        metrics.nc0(weight, kind="root")  # type: ignore[arg-type]


def test_known_covariances_give_the_known_nc1() -> None:
    """Means at ±e_i·s, noise of variance σ² in every direction: Σ_B = (s²/d)·I of rank d, NC1 = σ²·d·d/(s²·K)."""
    d, s = 3, 2.0
    means = s * torch.cat([torch.eye(d), -torch.eye(d)]).double()
    spread = torch.cat([torch.eye(d), -torch.eye(d)]).double()  # second moment I/d
    features = (means[:, None] + spread[None]).reshape(-1, d)
    labels = torch.arange(2 * d).repeat_interleave(2 * d)
    stats = gather(features, labels, 2 * d)
    sigma2, between = 1 / d, s**2 / d
    assert metrics.nc1(stats).item() == pytest.approx(d * sigma2 / between / (2 * d))
    assert metrics.nc1(stats, per_class=False).item() == pytest.approx(d * sigma2 / between)
    assert metrics.nc1(stats, kind="trace_ratio").item() == pytest.approx(sigma2 / between)
    # Pairs e_i, −e_i have distance 2s, all others √2·s; every class has variance d σ² = 1.
    pairs = d * [1 / (4 * s**2)] + d * (2 * d - 2) * [1 / (2 * s**2)]
    assert metrics.nc1(stats, kind="cdnv").item() == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("balance", ["class", "sample", "sample_mean"])
def test_conventions_for_classes_of_different_size(balance: Literal["class", "sample", "sample_mean"]) -> None:
    k, d = 4, 6
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 5 + [3] * 2)
    features = 3 * torch.randn(k, d, dtype=torch.float64)[labels] + torch.randn(len(labels), d, dtype=torch.float64)
    means = torch.stack([features[labels == c].mean(0) for c in range(k)])
    share = labels.bincount() / len(labels)
    middle = means.mean(0) if balance == "class" else features.mean(0)
    weights = share if balance == "sample" else torch.full((k,), 1 / k)
    m = means - middle
    between = sum(w * torch.outer(row, row) for w, row in zip(weights.double(), m, strict=True))
    residuals = features - means[labels]
    within = residuals.T @ residuals / len(labels)
    stats, weight = gather(features, labels, k), torch.randn(k, d, dtype=torch.float64)
    expected = (within @ torch.linalg.pinv(between, rtol=1e-10)).trace() / k
    assert metrics.nc1(stats, balance=balance).item() == pytest.approx(expected.item(), rel=1e-6)
    expected = within.trace() / between.trace()
    assert metrics.nc1(stats, kind="trace_ratio", balance=balance).item() == pytest.approx(expected.item(), rel=1e-6)
    gram = m @ m.T
    ideal = (torch.eye(k) - 1 / k) / (k - 1) ** 0.5
    assert metrics.nc2(stats, balance=balance).item() == pytest.approx((gram / gram.norm() - ideal).norm().item())
    expected = (weight / weight.norm() - m / m.norm()).norm()
    assert metrics.nc3(weight, stats, kind="difference", balance=balance).item() == pytest.approx(expected.item())


def test_cdnv_matches_its_definition() -> None:
    features, labels = blobs(90, 5, 7)
    stats = gather(features, labels, 5)
    means = torch.stack([features[labels == c].mean(0) for c in range(5)])
    variance = torch.stack([(features[labels == c] - means[c]).square().sum(1).mean() for c in range(5)])
    pairs = [
        (variance[i] + variance[j]) / (2 * (means[i] - means[j]).square().sum())
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert metrics.nc1(stats, kind="cdnv").item() == pytest.approx(torch.stack(pairs).mean().item())


@settings(deadline=None, max_examples=40)
@given(k=st.integers(2, 12), d=st.integers(1, 30), n=st.integers(1, 100), seed=st.integers(0, 99))
def test_nc1_is_the_trace_with_the_pseudo_inverse(k: int, d: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    stats = gather(*blobs(k + n, k, d), k)
    expected = (stats.within_cov() @ torch.linalg.pinv(stats.between_cov(), rtol=1e-10)).trace() / k
    assert metrics.nc1(stats).item() == pytest.approx(expected.item(), rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(k=st.integers(2, 8), d=st.integers(8, 20), seed=st.integers(0, 99))
def test_rotation_scale_offset_and_relabelling_change_nothing(k: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    features, labels = blobs(20 * k, k, d)
    weight = torch.randn(k, d, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    order = torch.randperm(k)
    moved = 0.01 * features @ rotation + 3
    other = torch.empty_like(weight)
    other[order] = 5 * weight @ rotation
    before = every_metric(weight, gather(features, labels, k))
    after = every_metric(other, gather(moved, order[labels], k))
    assert after == pytest.approx(before, rel=1e-8)


def test_nc4_counts_disagreement_with_the_nearest_mean() -> None:
    features = torch.tensor([[0.0], [1.0], [10.0], [11.0], [4.0]]) + 1e4
    labels = torch.tensor([0, 0, 1, 1, 0])
    stats = gather(features[:4], labels[:4], 2)
    logits = torch.tensor(
        [[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
    )  # the last sample: mean 0 is nearest, class 1 is predicted
    assert metrics.nc4(features, logits, stats).item() == pytest.approx(1 / 5)
    assert metrics.nc4(features, logits.flip(1), stats).item() == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="at least one sample"):
        metrics.nc4(features[:0], logits[:0], stats)


def test_nc4_takes_the_logits_with_their_bias() -> None:
    features, labels = blobs(200, 4, 8)
    stats = gather(features, labels, 4)
    weight, bias = torch.randn(4, 8, dtype=torch.float64), 50 * torch.eye(4, dtype=torch.float64)[2]
    nearest = torch.cdist(features, stats.means).argmin(1)
    assert metrics.nc4(features, features @ weight.T + bias, stats).item() == (nearest != 2).double().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_mean_is_right_at_large_offsets(dtype: torch.dtype) -> None:
    """‖h‖² − 2 hᵀμ + ‖μ‖² in float32 has no correct digit at this offset."""
    means = torch.randn(6, 16, dtype=torch.float64)
    features, labels = means.repeat(50, 1) + 0.1 * torch.randn(300, 16, dtype=torch.float64), torch.arange(300) % 6
    far, moved = (features + 3000).to(dtype), means + 3000
    assert torch.equal(metrics.nearest_class(far, moved), labels)
    moved[3] = float("nan")
    assert 3 not in metrics.nearest_class(far, moved)
    stacked = metrics.nearest_class(torch.stack([far, far]), torch.stack([moved, means + 3000]))
    assert torch.equal(stacked[1], labels)


def test_a_missing_class_is_left_out_and_named() -> None:
    features, labels = blobs(60, 4, 8)
    weight = torch.randn(4, 8, dtype=torch.float64)
    keep = labels != 2
    full = ClassStats(4, 8, dtype=torch.float64)
    full.update(features[keep], labels[keep])
    without = ClassStats(3, 8, dtype=torch.float64)
    without.update(features[keep], labels[keep] - (labels[keep] > 2).long())
    with pytest.warns(UserWarning, match="no samples of class 2"):
        values = every_metric(weight, full)
    assert values == pytest.approx(every_metric(weight[[0, 1, 3]], without))
    logits = features[keep] @ weight.T
    logits[:, 2] = -1e9
    nearest = metrics.nc4(features[keep], logits, full)
    assert nearest == metrics.nc4(features[keep], logits[:, [0, 1, 3]], without)
    with pytest.raises(ValueError, match="at least two classes; got 0"):
        metrics.nc1(ClassStats(4, 8))


def test_too_few_dimensions_are_warned_of() -> None:
    stats = gather(*blobs(40, 5, 3), 5)
    stats.name = "layer2"
    with pytest.warns(UserWarning, match="layer2: 5 classes cannot form a simplex in 3 dimensions"):
        metrics.nc2(stats)
    with pytest.warns(UserWarning, match="the weight: 5 classes cannot form a simplex in 3 dimensions"):
        metrics.nc2(torch.randn(5, 3))


@pytest.mark.parametrize("case", ["features", "zero features", "weights"])
def test_vanished_features_are_undefined_not_collapsed(case: str) -> None:
    features, labels = blobs(60, 4, 8)
    weight = torch.randn(4, 8, dtype=torch.float64)
    if case == "features":
        features = torch.full_like(features, 3.0)
    elif case == "zero features":
        features = torch.zeros_like(features)
    else:
        weight *= 1e-12
    stats = gather(features, labels, 4)
    assert metrics.degenerate(weight, stats)
    if case == "weights":
        values, undefined = every_metric(weight, stats), ["nc3", "nc3_difference"]
    else:
        with pytest.warns(UserWarning, match="the class means have vanished or are all the same"):
            values = every_metric(weight, stats)
        undefined = list(values)
    assert [name for name, value in values.items() if math.isnan(value)] == undefined


def test_a_run_that_is_nan_does_not_affect_the_others() -> None:
    features, labels = blobs(60, 4, 8)
    stacked = torch.stack([features, features * float("nan"), features])
    weight = torch.randn(3, 4, 8, dtype=torch.float64)
    stats = ClassStats(4, 8, runs=3, dtype=torch.float64, nan_policy="propagate")
    stats.update(stacked, labels)
    cdnv, ratio = metrics.nc1(stats, kind="cdnv"), metrics.nc1(stats, kind="trace_ratio")
    for value in (metrics.nc1(stats), cdnv, ratio, metrics.nc2(stats), metrics.nc3(weight, stats)):
        assert value.isnan().tolist() == [False, True, False]
    nc4 = metrics.nc4(stacked, stacked @ weight.mT, stats)
    assert nc4.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [1e-22, 1e-25, 1e20])
def test_variances_that_under_or_overflow_are_undefined(scale: float) -> None:
    features, labels = blobs(400, 4, 16)
    stats = ClassStats(4, 16)
    stats.update(scale * features.float(), labels)
    weight = torch.randn(4, 16)
    for value in (metrics.nc1(stats), metrics.nc1(stats, kind="trace_ratio"), metrics.nc1(stats, kind="cdnv")):
        assert value.isnan()
    assert stats.within_variances().isnan().all()
    assert metrics.nc2(stats).isfinite()  # the means are exact
    assert metrics.degenerate(weight, stats)


@pytest.mark.parametrize("noise", [1e-6, 1e-10])
def test_float64_features_have_the_digits_of_float64(noise: float) -> None:
    """The same directions at a thousandth of the noise: a millionth of the variance."""
    labels = torch.arange(400) % 4
    means, directions = torch.randn(4, 16, dtype=torch.float64), torch.randn(400, 16, dtype=torch.float64)
    of = {}
    for size in (1e-3, noise):
        stats = ClassStats(4, 16)
        stats.update(means[labels] + size * directions, labels)
        assert stats.dtype == torch.float64
        of[size] = metrics.nc1(stats)
    expected = of[1e-3].item() * (noise / 1e-3) ** 2
    assert of[noise].item() == pytest.approx(expected, rel=1e-4 if noise == 1e-10 else 1e-3)


def test_equal_samples_are_collapsed_and_single_samples_unknown() -> None:
    means = torch.randn(4, 6)
    for copies in (1, 2):
        stats = ClassStats(4, 6)
        stats.update(means.repeat(copies, 1), torch.arange(4).repeat(copies))
        if copies == 2:
            assert [metrics.nc1(stats, kind=kind).item() for kind in ("pinv", "trace_ratio", "cdnv")] == [0, 0, 0]
            continue
        for kind in ("pinv", "trace_ratio", "cdnv"):
            with pytest.warns(UserWarning, match=r"every class has one sample: NC1 is unknown \(NaN\)"):
                assert metrics.nc1(stats, kind=kind).isnan()


def test_a_weight_that_has_vanished_has_no_geometry() -> None:
    features, labels = blobs(60, 4, 8)
    stats, weight = gather(features, labels, 4), torch.zeros(4, 8)
    for value in (metrics.nc2(weight), metrics.nc3(weight, stats), metrics.unc3(weight, stats)):
        assert value.isnan()
    assert metrics.nc0(weight) == 0
    assert metrics.nc0(torch.full((4, 8), 1e200, dtype=torch.float64)).isnan()


def test_cdnv_of_means_that_nearly_agree() -> None:
    """Two means at a distance of 1e-7 of their norm, where a difference of squares has no digit."""
    spread = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=torch.float64)
    means = torch.tensor([[10.0, 0, 0], [10 + 1e-6, 0, 0], [0, 10, 0]], dtype=torch.float64)
    stats = gather((means[:, None] + spread).flatten(0, 1), torch.arange(3).repeat_interleave(2), 3)
    # Every class has variance 1.
    for exponent in (1.0, 2.0):
        near, far = ((distance**2) ** -exponent for distance in (means[1, 0] - 10, 200**0.5))
        other = (100 + (10 + 1e-6) ** 2) ** -exponent
        value = metrics.nc1(stats, kind="cdnv", exponent=exponent).item()
        assert value == pytest.approx(((near + far + other) / 3).item(), rel=1e-6)


def test_class_balanced_variance() -> None:
    """Variances 1 of 90 samples and 9 of 10: 1.8 over samples, 5 over classes; means at ±2, so tr Σ_B = 4."""
    signs = torch.tensor([[1.0], [-1]], dtype=torch.float64)
    features = torch.cat([2 + signs.repeat(45, 1), -2 + 3 * signs.repeat(5, 1)])
    stats = gather(features, torch.tensor([0] * 90 + [1] * 10), 2)
    assert stats.within_trace().item() == pytest.approx(1.8)
    assert metrics.nc1(stats, kind="trace_ratio").item() == pytest.approx(1.8 / 4)
    assert metrics.nc1(stats, kind="trace_ratio", within="class").item() == pytest.approx(5 / 4)
    with pytest.raises(ValueError, match='"pinv" needs within="sample"'):
        metrics.nc1(stats, within="class")
