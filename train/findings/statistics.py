"""Tests and intervals for values that are grouped: several seeds of a setting are one group, not several experiments.

Intervals are 95 % percentile intervals of a bootstrap that draws groups with replacement, and then values within each
drawn group (Davison & Hinkley 1997, section 3.8). The generator is fixed, so that the same runs give the same numbers.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: Resamples of the bootstrap of a median, and of a correlation, which takes longer.
RESAMPLES, _RESAMPLES_OF_RANKS = 2_000, 500
_PERCENTILES = (2.5, 97.5)
#: Numbers of a bootstrap in memory at a time.
_AT_ONCE = 2_000_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval, NaN with less than two groups.

    Attributes:
        value: the statistic of all values; NaN without any.
        low, high: its interval.
        groups: number of groups, for instance settings.
        values: number of values in them, for instance pairs of runs.
    """

    value: float
    low: float
    high: float
    groups: int
    values: int


def grouped(values: ArrayLike, groups: ArrayLike) -> Floats:
    """Return finite values as a row per group, `[G, S]`, NaN where a group has fewer than S.

    Args:
        values: `[N]`.
        groups: what each belongs to, `[N]`.
    """
    numbers, of_groups = np.asarray(values, np.float64), np.asarray(groups)
    kept = np.isfinite(numbers)
    numbers, of_groups = numbers[kept], of_groups[kept]
    if not len(numbers):
        return np.empty((0, 0))
    _, codes, counts = np.unique(of_groups, return_inverse=True, return_counts=True)
    order = np.argsort(codes, kind="stable")
    place = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), int(counts.max())), np.nan)
    table[codes[order], place] = numbers[order]
    return table


def medians(table: Floats) -> Floats:
    """Return the median of each row of `grouped`, NaN apart: `[…, S]` to `[…]`."""
    ordered = np.sort(table, axis=-1)  # NaN last
    count = np.isfinite(table).sum(axis=-1)
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    high = np.minimum(high, np.maximum(count - 1, 0))
    middle = [np.take_along_axis(ordered, i[..., None], axis=-1)[..., 0] for i in (low, high)]
    return np.asarray((middle[0] + middle[1]) / 2)


def resampled_medians(
    values: ArrayLike, groups: ArrayLike, statistic: Callable[[Floats], Floats] = medians, *, seed: int = 0,
    redraw_groups: bool = True,
) -> Floats:  # fmt: skip
    """Return a statistic of resampled values, `[RESAMPLES]`: of the medians within groups; empty without values.

    Args:
        values, groups: `[N]`, as for `grouped`.
        statistic: of the medians of all groups, `[B, G]` to `[B]`; by default their median.
        seed: of the resampling: two samples that are compared need two.
        redraw_groups: whether groups are drawn too; if not, only values within each.
    """
    table = grouped(values, groups)
    if not table.size:
        return np.empty(0)
    random, (count, most) = np.random.default_rng(seed), table.shape
    sizes = np.isfinite(table).sum(axis=1)
    found = []
    step = max(1, min(RESAMPLES, _AT_ONCE // table.size))
    for start in range(0, RESAMPLES, step):
        B = min(step, RESAMPLES - start)
        chosen = random.integers(count, size=(B, count)) if redraw_groups else np.tile(np.arange(count), (B, 1))
        size = sizes[chosen][..., None]
        inner = (random.random((B, count, most)) * size).astype(np.int64)
        drawn = np.where(np.arange(most) < size, table[chosen[..., None], inner], np.nan)
        found.append(statistic(medians(drawn)))
    return np.concatenate(found)


def interval(resampled: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of resampled statistics; NaN without any."""
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, _PERCENTILES)
    return float(low), float(high)


def median_of(values: ArrayLike, groups: ArrayLike) -> Estimate:
    """Return the median over groups of the median within each, with its interval.

    Args:
        values, groups: `[N]`, as for `grouped`.
    """
    table = grouped(values, groups)
    if not table.size:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    value = float(medians(medians(table)))
    low, high = interval(resampled_medians(values, groups)) if len(table) > 1 else (math.nan, math.nan)
    return Estimate(value, low, high, len(table), int(np.isfinite(table).sum()))


def median_ratio(ratios: ArrayLike, groups: ArrayLike) -> Estimate:
    """Return the median of ratios as `median_of` does, in the logarithm; ratios that are not positive do not count."""
    numbers = np.asarray(ratios, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = median_of(np.log(numbers), groups)
    value, low, high = (math.exp(x) if math.isfinite(x) else x for x in (found.value, found.low, found.high))
    return dataclasses.replace(found, value=value, low=low, high=high)


def sign_test(ratios: ArrayLike, groups: ArrayLike) -> tuple[float, float]:
    """Return the share of groups whose median ratio is below 1, and the exact two-sided p of "as many above as below".

    Ratios of 1 count for neither in the test, and for half in the share; NaN without any ratio.
    """
    from scipy.stats import binomtest

    with np.errstate(divide="ignore", invalid="ignore"):
        table = grouped(np.log(np.asarray(ratios, np.float64)), groups)
    if not table.size:
        return math.nan, math.nan
    middle = medians(table)
    below, above = int((middle < 0).sum()), int((middle > 0).sum())
    p = float(binomtest(below, below + above).pvalue) if below + above else math.nan
    return (below + (len(middle) - below - above) / 2) / len(middle), p


def share_of(successes: int, count: int) -> Estimate:
    """Return a share with its exact interval (Clopper and Pearson); NaN of nothing."""
    from scipy.stats import binomtest

    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    found = binomtest(successes, count).proportion_ci(0.95)
    return Estimate(successes / count, float(found.low), float(found.high), count, count)


def spearman(x: ArrayLike, y: ArrayLike, groups: ArrayLike | None = None) -> Estimate:
    """Return Spearman's rank correlation, its interval by resampling groups with all their values.

    Args:
        x, y: `[N]`; pairs with a value that is not finite do not count.
        groups: what each belongs to, `[N]`, for instance settings; by default each is its own group.
    """
    from scipy.stats import spearmanr

    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    of_groups = np.arange(len(first)) if groups is None else np.asarray(groups)
    kept = np.isfinite(first) & np.isfinite(second)
    first, second, of_groups = first[kept], second[kept], of_groups[kept]
    names, codes = np.unique(of_groups, return_inverse=True)
    count = len(names)
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return Estimate(math.nan, math.nan, math.nan, count, len(first))
    value = float(spearmanr(first, second).statistic)
    if count < 2:
        return Estimate(value, math.nan, math.nan, count, len(first))
    random, resampled = np.random.default_rng(0), []
    step = max(1, _AT_ONCE // len(first))
    for start in range(0, _RESAMPLES_OF_RANKS, step):
        drawn = random.multinomial(count, np.full(count, 1 / count), size=min(step, _RESAMPLES_OF_RANKS - start))
        times = drawn[:, codes].astype(np.float64)
        resampled.append(_weighted_correlation(_weighted_ranks(first, times), _weighted_ranks(second, times), times))
    return Estimate(value, *interval(np.concatenate(resampled)), count, len(first))


def _weighted_ranks(values: Floats, times: Floats) -> Floats:
    """Return the mean ranks of values, `[N]`, that samples have `times`, `[B, N]`, less a constant: `[B, N]`."""
    order = np.argsort(values, kind="stable")
    _, starts, codes = np.unique(values[order], return_index=True, return_inverse=True)
    blocks = np.add.reduceat(times[:, order], starts, axis=1)  # of equal values
    ranks = np.empty_like(times)
    ranks[:, order] = (np.cumsum(blocks, axis=1) - blocks / 2)[:, codes]
    return ranks


def _weighted_correlation(x: Floats, y: Floats, times: Floats) -> Floats:
    """Return Pearson's correlation of each sample, `[B]`; NaN where one of the two is constant."""
    total = times.sum(axis=1, keepdims=True)
    x, y = (values - (values * times).sum(axis=1, keepdims=True) / total for values in (x, y))
    products = ((times * x * y).sum(axis=1), (times * x * x).sum(axis=1), (times * y * y).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(products[0] / np.sqrt(products[1] * products[2]))
