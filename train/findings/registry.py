"""The claims, their findings in a results folder, and the table of these."""

import dataclasses
import json
from collections.abc import Callable, Sequence

import pandas as pd

from ncollapse.train.findings.accuracy import nc4_redundant, no_proxy
from ncollapse.train.findings.best_alignment import strongest_alignment
from ncollapse.train.findings.claim import Evidence, Finding
from ncollapse.train.findings.coupled_pairs import coupled_collapse_further
from ncollapse.train.findings.evidence import evidence_of
from ncollapse.train.findings.interpolation import smooth_interpolation
from ncollapse.train.findings.larger_decay import larger_decay_does_not_help
from ncollapse.train.findings.momentum_pairs import more_momentum
from ncollapse.train.findings.partial import partial_collapse_claim
from ncollapse.train.findings.placement import decay_placement
from ncollapse.train.findings.recursion import exact_recursion
from ncollapse.train.findings.row_sums import row_sum_by_decay
from ncollapse.train.findings.theory_claim import theorems
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.view import Column, View

#: Number of a claim -> its test on the runs of one model, data set and loss.
CLAIMS: dict[int, Callable[[Evidence], Finding]] = {
    1: exact_recursion,
    2: row_sum_by_decay,
    3: coupled_collapse_further,
    4: larger_decay_does_not_help,
    5: smooth_interpolation,
    6: more_momentum,
    7: decay_placement,
    8: partial_collapse_claim,
    9: nc4_redundant,
    10: no_proxy,
    11: strongest_alignment,
}
#: The title of the finding that needs no runs.
THEORY = "Theory"


def findings_of(results: Results, selection: Selection) -> list[tuple[str, list[Finding]]]:
    """Return what `findings_of_runs` returns, and the finding on theory, which is simulated once in a process."""
    return [*findings_of_runs(results, selection), (THEORY, [theorems()])]


def findings_of_runs(results: Results, selection: Selection) -> list[tuple[str, list[Finding]]]:
    """Return title and findings of each model, data set and loss, in the order of the claims.

    It takes seconds for thousands of runs, and needs no torch.
    """
    return [
        (evidence.title, [_noted(test(evidence), evidence.note) for test in CLAIMS.values()])
        for evidence in evidence_of(results, selection)
    ]


def _noted(finding: Finding, note: str) -> Finding:
    """Return a finding that says that the threshold of training accuracy was relaxed, where it was."""
    if not note or finding.number == 1:  # which is of all runs
        return finding
    return dataclasses.replace(finding, says=f"{finding.says} ({note})" if finding.says else note)


def as_json(found: Sequence[tuple[str, Sequence[Finding]]]) -> str:
    """Return the findings as JSON: title of a part -> its findings, with all numbers and the ids of their runs."""
    content = {title: [finding.as_dict() for finding in findings] for title, findings in found}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def findings_view(slug: str, findings: Sequence[Finding]) -> View:
    """Show findings, a row per claim."""
    rows = [
        {
            **{field.name: getattr(one, field.name) for field in dataclasses.fields(Finding)},
            "verdict": one.verdict_text, "parts": json.dumps(one.as_dict()["parts"]), "runs": " ".join(one.runs),
        }
        for one in findings
    ]  # fmt: skip
    columns = (
        Column.count("number", "claim"), Column.text("claim", "says"), Column.text("tested"),
        Column.text("says", "the runs"), Column.text("verdict"), Column.text("lacks", "missing"),
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(Finding)]
    frame = pd.DataFrame(rows, columns=[*names, "verdict"])
    return View(f"findings-{slug}", "The claims of arXiv 2602.16642, as these runs have them.", columns, frame)
