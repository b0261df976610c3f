"""The runs of a results folder as evidence: a part for each model, data set and loss."""

import pandas as pd

from ncollapse.optimizer_table import row_of
from ncollapse.plot.settings import alike
from ncollapse.train.findings.claim import Evidence
from ncollapse.train.report.queries import Results, parts_by_title
from ncollapse.train.report.selection import Selection


def evidence_of(results: Results, selection: Selection) -> list[Evidence]:
    """Return the evidence of each model, data set (with its options) and loss, titled as the report titles its parts.

    Where no run reaches the threshold of `selection`, that of the part is relaxed, and its note says so.
    """
    found = []
    for title, runs in parts_by_title(results.runs):
        relaxed, note = selection.relaxed(runs)
        preset = results.meta.get("grid", "")
        found.append(Evidence(title, runs, measured_most(relaxed.eligible(runs)), note, relaxed, results, preset))
    return found


def measured_most(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that differ in more than in what was measured of them; of others the one measured most often."""
    same = alike(runs, ["eval_every", "layers"])
    return runs[~same[runs.eval_every.sort_values(kind="stable").index].duplicated().reindex(runs.index)]


def of_paper(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the paper's optimizers, with columns `family`, the update rule, and `setting`.

    `setting` numbers the settings without the seed: runs with the same number differ in their seeds only. The optimizer
    itself is no part of it, since its family and its coupling are all there is to it.
    """
    rows = {name: row_of(name) for name in runs.optimizer.unique()}
    runs = runs[runs.optimizer.map({name: row.in_paper for name, row in rows.items()}).astype(bool)]
    runs = runs.assign(family=runs.optimizer.map({name: row.family for name, row in rows.items()}))
    return runs.assign(setting=alike(runs, ["seed", "optimizer"]))
