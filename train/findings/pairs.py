"""Pairs of runs that differ in one setting only."""

import pandas as pd

from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Verdict
from ncollapse.train.findings.evidence import of_paper
from ncollapse.train.findings.statistics import Estimate, median_ratio, sign_test
from ncollapse.train.results.columns import METRICS

#: Settings from which a comparison counts as one without an effect where no more than half of them show it.
ENOUGH = 8
#: Of the sign test.
LEVEL = 0.05
#: How `ratio_below_one` tests and decides, for the description of a claim.
RULE = (
    "median ratio {ratio} over settings (of each, the median of its seeds), 95 % interval by bootstrap over settings "
    "and seeds, exact sign test over settings. Holds: below 1 in more than half of the settings with p < 0.05, and the "
    f"interval below 1. Fails: the opposite; or, of {ENOUGH} settings, no more than half are below 1. Else it is open."
)


def pairs_of(runs: pd.DataFrame, setting: str, low: float, high: float) -> pd.DataFrame:
    """Return the pairs of runs of the paper's optimizers that differ in one setting only, a row per pair.

    The partners of a pair in the coupling are runs of one family, for instance AdamW and Adam; runs without decay have
    no coupling and make no pair in it.

    Args:
        runs: rows of `load_runs`.
        setting: the setting that differs.
        low, high: its two values.

    Returns:
        The settings that both have, with `family`; `group`, a number for the settings without the seed; `id_low`,
        `id_high`, and each metric as `NAME_low` and `NAME_high`.
    """
    runs = of_paper(runs).drop(columns="setting")
    runs = runs[runs[setting].isin([low, high])]
    if setting == "coupling":
        runs = runs[runs.weight_decay > 0]
    # Optimizers differ in family and coupling only: an AdamW with a coupling of 1 is an Adam.
    hidden = ["optimizer", setting]
    runs = runs.assign(both=alike(runs, hidden), group=alike(runs, [*hidden, "seed"]))
    runs = runs.drop_duplicates(["both", setting])
    measured = ["id", *(name for name in METRICS if name in runs)]
    first, second = runs[runs[setting] == low], runs[runs[setting] == high]
    second = second[["both", *measured]]
    return first.merge(second, on="both", suffixes=("_low", "_high")).drop(columns=["both", setting])


def ratio_below_one(
    name: str, ratios: "pd.Series[float]", groups: "pd.Series[int]", counted: str = "settings"
) -> Comparison:
    """Compare ratios with 1, a setting counting once whatever its number of seeds.

    Holds where more than half of the settings are below 1 with p < 0.05 and the interval of the median is below 1 too.
    Fails where the opposite is so, or, with `ENOUGH` settings, where no more than half are below 1. Between, as where
    test and interval disagree, it is open: a few runs more or less would turn the verdict.
    """
    found = median_ratio(ratios, groups)
    share, p = sign_test(ratios, groups)
    more = {"share": share, "p": p, "pairs": float(found.values)}
    verdict = _verdict(found, share, p)
    return Comparison(name, "median ratio", found.value, verdict, found.groups, counted, found.low, found.high, more)


def _verdict(found: Estimate, share: float, p: float) -> Verdict:
    if share > 0.5 and p < LEVEL and found.high < 1:
        return "holds"
    if share <= 0.5 and (found.groups >= ENOUGH or (p < LEVEL and found.low > 1)):
        return "fails"
    return "not enough"
