"""Claims 9 and 10: NC4 follows from the training accuracy, and collapse says nothing of the validation accuracy."""

import math

import numpy as np
import pandas as pd

from ncollapse.formatting import number, percentage
from ncollapse.optimizer_table import row_of
from ncollapse.plot.looks import look_of, ordered
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.lacking import between, lack
from ncollapse.train.findings.pairs import ENOUGH
from ncollapse.train.findings.statistics import Estimate, share_of, spearman

_METRICS = ("nc1", "nc2", "nc3")
#: Claim 9: the training accuracy that counts as about 100 %, the share of settings that must satisfy NC4, the part of
#: them with the weakest collapse, and the factor by which a metric must differ before "whatever it is" can be said.
_ABOUT_ALL, _SATISFIED, _WEAKEST, _SPREAD = 0.99, 0.99, 0.75, 1.5
#: Claim 10: a rank correlation that says something.
_WEAK = 0.3


def nc4_redundant(evidence: Evidence) -> Finding:
    """Count the settings with a small NC4 among those that fit the training data, and among the weakly collapsed."""
    allowed = 1 - evidence.selection.threshold
    fit = _measured(evidence.fit, "nc4")
    parts = tuple(_satisfied(fit, name, allowed) for name in (None, *_METRICS))
    if evidence.selection.threshold < _ABOUT_ALL:
        parts = ()
    lacks, command = "", ""
    if not parts or "not enough" in {part.verdict for part in parts}:
        lacks, command = _lacks_fit(evidence, fit.setting.nunique())
    return Finding(
        9, "NC4 is satisfied whenever training accuracy is about 100 %, whatever NC1–NC3.",
        f"Settings whose runs reach the threshold, {evidence.selection.percent}: the share with NC4 of at most "
        f"{percentage(allowed)} in every seed, in all and in the quarter with the largest NC1, NC2 and NC3. Holds "
        f"where each is {100 * _SATISFIED:g} % or more. A metric counts where it spans a factor of {_SPREAD:g}, with "
        f"{ENOUGH} settings; a threshold below {100 * _ABOUT_ALL:g} % is not about 100 %.",
        _says_nc4(fit, parts), parts, tuple(fit.id.astype(str)), lacks, command,
    )  # fmt: skip


def _measured(fit: pd.DataFrame, share: str) -> pd.DataFrame:
    """Return the runs that have this share, with a column `setting`; NC1–NC3 are finite or NaN."""
    fit = fit.assign(
        setting=alike(fit, ["seed"]), **{name: fit[name].where(np.isfinite(fit[name])) for name in _METRICS}
    )
    return fit[fit[share].between(0, 1)]


def _satisfied(fit: pd.DataFrame, metric: str | None, allowed: float) -> Comparison:
    name, spans, chosen = "all that fit", True, fit
    if metric is not None:
        name = f"the quarter with the largest {metric.upper()}"
        chosen = fit[fit[metric] >= fit[metric].quantile(_WEAKEST)]
        spans = float(fit[metric].max()) >= _SPREAD * float(fit[metric].min())
    worst = chosen.groupby("setting").nc4.max()
    # 1 − 0.999 is not 0.001 in floating point.
    share = share_of(int((worst <= allowed * (1 + 1e-9)).sum()), len(worst))
    verdict: Verdict = "not enough"
    if spans and fit.setting.nunique() >= ENOUGH:
        verdict = "holds" if share.value >= _SATISFIED else "fails"
    more = {"largest NC4": float(chosen.nc4.max())}
    if metric is not None:
        more |= {"smallest": float(chosen[metric].min()), "largest": float(chosen[metric].max())}
    return Comparison(
        name, "share with a small NC4", share.value, verdict, share.groups, "settings", share.low, share.high, more
    )


def _says_nc4(fit: pd.DataFrame, parts: tuple[Comparison, ...]) -> str:
    if fit.empty:
        return "no run with NC4 fits the training data"
    ranges = ", ".join(f"{m.upper()} {number(fit[m].min())}–{number(fit[m].max())}" for m in _METRICS)
    largest = f"largest NC4 {percentage(float(fit.nc4.max()))} with {ranges}"
    if not parts:
        return largest
    weakest = min(parts, key=lambda part: part.value)
    everywhere, there = percentage(parts[0].value), percentage(weakest.value)
    return f"{largest}; small in {everywhere} of the settings, in {weakest.name} {there}"


def no_proxy(evidence: Evidence) -> Finding:
    """Correlate NC1–NC3 with the validation accuracy: over all runs, within optimizers, and at equal settings."""
    fit = _measured(evidence.fit, "val_accuracy")
    parts = tuple(
        _correlated(f"{metric.upper()}, {where}", found, more)
        for metric in _METRICS
        for where, found, more in (
            ("over all runs", spearman(fit[metric], fit.val_accuracy, fit.setting), {}),
            ("within an optimizer", *_within_optimizers(fit, metric)),
            ("between couplings at equal settings", _at_equal_settings(fit, metric), {}),
            ("between seeds of a setting", _centred(fit, fit.setting, fit.setting, metric), {}),
        )
    )
    lacks, command = "", ""
    if any(part.verdict == "not enough" for part in parts):
        lacks, command = _lacks_correlation(evidence, fit, parts)
    return Finding(
        10, "Strength of collapse says nothing of validation accuracy.",
        "Spearman's ρ of a metric with validation accuracy, of runs that fit the training data; its interval by "
        f"bootstrap over settings. Fails where the interval excludes 0 and |ρ| is {_WEAK:g} or more, holds where it "
        f"lies within ±{_WEAK:g}; between, or with fewer than {ENOUGH} settings: not enough. A negative ρ: more "
        "collapse, more accuracy.",
        _says_proxy(fit, parts), parts, tuple(fit.id.astype(str)), lacks, command,
    )  # fmt: skip


def _correlated(name: str, found: Estimate, more: dict[str, float]) -> Comparison:
    verdict: Verdict = "not enough"
    if found.groups >= ENOUGH and not math.isnan(found.low):
        if max(-found.low, found.high) < _WEAK:
            verdict = "holds"
        elif abs(found.value) >= _WEAK and (found.low > 0 or found.high < 0):
            verdict = "fails"
    return Comparison(
        name, "rank correlation", found.value, verdict, found.values, "runs", found.low, found.high,
        {"settings": float(found.groups), **more},
    )  # fmt: skip


def _within_optimizers(fit: pd.DataFrame, metric: str) -> tuple[Estimate, dict[str, float]]:
    """Return the correlation of the ranks that runs have within their optimizer, and that of each optimizer."""
    own = {
        look_of(name).label: spearman(
            runs[metric], runs.val_accuracy, np.zeros(len(runs))
        ).value  # one group: no interval
        for name in ordered(fit.optimizer)
        if (runs := fit[fit.optimizer == name]).setting.nunique() >= ENOUGH
    }
    ranked = fit.dropna(subset=[metric])
    ranked = ranked[ranked.groupby("optimizer").setting.transform("nunique") >= ENOUGH]
    # Shares of the optimizer's runs: an optimizer with more of them has no larger ranks.
    ranks = ranked.groupby("optimizer")[[metric, "val_accuracy"]].rank(pct=True)
    ranks -= ranks.groupby(ranked.optimizer).transform("mean")
    return spearman(ranks[metric], ranks.val_accuracy, ranked.setting), own


def _at_equal_settings(fit: pd.DataFrame, metric: str) -> Estimate:
    """Return the correlation among runs of a family that differ in the coupling only, each centred within these."""
    runs = fit[fit.coupling.notna() & (fit.weight_decay > 0)].drop(columns="setting")
    runs = runs.assign(family=runs.optimizer.map({name: row_of(name).family for name in runs.optimizer.unique()}))
    hidden = ["optimizer", "coupling"]
    return _centred(runs, alike(runs, hidden), alike(runs, [*hidden, "seed"]), metric)


def _centred(fit: pd.DataFrame, same: "pd.Series[int]", groups: "pd.Series[int]", metric: str) -> Estimate:
    """Return the correlation of values less their mean among the runs that are the same but for one thing."""
    known = fit[metric] > 0
    fit, same, groups = fit[known], same[known], groups[known]
    several = same.groupby(same).transform("size") > 1
    fit, same, groups = fit[several], same[several], groups[several]
    values = pd.DataFrame({"metric": np.log(fit[metric]), "accuracy": fit.val_accuracy})
    # Rounded: equal accuracies must stay equal.
    values = (values - values.groupby(same).transform("mean")).round(9)
    return spearman(values.metric, values.accuracy, groups)


def _says_proxy(fit: pd.DataFrame, parts: tuple[Comparison, ...]) -> str:
    if fit.empty:
        return "no run with a validation accuracy fits the training data"
    texts = [
        f"{where} {', '.join(f'{part.name[:3]} {part.value:+.2f}' for part in found)}"
        for where in dict.fromkeys(part.name.partition(", ")[2] for part in parts)
        if (found := [p for p in parts if p.name.endswith(where) and not math.isnan(p.value)])
    ]
    accuracy = f"validation accuracy {percentage(fit.val_accuracy.min())}–{percentage(fit.val_accuracy.max())}"
    return "; ".join([*(f"ρ {text}" if i == 0 else text for i, text in enumerate(texts)), accuracy])


def _lacks_fit(evidence: Evidence, settings: int) -> tuple[str, str]:
    if evidence.selection.threshold < _ABOUT_ALL or not settings:
        what = f"runs that fit the training data ({evidence.note or 'none has ended well'})"
        return lack(evidence, what, "", {"epochs": [2 * int(evidence.runs.epochs.max())]})
    what = f"settings that fit the training data with NC1–NC3 far apart: {settings}"
    return lack(evidence, what, "", {"lr": between(evidence.runs.lr), "weight_decay": [5e-4, 5e-3]})


def _lacks_correlation(evidence: Evidence, fit: pd.DataFrame, parts: tuple[Comparison, ...]) -> tuple[str, str]:
    missing = [part.name for part in parts if part.verdict == "not enough"]
    if fit.val_accuracy.nunique() == 1:
        missing = ["validation accuracies that differ"]
    what = f"runs for {len(missing)} of {len(parts)} correlations, for instance {missing[0]}"
    return lack(evidence, what, "status=done")
