"""Claim 8: partial collapse, NC1 and NC2 without NC3."""

import numpy as np
import pandas as pd

from ncollapse.formatting import number
from ncollapse.optimizer_table import TABLE
from ncollapse.plot.looks import look_of, ordered
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.lacking import between, lack, more_rates
from ncollapse.train.findings.pairs import ENOUGH
from ncollapse.train.findings.statistics import share_of

_BEST, _WORSE = 0.25, 0.5
_CLAIM = "Collapse can be partial: NC1 and NC2 are among the best while NC0 grows and NC3 fails."
_TESTED = (
    "Of the settings that fit the training data, medians over seeds: those with NC1 and NC2 both in the best quarter, "
    "NC0 above its start and NC3 in the worse half. Holds where there is one; fails where there is none among "
    f"{ENOUGH} settings whose NC0 grew."
)


def partial_collapse_claim(evidence: Evidence) -> Finding:
    """Look for settings whose features collapse while NC0 grows and the classifier does not align."""
    fit = evidence.fit.assign(setting=alike(evidence.fit, ["seed"]))
    settings = _medians(fit)
    grew = settings[settings.nc0 > settings.nc0_start]
    bounds = {name: float(settings[name].quantile(_BEST)) for name in ("nc1", "nc2")}
    worse = float(settings.nc3.median())
    partial = grew[(grew.nc1 <= bounds["nc1"]) & (grew.nc2 <= bounds["nc2"]) & (grew.nc3 > worse)]
    verdict: Verdict = "not enough"
    if len(settings) >= ENOUGH:
        verdict = "holds" if len(partial) else "fails" if len(grew) >= ENOUGH else "not enough"
    share = share_of(len(partial), len(grew))
    more = {
        "settings": float(len(settings)), "NC1 of the best quarter": bounds["nc1"],
        "NC2 of the best quarter": bounds["nc2"], "NC3 of the better half": worse,
    }  # fmt: skip
    part = Comparison(
        "partial collapse among settings whose NC0 grew", "share", share.value, verdict, len(grew), "settings",
        share.low, share.high, more,
    )  # fmt: skip
    lacks, command = "", ""
    if verdict == "not enough":
        lacks, command = _lacks(evidence, len(settings), len(grew))
    shown = partial if len(partial) else grew
    ids = tuple(fit.id[fit.setting.isin(shown.index)].astype(str))
    return Finding(
        8, _CLAIM, _TESTED, _says(settings, grew, partial, bounds, worse), (part,), ids, lacks, command,
    )  # fmt: skip


def _medians(fit: pd.DataFrame) -> pd.DataFrame:
    """Return the medians over seeds, a row per setting, of the runs whose NC0–NC3 are known."""
    metrics = ["nc0", "nc0_start", "nc1", "nc2", "nc3"]
    known = fit[metrics].replace([np.inf, -np.inf], np.nan).notna().all(axis=1)
    groups = fit[known & (fit.nc0_start > 0)].groupby("setting")
    return groups[metrics].median().assign(optimizer=groups.optimizer.first())


def _lacks(evidence: Evidence, settings: int, grew: int) -> tuple[str, str]:
    if settings < ENOUGH:
        what = f"settings that fit the training data: {settings} of {ENOUGH}"
        return more_rates(evidence, what, {"weight_decay": [5e-4, 5e-3]})
    what = f"settings that fit the training data and whose NC0 grew: {grew} of {ENOUGH}"
    grows = [row.name for row in TABLE.values() if row.in_paper and row.coupling == 0 and row.family != "sgd"]
    decoupled = [name for name in grows if (evidence.runs.optimizer == name).any()]
    if decoupled:
        rates = evidence.runs.lr[evidence.runs.optimizer == decoupled[0]]
        return lack(evidence, what, f"optimizer={decoupled[0]}", {"lr": between(rates)})
    if (evidence.runs.optimizer == "adam").any():
        return lack(evidence, what, "optimizer=adam", {"optimizer": ["adamw"]})
    return lack(evidence, what, "", {"optimizer": ["adamw"], "lr": [1e-3, 3e-3]})


def _says(
    settings: pd.DataFrame, grew: pd.DataFrame, partial: pd.DataFrame, bounds: dict[str, float], worse: float
) -> str:
    if partial.empty:
        if settings.empty:
            return "no run with NC0–NC3 fits the training data"
        return f"none of {_settings(len(settings))}; NC0 grew in {len(grew)}"
    counts = partial.optimizer.value_counts()
    which = ", ".join(f"{_label(name)} {counts[name]}" for name in ordered(partial.optimizer))
    best = partial.iloc[int(partial.nc3.argmax())]
    return (
        f"{len(partial)} of {_settings(len(settings))} ({which}); the clearest: {_label(best.optimizer)}, "
        f"NC1 {number(best.nc1)} (quarter: {number(bounds['nc1'])}), NC2 {number(best.nc2)} "
        f"({number(bounds['nc2'])}), NC3 {number(best.nc3)} (half: {number(worse)}), "
        f"NC0 × {number(float(best.nc0) / float(best.nc0_start))}"
    )


def _settings(count: int) -> str:
    return f"{count:,} setting{'' if count == 1 else 's'}"


def _label(optimizer: str) -> str:
    return look_of(optimizer).label
