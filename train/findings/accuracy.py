"""Claims 9 and 10: NC4 follows from the training accuracy, and collapse says nothing of the validation accuracy."""

import math

import numpy as np
import pandas as pd

from ncollapse.formatting import interval, percentage, percentages
from ncollapse.optimizer_table import PAPER_OPTIMIZERS, row_of
from ncollapse.plot.looks import look_of, ordered
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.lacking import lack, more_rates, more_settings
from ncollapse.train.findings.pairs import ENOUGH
from ncollapse.train.findings.statistics import Estimate, share_of, spearman

_METRICS = ("nc1", "nc2", "nc3")
#: Claim 9: what counts as about 100 %, of the training accuracy and of the samples that NC4 asks for; the share of
#: settings that must satisfy NC4, the part of them with the weakest collapse, and the factor by which a metric must
#: differ before "whatever it is" can be said. The bound on NC4 does not follow the threshold: one that lets more runs
#: in must not forgive them more.
_ABOUT_ALL, _SATISFIED, _WEAKEST, _SPREAD = 0.99, 0.99, 0.75, 1.5
#: Claim 10: a rank correlation that says something; names of two of the four.
_WEAK = 0.3
_COUPLINGS, _SEEDS = "between couplings at equal settings", "between seeds of a setting"


def nc4_redundant(evidence: Evidence) -> Finding:
    """Count the settings with a small NC4 among those that fit the training data, and among the weakly collapsed."""
    fit = _measured(evidence.fit, "nc4")
    settings = fit.groupby("setting").agg({"nc4": "max"} | dict.fromkeys(_METRICS, "median"))
    parts = tuple(_satisfied(fit, settings, name) for name in (None, *_METRICS))
    if evidence.selection.threshold < _ABOUT_ALL:
        parts = ()
    lacks, command = "", ""
    if not parts or "not enough" in {part.verdict for part in parts}:
        lacks, command = _lacks_fit(evidence, fit)
    return Finding(
        9, "NC4 is satisfied whenever training accuracy is about 100 %, whatever NC1–NC3.",
        f"Settings whose runs reach the threshold, {evidence.selection.percent}: the share with NC4 of at most "
        f"{percentage(1 - _ABOUT_ALL)} in every seed, in all and in the quarter with the largest NC1, NC2 and NC3 "
        f"(medians over seeds). Holds where each is {100 * _SATISFIED:g} % or more. A metric counts where it spans a "
        f"factor of {_SPREAD:g}, with {ENOUGH} settings; a threshold below {100 * _ABOUT_ALL:g} % is not about 100 %.",
        _says_nc4(fit, parts), parts, tuple(fit.id.astype(str)), lacks, command,
    )  # fmt: skip


def _measured(fit: pd.DataFrame, share: str) -> pd.DataFrame:
    """Return the runs that have this share, with a column `setting`; NC1–NC3 are finite or NaN."""
    fit = fit.assign(
        setting=alike(fit, ["seed"]), **{name: fit[name].where(np.isfinite(fit[name])) for name in _METRICS}
    )
    return fit[fit[share].between(0, 1)]


def _satisfied(fit: pd.DataFrame, settings: pd.DataFrame, metric: str | None) -> Comparison:
    name, spans, chosen = "all that fit", True, settings
    if metric is not None:
        name = f"the quarter with the largest {metric.upper()}"
        chosen = settings[settings[metric] >= settings[metric].quantile(_WEAKEST)]
        spans = _spans(fit, metric)
    # 1 − 0.99 is not 0.01 in floating point.
    share = share_of(int((chosen.nc4 <= (1 - _ABOUT_ALL) * (1 + 1e-9)).sum()), len(chosen))
    verdict: Verdict = "not enough"
    if spans and len(settings) >= ENOUGH:
        verdict = "holds" if share.value >= _SATISFIED else "fails"
    more = {"largest NC4": float(chosen.nc4.max())}
    if metric is not None:
        label = metric.upper()
        more |= {f"smallest {label}": float(chosen[metric].min()), f"largest {label}": float(chosen[metric].max())}
    return Comparison(
        name, "share with a small NC4", share.value, verdict, share.groups, "settings", share.low, share.high, more
    )


def _spans(fit: pd.DataFrame, metric: str) -> bool:
    return float(fit[metric].max()) >= _SPREAD * float(fit[metric].min())


def _says_nc4(fit: pd.DataFrame, parts: tuple[Comparison, ...]) -> str:
    if fit.empty:
        return "no run with NC4 fits the training data"
    ranges = ", ".join(f"{m.upper()} {interval(float(fit[m].min()), float(fit[m].max()))}" for m in _METRICS)
    text = f"largest NC4 {percentage(float(fit.nc4.max()))}, with {ranges}"
    if not parts:
        return text
    text += f"; NC4 at most {percentage(1 - _ABOUT_ALL)} in {percentage(parts[0].value)} of {parts[0].n} settings"
    weakest = min(parts, key=lambda part: part.value)
    return text if weakest.value >= parts[0].value else f"{text}, in {weakest.name} in {percentage(weakest.value)}"


def no_proxy(evidence: Evidence) -> Finding:
    """Correlate NC1–NC3 with the validation accuracy: over all runs, within optimizers, and at equal settings."""
    fit = _measured(evidence.fit, "val_accuracy")
    parts = tuple(
        _correlated(f"{metric.upper()}, {where}", found, more)
        for metric in _METRICS
        for where, found, more in (
            ("over all runs", spearman(fit[metric], fit.val_accuracy, fit.setting), {}),
            ("within an optimizer", *_within_optimizers(fit, metric)),
            (_COUPLINGS, _at_equal_settings(fit, metric), {}),
            (_SEEDS, _centred(fit, fit.setting, fit.setting, metric), {}),
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
        f"{where} {', '.join(f'{part.name[:3]} {_signed(part.value)}' for part in found)}"
        for where in dict.fromkeys(part.name.partition(", ")[2] for part in parts)
        if (found := [p for p in parts if p.name.endswith(where) and not math.isnan(p.value)])
    ]
    accuracy = f"validation accuracy {percentages(float(fit.val_accuracy.min()), float(fit.val_accuracy.max()))}"
    return "; ".join([*(f"ρ {text}" if i == 0 else text for i, text in enumerate(texts)), accuracy])


def _signed(ρ: float) -> str:
    text = f"{ρ:+.2f}"
    return text[1:] if float(text) == 0 else text


def _lacks_fit(evidence: Evidence, fit: pd.DataFrame) -> tuple[str, str]:
    if evidence.selection.threshold < _ABOUT_ALL or fit.empty:
        what = f"runs that fit the training data ({evidence.note or 'none has ended well'})"
        return lack(evidence, what, "", {"epochs": [2 * int(evidence.runs.epochs.max())]})
    settings = fit.setting.nunique()
    what = f"settings that fit the training data: {settings} of {ENOUGH}"
    if settings >= ENOUGH:
        close = ", ".join(metric.upper() for metric in _METRICS if not _spans(fit, metric))
        what = f"settings that fit the training data and differ by a factor of {_SPREAD:g} in {close}"
    return more_rates(evidence, what, {"weight_decay": [5e-4, 5e-3]})


def _lacks_correlation(evidence: Evidence, fit: pd.DataFrame, parts: tuple[Comparison, ...]) -> tuple[str, str]:
    missing = [part.name for part in parts if part.verdict == "not enough"]
    what = f"runs for {len(missing)} of {len(parts)} correlations, for instance {missing[0]}"
    if fit.val_accuracy.nunique() == 1:
        what = "runs whose validation accuracies differ"
    settings, (_, _, kind) = fit.setting.nunique(), missing[0].partition(", ")
    if settings < ENOUGH:
        what = f"settings that fit the training data and have a validation accuracy: {settings} of {ENOUGH}"
    elif kind == _COUPLINGS:
        present = [name for name in PAPER_OPTIMIZERS if (evidence.runs.optimizer == name).any()]
        alone = [name for name in present if not {*_forms(name)} <= {*present}]
        if alone and len(alone) == len(present):
            return more_settings(evidence, what, _forms(alone[0]))
    elif kind == _SEEDS:
        return lack(evidence, what, "status=done")
    return more_rates(evidence, what)


def _forms(name: str) -> list[str]:
    return [one for one in PAPER_OPTIMIZERS if row_of(one).family == row_of(name).family]
