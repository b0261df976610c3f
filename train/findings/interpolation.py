"""Claim 5: from decoupled to coupled decay, NC0, NC2 and NC3 fall smoothly, and validation accuracy stays."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.formatting import percentages
from ncollapse.optimizer_table import PAPER_OPTIMIZERS, row_of
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.coupled_pairs import said_by_metric
from ncollapse.train.findings.evidence import of_paper
from ncollapse.train.findings.lacking import between, lack
from ncollapse.train.findings.statistics import median_of, spearman
from ncollapse.train.report.coupling import interpolations

_METRICS = ("nc0", "nc2", "nc3")
#: The fewest coupled shares of a line.
_SHARES = 5
#: Rank correlation at most, largest step at most as a share of the whole range, range of validation accuracy at most.
_FALLS, _STEP, _STAYS = -0.8, 0.5, 0.02


def smooth_interpolation(evidence: Evidence) -> Finding:
    """Follow the metrics along runs that differ only in the coupled share of their decay."""
    runs = of_paper(evidence.fit)
    runs = runs[runs.weight_decay > 0]
    lines = interpolations(runs.drop(columns=["setting", "family"]), evidence.selection)
    lines = lines[lines.groupby("group").coupling.transform("nunique") >= _SHARES]
    setting = alike(lines.drop(columns=["group", "settings", "reached"]), ["coupling", "seed"])
    lines = lines.assign(setting=setting)
    parts = [
        part
        for name in PAPER_OPTIMIZERS
        if row_of(name).coupling and len(mine := lines[lines.optimizer == name])
        for part in _comparisons(row_of(name).label, mine)
    ]
    decided = any(part.verdict != "not enough" for part in parts)
    lacks, command = ("", "") if decided else _lacks(evidence, runs)
    return Finding(
        5, "From decoupled to coupled, NC0, NC2 and NC3 fall smoothly, and validation accuracy stays.",
        f"Lines of runs that differ in the coupled share only, {_SHARES} shares or more that fit the training data "
        f"({evidence.selection.percent}). Holds: Spearman correlation of metric and share, median over settings, at "
        f"most {_FALLS:g} with an interval below 0, and the largest step between neighbours at most {100 * _STEP:g} % "
        f"of the range (in the logarithm); validation accuracy ranges over at most {100 * _STAYS:g} points. Fails: "
        "otherwise.",
        _says(parts), tuple(parts), tuple(lines.id), lacks, command,
    )  # fmt: skip


def _comparisons(label: str, lines: pd.DataFrame) -> list[Comparison]:
    """Return the comparisons of one update rule: one for each metric, and one of the accuracy."""
    verdict: Verdict
    groups = [group.sort_values("coupling") for _, group in lines.groupby("group")]
    of_settings = [int(group.setting.iloc[0]) for group in groups]
    parts = []
    for name in _METRICS:
        found = median_of([spearman(group.coupling, group[name]).value for group in groups], of_settings)
        step = median_of([_largest_step(group[name]) for group in groups], of_settings)
        smooth = found.value <= _FALLS and not found.high >= 0 and step.value <= _STEP
        verdict = "not enough" if math.isnan(found.value) else "holds" if smooth else "fails"
        more = {"largest step": step.value, "lines": float(found.values)}
        parts.append(
            Comparison(
                f"{name.upper()}, {label}", "rank correlation", found.value, verdict, found.groups, "settings",
                found.low, found.high, more,
            )
        )  # fmt: skip
    accuracies = [group.val_accuracy[np.isfinite(group.val_accuracy)] for group in groups]
    span = median_of([float(values.max() - values.min()) for values in accuracies], of_settings)
    verdict = "not enough" if math.isnan(span.value) else "holds" if span.value <= _STAYS else "fails"
    more = {"lowest accuracy": float(lines.val_accuracy.min()), "highest accuracy": float(lines.val_accuracy.max())}
    parts.append(
        Comparison(
            f"accuracy, {label}", "range of validation accuracy", span.value, verdict, span.groups, "settings",
            span.low, span.high, more,
        )
    )  # fmt: skip
    return parts


def _largest_step(values: "pd.Series[float]") -> float:
    """Return the largest step between neighbours as a share of the whole range, in the logarithm; NaN without one."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: np.ndarray[Any, Any] = np.log(values.to_numpy(np.float64))
    logs = logs[np.isfinite(logs)]
    span = float(np.ptp(logs)) if len(logs) else 0.0
    return float(np.abs(np.diff(logs)).max()) / span if span else math.nan


def _says(parts: list[Comparison]) -> str:
    metrics = [part for part in parts if part.of == "rank correlation"]
    if not metrics:
        return ""
    text = said_by_metric(metrics, "rank correlation with the coupled share")
    steps = [part.more["largest step"] for part in metrics]
    if not np.isnan(steps).all():
        text += f"; the largest step is {100 * np.nanmax(steps):.0f} % of the range"
    spans = [part for part in parts if part not in metrics and not math.isnan(part.value)]
    accuracy = ", ".join(
        f"{100 * part.value:.2f} points ({part.name.partition(', ')[2]}: "
        f"{percentages(part.more['lowest accuracy'], part.more['highest accuracy'])})" for part in spans
    )  # fmt: skip
    return f"{text}; validation accuracy ranges over {accuracy}" if spans else text


def _lacks(evidence: Evidence, runs: pd.DataFrame) -> tuple[str, str]:
    other: dict[str, Sequence[object]]
    what = f"no runs that differ in the coupled share only, with {_SHARES} shares that fit the training data"
    shares = {"coupling": [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]}
    keys = ["lr", "momentum", "weight_decay"]
    of_adam = runs[runs.family == "adam"]
    there = evidence.runs.groupby(keys).coupling.nunique()
    have = of_adam[keys].apply(tuple, axis=1).map(there) if len(of_adam) else there
    waits = evidence.runs.coupling.nunique() >= _SHARES
    if not len(of_adam):
        other = {"optimizer": ["adam"], "lr": [1e-3], "momentum": [0.9], "weight_decay": [5e-4, 5e-3]}
        return lack(evidence, what, settings=other | shares, waits=waits)
    new = of_adam[have.to_numpy() < _SHARES]
    if new.empty:  # all have such a line, which does not fit the training data
        shares["lr"] = between(of_adam.lr)
    one = (of_adam if new.empty else new).sort_values("nc3").iloc[0]
    where = f"optimizer={one.optimizer} lr={float(one.lr)!r} momentum={float(one.momentum)!r}"
    return lack(evidence, what, f"{where} weight_decay={float(one.weight_decay)!r}", shares, waits=waits)
