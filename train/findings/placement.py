"""Claim 7: SGD hardly cares where the decay stands, Adam does."""

import math

import numpy as np
import pandas as pd

from ncollapse.formatting import number
from ncollapse.optimizer_table import FAMILY, LABELS
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.lacking import between, lack
from ncollapse.train.findings.pairs import ENOUGH, pairs_of
from ncollapse.train.findings.statistics import interval, median_of, resampled_medians

_METRICS = ("nc0", "nc2", "nc3")
#: Effects below this are the rounding of float32.
_LEAST = 1e-6
#: Learning rates for a family that a folder lacks.
_USUAL_LR = {"sgd": 0.1, "adam": 1e-3}
_CLAIM = "SGD hardly cares where the decay stands, Adam does."
_TESTED = (
    "Pairs that differ in the coupling only, with momentum (without, SGD and SGDW are one update), at decays that SGD "
    "and Adam share, if any: the effect on a metric is |ln(coupled/decoupled)|. "
    f"The number is Adam's median effect divided by SGD's. Holds where its interval is above 1, with {ENOUGH} settings "
    "of each; fails where it is not."
)


def decay_placement(evidence: Evidence) -> Finding:
    """Compare the effect of the coupling on Adam with that on SGD, over pairs of runs that fit the training data."""
    pairs = pairs_of(evidence.fit, "coupling", 0.0, 1.0)
    pairs = pairs[pairs.family.isin(["sgd", "adam"]) & (pairs.momentum > 0)]
    shared = set.intersection(*(set(pairs.weight_decay[pairs.family == family]) for family in ("sgd", "adam")))
    pairs = pairs[pairs.weight_decay.isin(shared)] if shared else pairs
    matched = _at_equal_pull(evidence.fit)
    parts = tuple(_compare(name, pairs, matched) for name in _METRICS)
    runs = tuple(pd.unique(pd.concat([pairs.id_low, pairs.id_high]).astype(str)))
    return Finding(7, _CLAIM, _TESTED, _says(parts), parts, runs, *_lacks(evidence, pairs, parts))


def _compare(metric: str, pairs: pd.DataFrame, matched: pd.DataFrame) -> Comparison:
    by_family = {family: pairs[pairs.family == family] for family in ("sgd", "adam")}
    effects = {family: _effects(group, metric) for family, group in by_family.items()}
    found = {family: median_of(effects[family], by_family[family].group) for family in effects}
    adam, sgd = (
        resampled_medians(effects[family], by_family[family].group, seed=seed)
        for seed, family in enumerate(("adam", "sgd"))
    )
    value = found["adam"].value / found["sgd"].value
    fewest = min(one.groups for one in found.values())
    low, high = interval(adam / sgd) if fewest > 1 else (math.nan, math.nan)
    verdict: Verdict = "not enough"
    if fewest >= ENOUGH:
        verdict = "holds" if low > 1 else "fails"
    more = {
        **{f"{LABELS[family]}: factor": _exp(one.value) for family, one in found.items()},
        **{f"{LABELS[family]}: settings": float(one.groups) for family, one in found.items()},
        "SGD at equal pull: factor": _exp(median_of(_effects(matched, metric), matched.group).value),
        "SGD at equal pull: settings": float(matched.group.nunique()),
    }
    return Comparison(
        f"effect on {metric.upper()}, Adam against SGD", "ratio of median effects", value, verdict,
        sum(one.values for one in found.values()), "pairs", low, high, more,
    )  # fmt: skip


def _effects(pairs: pd.DataFrame, metric: str) -> "pd.Series[float]":
    """Return |ln(coupled/decoupled)| of each pair, at least `_LEAST`; NaN where a value is not positive."""
    ratios = (pairs[f"{metric}_high"] / pairs[f"{metric}_low"]).astype(float)
    return pd.Series(np.abs(np.log(ratios.where(ratios > 0))), ratios.index).clip(lower=_LEAST)


def _at_equal_pull(fit: pd.DataFrame) -> pd.DataFrame:
    """Return pairs of SGD and SGDW in the columns of `pairs_of`, where SGDW's decay is λ/(1 − β).

    A coupled decay passes through heavy-ball momentum, which multiplies it by 1/(1 − β) in the long run.
    """
    runs = fit[(fit.optimizer.map(FAMILY) == "sgd") & (fit.weight_decay > 0) & fit.coupling.isin([0.0, 1.0])]
    pull = runs.weight_decay / (1 - runs.momentum).where(runs.coupling == 1, 1.0)
    # A column that is neither a metric nor an outcome counts as a setting.
    runs = runs.assign(pull=[float(f"{value:.5g}") for value in pull])
    hidden = ["optimizer", "coupling", "weight_decay"]
    runs = runs.assign(both=alike(runs, hidden), group=alike(runs, [*hidden, "seed"]))
    runs = runs.drop_duplicates(["both", "coupling"])
    decoupled, coupled = (runs[runs.coupling == c][["both", "group", *_METRICS]] for c in (0.0, 1.0))
    return decoupled.merge(coupled.drop(columns="group"), on="both", suffixes=("_low", "_high"))


def _exp(value: float) -> float:
    return math.exp(value) if math.isfinite(value) else math.nan


def _says(parts: tuple[Comparison, ...]) -> str:
    known = [(metric.upper(), part) for metric, part in zip(_METRICS, parts, strict=True) if not math.isnan(part.value)]
    if not known:
        return "no pairs of both SGD and Adam"
    ratios = ", ".join(f"{metric} {part.text}" for metric, part in known)
    name, last = known[-1]
    factors = " against ".join(number(last.more[f"{label}: factor"]) for label in ("Adam", "SGD"))
    return f"Adam's effect over SGD's: {ratios}; {name} changes by a factor of {factors}"


def _lacks(evidence: Evidence, pairs: pd.DataFrame, parts: tuple[Comparison, ...]) -> tuple[str, str]:
    if all(part.verdict != "not enough" for part in parts):
        return "", ""
    settings = pairs.groupby("family").group.nunique()
    fewest = min(("sgd", "adam"), key=lambda family: settings.get(family, 0))
    count, label = int(settings.get(fewest, 0)), LABELS[fewest]
    what = f"pairs of {label} and {label}W that fit the training data at {count} settings, of {ENOUGH}"
    family = evidence.runs[evidence.runs.optimizer.map(FAMILY) == fewest]
    for have, partner in ((fewest, f"{fewest}w"), (f"{fewest}w", fewest)):
        if (family.optimizer == have).any() and not (family.optimizer == partner).any():
            return lack(evidence, what, f"optimizer={have}", {"optimizer": [partner]})
    if family.empty:
        return lack(evidence, what, "", {"optimizer": [fewest, f"{fewest}w"], "lr": [_USUAL_LR[fewest]]})
    both = "optimizer=sgd,sgdw,adam,adamw"  # decays count where both families have them
    if not (family.momentum > 0).any():
        return lack(evidence, what, both, {"momentum": [0.5, 0.9]})
    decays = family.weight_decay[family.weight_decay > 0]
    return lack(evidence, what, both, {"weight_decay": between(decays) if len(decays) else [5e-4, 5e-3]})
