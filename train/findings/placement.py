"""Claim 7: SGD hardly cares where the decay stands, Adam does."""

import dataclasses
import math

import numpy as np
import pandas as pd

from ncollapse.formatting import number
from ncollapse.optimizer_table import FAMILY, LABELS
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Evidence, Finding
from ncollapse.train.findings.lacking import between, lack
from ncollapse.train.findings.pairs import ENOUGH, pairs_of, ratio_below_one
from ncollapse.train.findings.statistics import median_of

_METRICS = ("nc0", "nc2", "nc3")
#: What the two families must have in common: learning rates of SGD and Adam cannot be compared.
_CELL = ["momentum", "weight_decay"]
#: Effects below this are the rounding of float32.
_LEAST = 1e-6
#: Learning rates for a family that a folder lacks.
_USUAL_LR = {"sgd": 0.1, "adam": 1e-3}
_CLAIM = "SGD hardly cares where the decay stands, Adam does."
_TESTED = (
    "Pairs that differ in the coupling only, with momentum (without, SGD and SGDW are one update): the effect on a "
    "metric is |ln(coupled/decoupled)|. The number is SGD's effect divided by Adam's at equal momentum and decay, "
    "medians over learning rates and seeds. Holds where more than half of these ratios are below 1 with p < 0.05 (sign "
    "test) and the interval of their median is too; fails where the opposite is so, or where, "
    f"of {ENOUGH} or more, no more than half are below 1; else it is open."
)


def decay_placement(evidence: Evidence) -> Finding:
    """Compare the effect of the coupling on SGD with that on Adam, over pairs of runs that fit the training data."""
    pairs = pairs_of(evidence.fit, "coupling", 0.0, 1.0)
    pairs = pairs[pairs.family.isin(["sgd", "adam"]) & (pairs.momentum > 0)]
    both = pairs.groupby(_CELL).family.transform("nunique") == 2
    compared = pairs[both]
    matched = _at_equal_pull(evidence.fit)
    parts = tuple(_compare(name, compared, matched) for name in _METRICS)
    runs = tuple(pd.unique(pd.concat([compared.id_low, compared.id_high]).astype(str)))
    return Finding(7, _CLAIM, _TESTED, _says(parts), parts, runs, *_lacks(evidence, pairs, parts))


def _compare(metric: str, pairs: pd.DataFrame, matched: pd.DataFrame) -> Comparison:
    effects = pairs[[*_CELL, "family"]].assign(effect=_effects(pairs, metric))
    cells = effects.groupby([*_CELL, "family"]).effect.median().unstack("family").reindex(columns=["sgd", "adam"])
    ratios = cells.sgd / cells.adam
    part = ratio_below_one(
        f"effect on {metric.upper()}, SGD against Adam", ratios, pd.Series(range(len(ratios)), dtype=int),
        "momenta and decays",
    )  # fmt: skip
    more = {f"{LABELS[family]}: factor": _exp(float(cells[family].median())) for family in ("sgd", "adam")} | {
        "pairs": float(effects.effect.notna().sum()),
        "SGD at equal pull: factor": _exp(median_of(_effects(matched, metric), matched.group).value),
        "SGD at equal pull: settings": float(matched.group.nunique()),
    }
    return dataclasses.replace(part, more=part.more | more)


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
    factors = " and ".join(f"{number(last.more[f'{label}: factor'])} ({label})" for label in ("SGD", "Adam"))
    text = f"SGD's effect over Adam's, median ratio: {ratios}; {name} changes by a factor of {factors}"
    pull = last.more["SGD at equal pull: factor"]
    return text if math.isnan(pull) else f"{text}; between SGD and SGDW at equal λ/(1 − β), by {number(pull)}"


def _lacks(evidence: Evidence, pairs: pd.DataFrame, parts: tuple[Comparison, ...]) -> tuple[str, str]:
    if all(part.verdict != "not enough" for part in parts):
        return "", ""
    cells = pairs.groupby("family")[_CELL].apply(lambda group: len(group.drop_duplicates()))
    runs = {name: evidence.runs[evidence.runs.optimizer.map(FAMILY) == name] for name in ("sgd", "adam")}
    fewest_first = sorted(runs, key=lambda name: cells.get(name, 0))
    for name in fewest_first:
        family = runs[name]
        what = f"pairs of {LABELS[name]} and {LABELS[name]}W that fit the training data"
        for have, partner in ((name, f"{name}w"), (f"{name}w", name)):
            if (family.optimizer == have).any() and not (family.optimizer == partner).any():
                return lack(evidence, what, f"optimizer={have}", {"optimizer": [partner]})
        if family.empty:
            return lack(evidence, what, "", {"optimizer": [name, f"{name}w"], "lr": [_USUAL_LR[name]]})
    shared = max(part.n for part in parts)
    what = f"momenta and decays at which both SGD and Adam have pairs that fit the training data: {shared}"
    what += f" of {ENOUGH}" if shared < ENOUGH else ", more for a clear answer"
    both = "optimizer=sgd,sgdw,adam,adamw"
    family = runs[fewest_first[0]]
    if not all((one.momentum > 0).any() for one in runs.values()):
        return lack(evidence, what, both, {"momentum": [0.5, 0.9]})
    decays = family.weight_decay[family.weight_decay > 0]
    return lack(evidence, what, both, {"weight_decay": between(decays) if len(decays) else [5e-4, 5e-3]})
