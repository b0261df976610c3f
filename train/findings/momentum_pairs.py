"""Claim 6: a momentum of 0.9 is closer to collapse than one of 0.7 at equal training loss."""

import math

import numpy as np
import pandas as pd

from ncollapse.optimizer_table import PAPER_OPTIMIZERS, row_of
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Evidence, Finding
from ncollapse.train.findings.coupled_pairs import said_by_metric
from ncollapse.train.findings.evidence import measured_most, of_paper
from ncollapse.train.findings.lacking import lack, more_settings
from ncollapse.train.findings.pairs import RULE, ratio_below_one
from ncollapse.train.report.momentum import at_equal_loss
from ncollapse.train.report.selection import NC

_LOW, _HIGH = 0.7, 0.9
#: Ratio of the training losses of a pair, at most, for these to count as equal.
_EQUAL = 1.1


def more_momentum(evidence: Evidence) -> Finding:
    """Compare runs that differ in their momentum only, each read where it first reaches their common training loss."""
    pairs = _pairs(evidence)
    equal = pairs[np.abs(np.log(pairs.loss_ratio)) <= math.log(_EQUAL)]
    parts, missing = [], []
    for name in PAPER_OPTIMIZERS:
        row = row_of(name)
        if row.coupling == 0:
            continue
        mine = equal[equal.family == row.family]
        of_family = [ratio_below_one(f"{metric.upper()}, {row.label}", mine[metric], mine.setting) for metric in NC]
        parts += of_family
        if any(part.verdict == "not enough" for part in of_family):
            missing.append(name)
    left_out = len(pairs) - len(equal)
    lacks, command = _lacks(evidence, missing, left_out) if missing or left_out else ("", "")
    return Finding(
        6, "Momentum 0.9 is closer to collapse than 0.7 at equal training loss.",
        f"Pairs of runs that differ in their momentum only and fit the training data ({evidence.selection.percent}), "
        "coupled and decoupled forms together; each is read at its first evaluated epoch with the lowest loss that "
        f"both reach, and these losses differ by at most {100 * (_EQUAL - 1):.0f} %: {RULE.format(ratio='0.9/0.7')}",
        said_by_metric(parts, "median ratio 0.9/0.7"), tuple(parts), (*equal.run_high, *equal.run_low), lacks, command,
    )  # fmt: skip


def _pairs(evidence: Evidence) -> pd.DataFrame:
    """Return a row per pair: family, setting without the seed, the runs, ratios of NC0–NC3 and of the losses read."""
    runs = of_paper(evidence.fit).drop(columns="setting")
    # Without decay both forms of an update rule are the same.
    runs = runs[runs.momentum.isin([_LOW, _HIGH]) & ((runs.weight_decay > 0) | (runs.coupling > 0))]
    readings = at_equal_loss(runs.drop(columns="family"), evidence.results, evidence.selection)
    low, high = (readings[readings.momentum == momentum] for momentum in (_LOW, _HIGH))
    pairs = low.merge(high, on="group", suffixes=("_low", "_high"))
    settings = runs.assign(setting=alike(runs, ["momentum", "seed", "optimizer"])).set_index("id")
    ratios = {name: pairs[f"{name}_high"] / pairs[f"{name}_low"] for name in NC}
    return pairs[["run_low", "run_high"]].assign(
        family=pairs.run_low.map(settings.family), setting=pairs.run_low.map(settings.setting),
        loss_ratio=pairs.train_loss_high / pairs.train_loss_low, **ratios,
    )  # fmt: skip


def _lacks(evidence: Evidence, missing: list[str], left_out: int) -> tuple[str, str]:
    runs = measured_most(evidence.runs)  # a run that is measured anew stays in the folder as it was, too
    first = missing[0] if missing else ""
    names = [name for name in PAPER_OPTIMIZERS if not first or row_of(name).family == row_of(first).family]
    mine = runs[runs.optimizer.isin(names)]
    sparse = bool((mine.eval_every > 1).any())
    every = {"eval_every": [1]} if sparse else {}
    why = ""
    if left_out:
        why = f"{left_out:,} pairs are left out, whose losses differ by more than {100 * (_EQUAL - 1):.0f} % where read"
        why += " (not every epoch is evaluated)" if sparse else ""
    if not missing:
        return (why, "") if not sparse else lack(evidence, why, "status=done", {"momentum": [_LOW, _HIGH], **every})
    labels = ", ".join(row_of(name).label for name in missing)
    what = f"more settings with a pair of runs of momentum {_LOW:g} and {_HIGH:g} that both fit: {labels}"
    what += f"; {why}" if why else ""
    if {_LOW, _HIGH} <= set(mine.momentum) and not sparse:
        return more_settings(evidence, what, names)
    if len(mine):
        where = f"optimizer={','.join(dict.fromkeys(mine.optimizer))}"
        return lack(evidence, what, where, {"momentum": [_LOW, _HIGH], **every})
    return more_settings(evidence, what, names)
