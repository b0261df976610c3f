"""Claim 3: at equal settings, coupled decay gives lower NC2 and NC3 than decoupled decay."""

from collections.abc import Sequence

import pandas as pd

from ncollapse.optimizer_table import PAPER_OPTIMIZERS, row_of
from ncollapse.train.findings.claim import Comparison, Evidence, Finding
from ncollapse.train.findings.lacking import lack, more_settings
from ncollapse.train.findings.pairs import RULE, pairs_of, ratio_below_one

#: Metric -> whether the claim is of it.
_METRICS = ("nc2", "nc3")


def coupled_collapse_further(evidence: Evidence) -> Finding:
    """Compare coupled with decoupled runs of equal learning rate, momentum, decay and everything else."""
    pairs = pairs_of(evidence.fit, "coupling", 0.0, 1.0)
    parts, missing = [], []
    for name in PAPER_OPTIMIZERS:
        row, partner = row_of(name), row_of(decoupled(name))
        if row.coupling == 0:
            continue
        mine = pairs[pairs.family == row.family]
        of_family = [
            _compare(f"{metric.upper()}, {row.label} against {partner.label}", mine, metric) for metric in _METRICS
        ]
        parts += of_family
        if any(part.verdict == "not enough" for part in of_family):
            missing.append(name)
    lacks, command = _lacks(evidence, pairs, missing) if missing else ("", "")
    return Finding(
        3, "At equal learning rate, momentum and decay, coupled runs have lower NC2 and NC3 than decoupled ones.",
        "Pairs of runs that differ in the coupling only, decay above 0, both fit the training data "
        f"({evidence.selection.percent}): {RULE.format(ratio='coupled/decoupled')}",
        said_by_metric(parts, "median ratio coupled/decoupled"), tuple(parts), (*pairs.id_high, *pairs.id_low),
        lacks, command,
    )  # fmt: skip


def decoupled(name: str) -> str:
    """Return the name of the decoupled form of one of the paper's optimizers."""
    family = row_of(name).family
    return next(one for one in PAPER_OPTIMIZERS if row_of(one).family == family and row_of(one).coupling == 0)


def _compare(name: str, pairs: pd.DataFrame, metric: str) -> Comparison:
    return ratio_below_one(name, pairs[f"{metric}_high"] / pairs[f"{metric}_low"], pairs.group)


def said_by_metric(parts: Sequence[Comparison], of: str) -> str:
    """Return the numbers of comparisons named "METRIC, what" in a line, those of a metric together.

    Args:
        of: what the numbers are, which stands before them.
    """
    found: dict[str, list[str]] = {}
    for part in parts:
        metric, _, what = part.name.partition(", ")
        if part.n:
            found.setdefault(metric, []).append(f"{what.partition(' against ')[0]} {part.text}")
    return f"{of}: " * bool(found) + "; ".join(f"{metric} {', '.join(texts)}" for metric, texts in found.items())


def _lacks(evidence: Evidence, pairs: pd.DataFrame, missing: list[str]) -> tuple[str, str]:
    counts = {name: pairs[pairs.family == row_of(name).family].group.nunique() for name in missing}
    texts = [f"{row_of(n).label} {count}" for n, count in counts.items()]
    what = f"more settings with a pair of runs that both fit; there are {', '.join(texts)}"
    runs = evidence.runs[evidence.runs.weight_decay > 0]
    for name in missing:
        both = (name, decoupled(name))
        there = [one for one in both if (runs.optimizer == one).any()]
        if len(there) == 1:  # the partners of what is there
            (other,) = set(both) - set(there)
            return lack(evidence, what, f"optimizer={there[0]} weight_decay>0", {"optimizer": [other]})
    present = next((name for name in missing if (runs.optimizer == name).any()), missing[0])
    return more_settings(evidence, what, [present, decoupled(present)])
