"""Tests and intervals of grouped values, against scipy, against loops, and against what is known of the data."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ncollapse.train.findings.lacking import between
from ncollapse.train.findings.pairs import ratio_below_one
from ncollapse.train.findings.statistics import (
    _weighted_correlation,
    _weighted_ranks,
    grouped,
    median_of,
    median_ratio,
    medians,
    resampled_medians,
    share_of,
    sign_test,
    spearman,
)

RANDOM = np.random.default_rng(0)


def test_groups_are_rows() -> None:
    table = grouped([1.0, 2.0, math.nan, 3.0, 4.0], [7, 5, 5, 7, 5])
    np.testing.assert_array_equal(table, [[2.0, 4.0], [1.0, 3.0]])
    assert grouped([math.nan], [0]).size == 0


def test_medians_are_numpys() -> None:
    table = RANDOM.standard_normal((50, 6))
    table[RANDOM.random(table.shape) < 0.3] = math.nan
    table[:, 0] = 1.0
    np.testing.assert_allclose(medians(table), np.nanmedian(table, axis=1))


def test_the_median_counts_a_group_once() -> None:
    found = median_of([1, 1, 1, 1, 2, 3], [0, 0, 0, 0, 1, 2])
    assert (found.value, found.groups, found.values) == (2.0, 3, 6)
    assert found.low == 1.0
    assert found.high == 3.0
    one = median_of([1.0, 2.0], [0, 0])
    assert one.value == 1.5
    assert math.isnan(one.low)


def test_the_interval_covers_the_median() -> None:
    covered = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        levels = random.standard_normal(25)
        values = levels[:, None] + 0.3 * random.standard_normal((25, 3))
        found = median_of(values.ravel(), np.repeat(np.arange(25), 3))
        covered += found.low <= 0 <= found.high
    assert 52 <= covered <= 60


def test_groups_that_stay_have_a_narrower_interval() -> None:
    values, groups = [1.0, 1.1, 5.0, 5.1, 9.0, 9.2], [0, 0, 1, 1, 2, 2]
    drawn = resampled_medians(values, groups)
    kept = resampled_medians(values, groups, redraw_groups=False)
    assert np.ptp(drawn) > 7
    assert np.ptp(kept) == pytest.approx(0.1)
    np.testing.assert_array_equal(drawn, resampled_medians(values, groups))
    assert not np.array_equal(drawn, resampled_medians(values, groups, seed=1))


def test_ratios_are_compared_in_the_logarithm() -> None:
    found = median_ratio([0.5, 2.0, 0.0, math.nan], [0, 1, 2, 3])
    assert (found.value, found.groups) == (pytest.approx(1.0), 2)


def test_the_sign_test_is_exact() -> None:
    ratios, groups = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 1.0, 2.0], [0, 0, 1, 2, 3, 4, 5, 6]
    share, p = sign_test(ratios, groups)
    assert share == pytest.approx(5.5 / 7)
    assert p == stats.binomtest(5, 6).pvalue
    assert all(map(math.isnan, sign_test([], [])))
    assert share_of(3, 4).low == stats.binomtest(3, 4).proportion_ci().low


def test_rank_correlation_is_scipys() -> None:
    x = RANDOM.integers(0, 9, 80).astype(float)
    y = x + 3 * RANDOM.standard_normal(80)
    x[3] = math.nan
    found = spearman(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y, nan_policy="omit").statistic)
    assert found.low < found.value < found.high
    assert (found.groups, found.values) == (79, 79)
    wider = spearman(np.repeat(x, 4), np.repeat(y, 4), np.repeat(np.arange(80), 4))
    assert wider.value == pytest.approx(found.value)
    assert wider.high - wider.low == pytest.approx(found.high - found.low, rel=0.2)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]).value)


def test_resampled_ranks_are_those_of_the_samples() -> None:
    x, y = RANDOM.integers(0, 5, 20).astype(float), RANDOM.standard_normal(20)
    times = RANDOM.multinomial(20, np.full(20, 1 / 20), size=30).astype(float)
    found = _weighted_correlation(_weighted_ranks(x, times), _weighted_ranks(y, times), times)
    samples = [np.repeat(np.arange(20), row.astype(int)) for row in times]
    np.testing.assert_allclose(found, [stats.spearmanr(x[i], y[i]).statistic for i in samples])


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.9] * 14 + [1.05] * 5, "not enough"),  # the interval is below 1, p is 0.06
        ([0.9] * 8 + [1.2], "holds"),
        ([0.01] * 7 + [1.2] * 5, "not enough"),
        ([0.01] * 6 + [1.2] * 6, "fails"),
        ([0.9] * 7 + [1.2], "not enough"),
        ([1.1] * 9, "fails"),
        ([1.1] * 6, "fails"),
        ([1.1] * 5, "not enough"),
    ],
)
def test_what_a_few_settings_would_turn_is_open(ratios: list[float], verdict: str) -> None:
    found = ratio_below_one("any", pd.Series(ratios), pd.Series(range(len(ratios))))
    assert found.verdict == verdict


@given(st.lists(st.floats(1e-5, 10), min_size=1, max_size=20))
def test_values_between_others_are_new(values: list[float]) -> None:
    found = between(pd.Series(values))
    assert len(set(found)) == 2
    assert not set(found) & set(values)
    assert all(min(values) / 2 < value < 2 * max(values) for value in found)
