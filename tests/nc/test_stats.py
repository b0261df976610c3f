"""ClassStats against a float64 computation from all samples at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nc import ClassStats


def exact(features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means, Σ_W, Σ_B in float64, as the definitions have them."""
    h = features.double()
    means = torch.stack([h[labels == c].mean(0) for c in range(k)])
    residual = h - means[labels]
    centred = means - means.mean(0)
    return means, residual.T @ residual / len(h), centred.T @ centred / k


def sample(n: int, k: int, d: int, *, noise: float = 1.0, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(k), torch.randint(k, (n - k,), generator=g)])
    means = torch.randn(k, d, generator=g) * 10 / d**0.5 + offset
    return means[labels] + noise * torch.randn(n, d, generator=g), labels


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(2, 20),
    d=st.integers(1, 40),
    extra=st.integers(1, 200),
    batch=st.integers(1, 70),
    order=st.sampled_from(["random", "sorted"]),
    seed=st.integers(0, 99),
)
def test_matches_the_definitions(k: int, d: int, extra: int, batch: int, order: str, seed: int) -> None:
    h, y = sample(k + extra, k, d, seed=seed)
    if order == "sorted":
        h, y = h[y.argsort()], y.sort().values
    stats = ClassStats(k, d)
    for hb, yb in zip(h.split(batch), y.split(batch), strict=True):
        stats.update(hb, yb)
    means, within, between = exact(h, y, k)
    assert stats.counts.tolist() == y.bincount(minlength=k).tolist()
    assert relative(stats.means, means) < 1e-6
    assert relative(stats.within_cov(), within) < 1e-5
    assert relative(stats.between_cov(), between) < 1e-5
    assert relative(stats.global_mean, means.mean(0)) < 1e-5


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
@pytest.mark.parametrize(("noise", "bound"), [(1e-2, 1e-6), (1e-3, 1e-6), (1e-4, 1e-5)])
def test_keeps_its_digits_near_collapse(noise: float, bound: float, order: str) -> None:
    """Mean norm 10 at an offset of 50 per coordinate: E[xxᵀ] − μμᵀ in float32 gives a negative variance here."""
    h, y = sample(6000, 10, 64, noise=noise, offset=50.0)
    if order == "sorted":
        h, y = h[y.argsort()], y.sort().values
    stats = ClassStats(10, 64)
    for hb, yb in zip(h.split(128), y.split(128), strict=True):
        stats.update(hb, yb)
    _, within, _ = exact(h, y, 10)
    assert relative(stats.within_cov().trace(), within.trace()) < bound


def test_merge_is_as_if_all_had_come_here() -> None:
    h, y = sample(900, 7, 12, noise=1e-3, offset=30.0)
    y[300:600] = y[300:600].clamp(max=4)  # a part that lacks classes
    parts = []
    for hp, yp in zip(h.split(300), y.split(300), strict=True):
        parts.append(ClassStats(7, 12))
        parts[-1].update(hp, yp)
    merged = ClassStats(7, 12)
    for part in (parts[1], parts[0], parts[2]):
        merged.merge(part)
    together = ClassStats(7, 12)
    together.update(h, y)
    assert torch.equal(merged.counts, together.counts)
    assert relative(merged.means, together.means) < 1e-7
    assert relative(merged.within_cov(), together.within_cov()) < 1e-5
    with pytest.raises(ValueError, match="merge"):
        merged.merge(ClassStats(7, 11))


def test_stacked_runs_are_separate() -> None:
    h, y = sample(200, 4, 6)
    stacked = torch.stack([h, 3 * h + 5, h * float("nan")])
    stats = ClassStats(4, 6, runs=3)
    for hb, yb in zip(stacked.split(50, 1), y.split(50), strict=True):
        stats.update(hb, yb)
    for r in range(2):
        alone = ClassStats(4, 6)
        alone.update(stacked[r], y)
        assert relative(stats.means[r], alone.means) < 1e-6
        assert relative(stats.within_cov()[r], alone.within_cov()) < 1e-5
    assert stats.within_cov()[2].isnan().all()


def test_bf16_features_are_summed_in_float32() -> None:
    h, y = sample(5000, 5, 16, offset=10.0)
    stats = ClassStats(5, 16)
    stats.update(h.bfloat16(), y)
    _, within, _ = exact(h.bfloat16(), y, 5)
    assert relative(stats.within_cov(), within) < 1e-5


def test_empty_batch_and_bad_input_change_nothing() -> None:
    stats = ClassStats(3, 2)
    stats.update(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))
    before = stats.within_cov(), stats.means
    stats.update(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    for labels, error, text in [
        (torch.tensor([0, 3]), ValueError, r"\[0, 3\)"),
        (torch.tensor([-1, 0]), ValueError, r"\[0, 3\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "integers"),
        (torch.tensor([0]), ValueError, "expected features"),
    ]:
        with pytest.raises(error, match=text):
            stats.update(torch.zeros(2, 2), labels)
    assert torch.equal(stats.within_cov(), before[0])
    assert torch.equal(stats.means[:2], before[1][:2])
    assert stats.present.tolist() == [True, True, False]
    assert stats.means[2].isnan().all()
    with pytest.raises(ValueError, match="num_classes"):
        ClassStats(1, 2)
