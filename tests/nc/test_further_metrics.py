"""What other packages measure: analytic cases, and definitions in float64 pair by pair."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ncollapse import ClassStats, metrics
from ncollapse.result import LayerResult, further_of_head, nearest_numbers


def gather(features: Tensor, labels: Tensor, k: int, runs: int | None = None) -> ClassStats:
    stats = ClassStats(k, features.shape[-1], runs=runs)
    stats.update(features, labels)
    return stats


def simplex(k: int, d: int) -> Tensor:
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    return (torch.eye(k, d, dtype=torch.float64) - torch.eye(k, d, dtype=torch.float64).sum(0) / k) @ rotation


@pytest.fixture
def random() -> tuple[Tensor, ClassStats, Tensor, Tensor]:
    """W, statistics of 5 classes in 7 dimensions, features, labels; float64."""
    labels = torch.arange(60) % 5
    features = 3 * torch.randn(5, 7, dtype=torch.float64)[labels] + torch.randn(60, 7, dtype=torch.float64) + 2
    return torch.randn(5, 7, dtype=torch.float64), gather(features, labels, 5), features, labels


@pytest.mark.parametrize(("k", "d"), [(2, 3), (5, 5), (10, 32)])
def test_a_collapsed_classifier(k: int, d: int) -> None:
    points, labels = simplex(k, d), torch.arange(k).repeat(4)
    weight, stats = 3 * points, gather(7 * points[labels], labels, k)
    distance = math.sqrt(2 * k / (k - 1))
    for of in (weight, stats):
        assert metrics.gnc2(of).item() == pytest.approx(0, abs=1e-12)
        assert metrics.gnc2(of, kernel="riesz", exponent=2).item() == pytest.approx(0, abs=1e-12)
        assert metrics.gnc2(of, kind="mean").item() == pytest.approx(-math.log(distance))
        assert metrics.gnc2(of, kind="mean", kernel="riesz", exponent=3).item() == pytest.approx(distance**-3)
        assert metrics.effective_rank(of).item() == pytest.approx(k - 1)
        assert metrics.mean_rank(of).item() == k - 1
    assert metrics.unc3(weight, stats).item() == pytest.approx(0, abs=1e-7)
    assert metrics.global_logits(weight, None, stats).item() == pytest.approx(0, abs=1e-12)
    assert metrics.global_logits(weight, torch.full((k,), 2.0), stats).item() == pytest.approx(2 * k**0.5)
    found = further_of_head(weight, None, stats)[1]
    ideal = (torch.eye(k, dtype=torch.float64) - 1 / k) * k / (k - 1)
    for name in ("means", "weight"):
        torch.testing.assert_close(found[name], ideal)
    product = found["product"] / found["product"].norm()
    torch.testing.assert_close(product, ideal / ideal.norm())
    assert found["singular_values"][-1] < 1e-12
    torch.testing.assert_close(found["row_sum"][-1].item(), 1.0)


def test_four_points_on_a_circle_are_evenly_spread_but_no_simplex() -> None:
    weight = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert metrics.gnc2(weight, kind="mean").item() == pytest.approx(-(4 * math.log(2**0.5) + 2 * math.log(2)) / 6)
    crowded = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 1], [-1, 0], [0, -1]]), dim=1)
    for kernel in ("log", "riesz"):
        assert metrics.gnc2(crowded, kind="mean", kernel=kernel) > metrics.gnc2(weight, kind="mean", kernel=kernel)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel is 'log' or 'riesz'"):
        metrics.gnc2(weight, kernel="gauss")  # type: ignore[arg-type]


def test_they_are_their_definitions(random: tuple[Tensor, ClassStats, Tensor, Tensor]) -> None:
    weight, stats, features, labels = random
    means = torch.stack([features[labels == c].mean(0) for c in range(5)])
    m = means - means.mean(0)
    unit = m / m.norm(dim=1, keepdim=True)
    logs, powers = zip(
        *(
            (-math.log((unit[i] - unit[j]).norm()), float((unit[i] - unit[j]).norm()) ** -1.5)
            for i, j in itertools.permutations(range(5), 2)
        ),
        strict=True,
    )
    for energies, options in ((logs, {}), (powers, {"kernel": "riesz", "exponent": 1.5})):
        e = torch.tensor(energies, dtype=torch.float64)
        assert metrics.gnc2(stats, kind="mean", **options).item() == pytest.approx(e.mean().item())
        expected = e.std(correction=0) / e.abs().mean()
        assert metrics.gnc2(stats, **options).item() == pytest.approx(expected.item())
    aligned = m + 0.5 * weight
    cosines = torch.stack([w @ mu / (w.norm() * mu.norm()) for w, mu in zip(aligned, m, strict=True)])
    expected = cosines.std(correction=0) / cosines.mean()
    assert metrics.unc3(aligned, stats).item() == pytest.approx(expected.item())
    assert metrics.unc3(-aligned, stats).isnan()
    bias = torch.randn(5)
    expected = (weight @ means.mean(0) + bias).norm()
    assert metrics.global_logits(weight, bias, stats).item() == pytest.approx(expected.item())
    p = torch.linalg.svdvals(m)[:4]
    p = p / p.sum()
    assert metrics.effective_rank(stats).item() == pytest.approx(math.exp(-(p * p.log()).sum()))
    assert metrics.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item() == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )
    assert metrics.mean_rank(weight[:, :2] @ torch.randn(2, 6, dtype=torch.float64)).item() == 2
    other = torch.randn(9, 7) + 1
    mean = other.double().mean(0)
    expected = torch.stack([(mu @ mean / (mu.norm() * mean.norm())).abs() for mu in means]).mean()
    assert metrics.nc5(other, stats).item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="at least one sample"):
        metrics.nc5(other[:0], stats)


def test_data_orthogonal_to_all_class_means_have_no_nc5() -> None:
    labels = torch.arange(8) % 4
    stats = gather(torch.eye(4, 6)[labels], labels, 4)
    assert metrics.nc5(torch.eye(6)[4:], stats).item() == 0
    assert metrics.nc5(torch.eye(6)[:1], stats).item() == pytest.approx(1 / 4)


def test_agreement_counts_by_class_and_adds_up_over_batches(random: tuple[Tensor, ClassStats, Tensor, Tensor]) -> None:
    weight, stats, _, _ = random
    features, labels = 3 * torch.randn(40, 7, dtype=torch.float64) + 2, torch.arange(40) % 4
    predicted, nearest = (features @ weight.T).argmax(1), torch.cdist(features, stats.means).argmin(1)
    halves = [
        metrics.agreement(h, y, p, stats.means)
        for h, y, p in zip(features.split(23), labels.split(23), predicted.split(23), strict=True)
    ]
    counts = halves[0] + halves[1]
    assert counts[:, 0].tolist() == [10, 10, 10, 10, 0]
    for k in range(5):
        of = labels == k
        assert counts[k, 1] == (nearest[of] == k).sum()
        assert counts[k, 2] == (nearest[of] != predicted[of]).sum()
    numbers = nearest_numbers(counts)
    assert numbers["nearest_mean_accuracy"] == (nearest == labels).double().mean().item()
    assert math.isnan(numbers["nc4_per_class"][4])
    mean = metrics.nc4(features, features @ weight.T, stats).item()
    assert sum(numbers["nc4_per_class"][:4]) / 4 == pytest.approx(mean)
    stacked = metrics.agreement(
        torch.stack([features, features]), labels, torch.stack([predicted, labels]), stats.means
    )
    assert torch.equal(stacked[0], counts)


def test_stacked_runs_are_separate() -> None:
    labels = torch.arange(60) % 5
    features, weight = torch.randn(2, 60, 7) + 1, torch.randn(2, 5, 7)
    bias = torch.randn(2, 5)
    values, _ = further_of_head(weight, bias, gather(features, labels, 5, runs=2))
    for r in range(2):
        alone, _ = further_of_head(weight[r], bias[r], gather(features[r], labels, 5))
        assert {name: value[r].item() for name, value in values.items()} == pytest.approx(
            {name: value.item() for name, value in alone.items()}, rel=1e-5, nan_ok=True
        )
    features[1] *= math.nan
    stats = ClassStats(5, 7, runs=2, nan_policy="propagate")
    stats.update(features, labels)
    for name, value in further_of_head(weight, bias, stats)[0].items():
        if "weight" not in name:
            assert value.isnan().tolist() in ([False, True], [True, True]), name


def test_a_result_names_what_is_undefined() -> None:
    numbers = {"nc1": math.nan, "nc1_trace_ratio": 1.0, "nc1_cdnv": math.nan, "nc2": 0.1, "nc2_equinorm": 0.2}
    result = LayerResult(**numbers, nc2_equiangularity=0.3, gnc2=math.nan)
    assert result.undefined == ("nc1", "nc1_cdnv", "gnc2")
    assert "effective_rank" not in result.as_dict()
