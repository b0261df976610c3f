"""Claim 2: coupled decay lets NC0 vanish, decoupled decay keeps it above its start."""

import pandas as pd

from ncollapse.formatting import interval
from ncollapse.optimizer_table import PAPER_OPTIMIZERS, row_of
from ncollapse.train.findings.claim import Comparison, Evidence, Finding, Verdict
from ncollapse.train.findings.evidence import of_paper
from ncollapse.train.findings.lacking import more_settings
from ncollapse.train.findings.statistics import grouped, medians, share_of

#: Share of the settings that must go as the claim says, and the fewest settings that decide.
_SHARE, _FEWEST = 0.95, 3
#: SGDW is left out: its NC0 falls too, exactly as claim 1 has it.
_FORMS = tuple(name for name in PAPER_OPTIMIZERS if row_of(name).coupling or row_of(name).family != "sgd")


def row_sum_by_decay(evidence: Evidence) -> Finding:
    """Count the settings whose NC0 ends below its start under coupled decay, and above it under decoupled decay."""
    runs = of_paper(evidence.fit)
    runs = runs[runs.weight_decay > 0]
    parts, behind, missing = [], [], []
    for name in _FORMS:
        row = row_of(name)
        mine = runs[(runs.family == row.family) & (runs.coupling == row.coupling)]
        behind += list(mine.id)
        for decay, group in mine.groupby("weight_decay"):
            parts.append(_comparison(f"{row.label}, λ = {decay:g}", group, coupled=row.coupling == 1))
        if not any(part.verdict != "not enough" for part in parts if part.name.startswith(f"{row.label},")):
            missing.append(name)
    lacks, command = _lacks(evidence, missing) if missing else ("", "")
    falling, keeping = ([row_of(name).label for name in _FORMS if row_of(name).coupling == c] for c in (1, 0))
    return Finding(
        2, "Coupled weight decay lets NC0 vanish, decoupled decay keeps it above its start.",
        f"Of the runs that fit the training data ({evidence.selection.percent}), at every decay above 0, {_FEWEST} "
        f"settings or more, each the median of its seeds. Holds: NC0 ends below its start ({', '.join(falling)}) or "
        f"above it ({', '.join(keeping)}) in at least {100 * _SHARE:g} % of them; fails: otherwise. SGDW is not "
        "counted: its NC0 falls by Theorem 3.2, see claim 1.",
        _says(parts), tuple(parts), tuple(behind), lacks, command,
    )  # fmt: skip


def _comparison(name: str, group: pd.DataFrame, *, coupled: bool) -> Comparison:
    ratios = medians(grouped(group.nc0 / group.nc0_start, group.setting))
    right = int(((ratios < 1) if coupled else (ratios > 1)).sum())
    found = share_of(right, len(ratios))
    verdict: Verdict = "not enough" if len(ratios) < _FEWEST else "holds" if found.value >= _SHARE else "fails"
    more = {}
    if len(ratios):
        more = {"smallest NC0/start": float(ratios.min()), "largest NC0/start": float(ratios.max())}
    what = f"share with NC0 {'below' if coupled else 'above'} its start"
    return Comparison(name, what, found.value, verdict, len(ratios), "settings", found.low, found.high, more)


def _says(parts: list[Comparison]) -> str:
    """Say, for each optimizer, how many settings go as claimed, and the range of NC0 over its start."""
    texts = []
    for label in dict.fromkeys(part.name.partition(",")[0] for part in parts):
        mine = [part for part in parts if part.name.startswith(f"{label},") and part.n]
        if not mine:
            continue
        right, count = sum(round(part.value * part.n) for part in mine), sum(part.n for part in mine)
        low, high = (
            f(part.more[f"{which} NC0/start"] for part in mine) for f, which in ((min, "smallest"), (max, "largest"))
        )
        side = "below" if mine[0].of.endswith("below its start") else "above"
        texts.append(f"{label} {right} of {count} {side} (NC0/start {interval(low, high)})")
    return "settings with NC0 below or above its start: " * bool(texts) + "; ".join(texts)


def _lacks(evidence: Evidence, missing: list[str]) -> tuple[str, str]:
    labels = ", ".join(row_of(name).label for name in missing)
    what = f"{_FEWEST} settings with one decay above 0 that fit the training data: {labels}"
    return more_settings(evidence, what, missing[:1])
