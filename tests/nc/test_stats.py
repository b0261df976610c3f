"""`ClassStats` against float64 computations from all samples at once."""

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ncollapse import ClassStats
from ncollapse.metrics import nc1


def exact(features: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means, Σ_W and Σ_B in float64 by their definitions, of the classes with samples."""
    h = features.double()
    present = [c for c in range(k) if (labels == c).any()]
    residuals = h.clone()
    means = torch.stack([h[labels == c].mean(0) for c in present])
    for mean, c in zip(means, present, strict=True):
        residuals[labels == c] -= mean
    centred = means - means.mean(0)
    return means, residuals.T @ residuals / len(h), centred.T @ centred / len(present)


def exact_nc1(features: Tensor, labels: Tensor, k: int) -> float:
    means, within, _ = exact(features, labels, k)
    # From the singular values of the centred means; the last one is rounding error.
    _, s, v = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    rank = min(len(means) - 1, features.shape[1])
    s, v = s[:rank], v[:rank]
    return ((v @ within * v).sum(1) / s.square()).sum().item()


def sample(n: int, k: int, d: int, *, noise: float = 1.0, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of K classes: means of norm 10 plus an offset in every coordinate; each class has a sample if n ≥ k."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(min(n, k)), torch.randint(k, (max(0, n - k),), generator=g)])
    means = torch.randn(k, d, generator=g, dtype=torch.float64)
    means = 10 * means / means.norm(dim=1, keepdim=True) + offset
    return (means[labels] + noise * torch.randn(n, d, generator=g, dtype=torch.float64)).float(), labels


def gathered(h: Tensor, y: Tensor, k: int, batch: int = 10**9, **options: object) -> ClassStats:
    stats = ClassStats(k, h.shape[-1], **options)  # type: ignore[arg-type]
    for hb, yb in zip(h.split(batch, -2), y.split(batch), strict=True):
        stats.update(hb, yb)
    return stats


def two_passes(h: Tensor, y: Tensor, k: int, batch: int = 10**9) -> ClassStats:
    """Without a d × d matrix: first the means, then the second moment in their span."""
    stats = gathered(h, y, k, batch, moment="trace").projected()
    for hb, yb in zip(h.split(batch, -2), y.split(batch), strict=True):
        stats.update(hb, yb)
    return stats


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@settings(deadline=None, max_examples=60)
@given(
    k=st.integers(2, 50),
    d=st.integers(1, 600),
    extra=st.integers(0, 300),
    batch=st.sampled_from([1, 7, 64, 1000]),
    order=st.sampled_from(["random", "sorted"]),
    gone=st.integers(0, 3),
    rare=st.booleans(),
    seed=st.integers(0, 99),
)
def test_matches_the_definitions(
    k: int, d: int, extra: int, batch: int, order: str, gone: int, rare: bool, seed: int
) -> None:
    h, y = sample(k + extra, k, d, seed=seed)
    keep = (y >= min(gone, k - 2)) & ((y != k - 1) | (torch.arange(len(y)) < k) | (not rare))
    h, y = h[keep], y[keep]
    if order == "sorted":
        h, y = h[y.argsort(stable=True)], y.sort().values
    stats = gathered(h, y, k, batch)
    means, within, between = exact(h, y, k)
    assert stats.counts.tolist() == y.bincount(minlength=k).tolist()
    assert relative(stats.means[stats.present], means) < 1e-6
    # Relative to the class means, which may cancel in the global mean (in one dimension to 1e-3 of them).
    assert (stats.global_mean - means.mean(0)).norm() < 1e-6 * means.norm()
    # If class means are nearly equal, their difference is mostly their rounding error, 1e-7 of the noise.
    assert (stats.between_cov() - between).norm() < 1e-5 * between.norm() + 2e-6 * between.norm().sqrt()
    assert stats.means[~stats.present].isnan().all()
    if extra:
        # Variances far below the squares from which they are computed have the error of float32 squares.
        assert (stats.within_cov() - within).norm() < 1e-5 * max(within.norm(), 0.01)
        assert stats.within_trace().item() == pytest.approx(within.trace().item(), rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    k=st.integers(2, 50),
    d=st.integers(1, 600),
    per_class=st.integers(2, 12),
    batch=st.sampled_from([1, 10, 100, 1000]),
    order=st.sampled_from(["random", "sorted"]),
    noise=st.sampled_from([1.0, 1e-2, 1e-4, 1e-5]),
    offset=st.sampled_from([0.0, 50.0, 1e3, 1e4]),
    seed=st.integers(0, 99),
)
def test_nc1_is_accurate_for_every_noise_and_offset(
    k: int, d: int, per_class: int, batch: int, order: str, noise: float, offset: float, seed: int
) -> None:
    """Noise down to 1e-6 of the norm of the means, offsets up to 1e3 of it; the reference is float64 of the data."""
    h, y = sample(k * per_class, k, d, noise=noise, offset=offset, seed=seed)
    if order == "sorted":
        h, y = h[y.argsort(stable=True)], y.sort().values
    truth = exact_nc1(h, y, k)
    # An error that no shift can avoid: the class means of float32 data are rounded, and NC1 amplifies that if two of
    # them are nearly equal (in few dimensions).
    _, s, _ = torch.linalg.svd(sum_free(h, y, k))
    assume(s[min(k - 1, d) - 1] > 1e-2)  # in one dimension two class means may coincide: NC1 is undefined
    amplified = 1e-6 * (s[0] / s[min(k - 1, d) - 1]).item() ** 2
    bound = 1e-5 + amplified if offset <= 50 else 1e-3 + amplified
    for stats in (gathered(h, y, k, batch), two_passes(h, y, k, batch)):
        with torch.no_grad():
            assert nc1(stats).item() == pytest.approx(truth, rel=bound)


def sum_free(h: Tensor, y: Tensor, k: int) -> Tensor:
    means = exact(h, y, k)[0]
    return means - means.mean(0)


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
@pytest.mark.parametrize(
    ("noise", "offset", "bound"),
    [(1e-2, 50.0, 1e-6), (1e-3, 50.0, 1e-6), (1e-4, 50.0, 1e-5), (1e-4, 1e3, 1e-3), (1e-2, 1e3, 1e-5)],
)
def test_nc1_near_collapse(noise: float, offset: float, bound: float, order: str) -> None:
    """Mean norm 10 at an offset of 50 per coordinate: E[xxᵀ] − μμᵀ in float32 gives a negative variance here."""
    h, y = sample(6000, 10, 64, noise=noise, offset=offset)
    if order == "sorted":
        h, y = h[y.argsort()], y.sort().values
    truth = exact_nc1(h, y, 10)
    assert nc1(gathered(h, y, 10, 128)).item() == pytest.approx(truth, rel=bound)
    assert nc1(two_passes(h, y, 10, 128)).item() == pytest.approx(truth, rel=bound)
    halves = [gathered(h[part], y[part], 10, 100) for part in (slice(3000, None), slice(3000))]
    halves[0].merge(halves[1])
    assert nc1(halves[0]).item() == pytest.approx(truth, rel=bound)


@pytest.mark.parametrize(
    ("first", "n", "batch"),
    [
        ("mislabelled", 300, 1),
        *[(first, 20_000, batch) for first in ("mislabelled", "outlier") for batch in (7, 128, 10**9)],
    ],
)
@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_the_order_of_samples_does_not_matter(first: str, n: int, order: str, batch: int) -> None:
    """The first sample of every class is one of another class, or that of one class is an outlier of 1e6."""
    h, y = sample(n, 10, 32, noise=1e-3, offset=50.0)
    if order == "sorted":
        h, y = h[y.argsort(stable=True)], y.sort().values
    at = torch.stack([(y == c).nonzero()[0, 0] for c in range(10)])
    if first == "outlier":
        h[at[3]] = 1e6
    else:
        h[at] = h[at.roll(1)]
    bound = 1e-3 if first == "outlier" else 1e-5
    _, within, between = exact(h, y, 10)
    stats = gathered(h, y, 10, batch)
    assert relative(stats.within_trace(), within.trace()) < bound
    assert relative(stats.between_cov(), between) < bound
    truth = exact_nc1(h, y, 10)
    assert nc1(stats).item() == pytest.approx(truth, rel=bound)
    assert nc1(two_passes(h, y, 10, batch)).item() == pytest.approx(truth, rel=bound)
    assert relative(nc1(stats, kind="trace_ratio"), within.trace() / between.trace()) < bound


def test_what_each_moment_keeps() -> None:
    h, y = sample(500, 5, 16)
    full, trace, projected = gathered(h, y, 5), gathered(h, y, 5, moment="trace"), two_passes(h, y, 5)
    for stats in (trace, projected):
        assert relative(stats.means, full.means) < 1e-12
        assert relative(stats.within_trace(), full.within_trace()) < 1e-12
        assert relative(stats.within_variances(), full.within_variances()) < 1e-12
        with pytest.raises(ValueError, match="does not keep the second moment"):
            stats.within_cov()
    m = full.centred_means()
    assert relative(projected.within_cov(m), full.within_cov(m)) < 1e-5
    assert relative(full.within_cov(m), m @ full.within_cov() @ m.T) < 1e-12
    assert full.within_cov().trace().item() == pytest.approx(full.within_trace().item(), rel=1e-6)
    with pytest.raises(ValueError, match="moment='trace' does not keep"):
        nc1(trace)
    with pytest.warns(UserWarning, match="of the class means lie outside the axes"):
        projected.within_cov(torch.randn(3, 16, dtype=torch.float64))


def test_axes_of_an_earlier_pass_suffice_if_the_means_have_not_moved() -> None:
    h, y = sample(500, 5, 16)
    means = gathered(h, y, 5).means
    assert nc1(gathered(h, y, 5, moment="projected", axes=means)).item() == pytest.approx(
        nc1(gathered(h, y, 5)).item(), rel=1e-5
    )


@pytest.mark.parametrize("projected", [False, True], ids=["full", "projected"])
def test_merged_statistics_equal_those_of_all_batches(projected: bool) -> None:
    h, y = sample(900, 7, 12, noise=1e-3, offset=30.0)
    y[300:600] = y[300:600].clamp(max=4)  # this part has no samples of two classes
    first = gathered(h, y, 7, moment="trace")

    def empty() -> ClassStats:
        return first.projected() if projected else ClassStats(7, 12)

    parts = []
    for hp, yp in zip(h.split(300), y.split(300), strict=True):
        parts.append(empty())
        parts[-1].update(hp, yp)
    merged, whole, m = empty(), empty(), first.centred_means()
    whole.update(h, y)
    for order in ((1, 0, 2), (2, 1, 0)):
        merged.reset()
        assert merged.counts.sum() == 0
        for i in order:
            merged.merge(parts[i])
        assert torch.equal(merged.counts, whole.counts)
        assert relative(merged.means, whole.means) < 1e-7
        assert relative(merged.within_variances(), whole.within_variances()) < 1e-5
        assert relative(merged.within_cov(m), whole.within_cov(m)) < 1e-5
    with pytest.raises(ValueError, match="merge"):
        merged.merge(ClassStats(7, 11))
    with pytest.raises(ValueError, match="merge"):
        merged.merge(ClassStats(7, 12, moment="trace"))
    if projected:
        with pytest.raises(ValueError, match="other axes"):
            merged.merge(ClassStats(7, 12, moment="projected", axes=torch.randn(7, 12)))


def test_stacked_runs_are_separate() -> None:
    h, y = sample(200, 4, 6)
    stacked = torch.stack([h, 3 * h + 5, h * float("nan")])
    stats = gathered(stacked, y, 4, 50, runs=3, nan_policy="propagate")
    again = stats.projected()
    again.update(stacked, y)
    for r in range(2):
        alone = gathered(stacked[r], y, 4)
        assert relative(stats.means[r], alone.means) < 1e-6
        assert relative(stats.within_cov()[r], alone.within_cov()) < 1e-5
        assert relative(nc1(again)[r], nc1(alone)) < 1e-5
    assert stats.within_cov()[2].isnan().all()
    assert nc1(again)[2].isnan()


def test_half_precision_features_are_summed_in_float32() -> None:
    h, y = sample(5000, 5, 16, offset=10.0)
    for half in (torch.bfloat16, torch.float16):
        stats = gathered(h.to(half), y, 5)
        assert relative(stats.within_cov(), exact(h.to(half), y, 5)[1]) < 1e-5


def test_state_can_be_saved_moved_copied_and_reset() -> None:
    h, y = sample(300, 5, 8)
    stats = gathered(h[:200], y[:200], 5)
    resumed = ClassStats(5, 8)
    resumed.load_state_dict(stats.state_dict())
    for other in (resumed, copy.deepcopy(stats), pickle.loads(pickle.dumps(stats)), stats.to("cpu")):
        other.update(h[200:], y[200:])
        assert relative(other.within_cov(), gathered(h, y, 5).within_cov()) < 1e-6
        assert other.device.type == "cpu"
    with pytest.raises(ValueError, match=r"it holds .*scatter \(8, 8\).*these statistics hold .*scatter \(9, 9\)"):
        ClassStats(5, 9).load_state_dict(stats.state_dict())
    stats.reset()
    stats.update(h, y)
    assert relative(stats.within_cov(), gathered(h, y, 5).within_cov()) < 1e-6


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("features", "labels", "error", "text"),
    [
        ([[1.0, 2], [3, 4]], [0, 3], ValueError, r"1 labels outside \[0, 3\)"),
        ([[1.0, 2], [3, 4]], [-1, 7], ValueError, r"2 labels outside \[0, 3\)"),
        ([[1.0, 2], [3, 4]], [0.0, 1.0], TypeError, "labels must be integers, got torch.float32"),
        ([[1.0, 2], [3, 4]], [True, False], TypeError, "labels must be integers, got torch.bool"),
        ([[1, 2], [3, 4]], [0, 1], TypeError, "features must be floating, got torch.int64"),
        ([[1.0, 2], [3, 4]], [0], ValueError, r"expected features \(1, 2\) with labels \[B\]; got \(2, 2\)"),
        ([[1.0], [3]], [0, 1], ValueError, r"expected features \(2, 2\)"),
        ([[1.0, 2], [3, 4]], [[0], [1]], ValueError, r"got \(2, 2\) and \(2, 1\)"),
        ([[NAN, 2], [INF, -INF]], [0, 1], ValueError, "3 values that are NaN or infinite"),
        ([[NAN, 2], [3, 4]], [0, 5], ValueError, "1 labels outside"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    features: list[list[float]], labels: list[float], error: type[Exception], text: str
) -> None:
    stats = ClassStats(3, 2, name="fc")
    stats.update(torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))
    before = stats.state_dict()
    stats.update(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    with pytest.raises(error, match=text) as raised:
        stats.update(torch.tensor(features), torch.tensor(labels))
    assert "'fc'" in str(raised.value)
    after = stats.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    stats.update(torch.zeros(1, 2), torch.tensor([2], dtype=torch.uint8))
    assert stats.counts.tolist() == [2, 2, 1]


def test_impossible_statistics_are_refused() -> None:
    for options, text in [
        ({"num_classes": 1}, "num_classes ≥ 2"),
        ({"dim": 0}, "dim ≥ 1"),
        ({"runs": 0}, "runs ≥ 1"),
        ({"moment": "half"}, "moment is 'full'"),
        ({"nan_policy": "omit"}, "nan_policy 'raise' or 'propagate'"),
        ({"moment": "projected"}, "needs axes"),
        ({"axes": torch.ones(2, 4)}, "needs axes"),
        ({"moment": "projected", "axes": torch.ones(2, 5)}, r"axes must be \('m', 4\), got \(2, 5\)"),
        ({"dtype": torch.bfloat16}, "dtype is torch.float32"),
    ]:
        with pytest.raises(ValueError, match=text):
            ClassStats(**({"num_classes": 3, "dim": 4} | options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balance is 'class'"):
        gathered(*sample(10, 2, 3), 2).centred_means("none")  # type: ignore[arg-type]


def test_in_a_compiled_function_the_first_read_of_a_result_raises_the_error() -> None:
    """As on a GPU, where `update` does not wait for the result of its checks."""
    stats = ClassStats(4, 6)
    update = torch.compile(stats.update, backend="aot_eager", fullgraph=True)
    h, y = sample(100, 4, 6)
    update(h, y)
    update(h, y + 1)
    bad = h.clone()
    bad[3, 2] = NAN
    update(bad, y)
    labels = int((y == 3).sum())
    with pytest.raises(ValueError, match=f"2 batches were refused, for {labels} labels outside .* and 1 values"):
        _ = stats.means
    assert relative(stats.within_cov(), gathered(h, y, 4).within_cov()) < 1e-6
