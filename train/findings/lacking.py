"""What is missing for a verdict, and the command that adds it to the folder."""

import re
import shlex
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ncollapse.formatting import is_missing, number
from ncollapse.optimizer_table import PAPER_OPTIMIZERS
from ncollapse.train.findings.claim import Evidence
from ncollapse.train.grid import run_settings
from ncollapse.train.report.queries import PARTS
from ncollapse.train.results.schema import FINISHED

#: Texts that a condition takes without quotes.
_WORD = re.compile(r"""[^\s<>=!,"'{}]+""")


def lack(
    evidence: Evidence,
    what: str,
    where: str = "",
    settings: Mapping[str, Sequence[object]] | None = None,
    *,
    waits: bool = True,
) -> tuple[str, str]:
    """Return what is missing as a sentence, and the command that adds it.

    The command trains what the folder still has to train, where there is any; else runs of the folder with other
    settings.

    Args:
        what: what is missing, for instance "no AdamW".
        where: conditions on the runs whose settings are taken, as `ncollapse rerun --where` has them.
        settings: those that replace theirs: name -> values; by default two more seeds.
        waits: whether runs that are still to be trained may add it.
    """
    folder, runs = str(evidence.results.folder), evidence.runs
    left = int((~runs.status.isin(FINISHED)).sum())
    if left and waits:
        return f"{what}; {left:,} runs are still to be trained", _command(folder, "status=pending", {})
    conditions = " ".join(filter(None, [part_conditions(evidence), where])) or "status!=pending"
    return what, _command(folder, conditions, settings or {"seed": other_seeds(runs)})


def part_conditions(evidence: Evidence) -> str:
    """Return the conditions that choose the runs of the evidence in its folder; empty where it has no others."""
    everything, first = evidence.results.runs, evidence.runs.iloc[0]
    names = [name for name in PARTS if everything[name].nunique() > 1]
    return " ".join(f"{name}={quoted(first[name])}" for name in names)


def other_seeds(runs: pd.DataFrame, count: int = 2) -> list[int]:
    """Return the next seeds that no run has."""
    return [int(runs.seed.max()) + i for i in range(1, count + 1)]


def more_settings(evidence: Evidence, what: str, optimizers: Sequence[str]) -> tuple[str, str]:
    """Return what is missing, and the command that adds settings of optimizers of one family.

    Where the folder has runs with decay of all of these, they are trained with two more learning rates; where it has
    none of some, these are trained at the settings of the others; where it has none at all, at learning rates around
    that of the paper's preset.
    """
    runs = evidence.runs[(evidence.runs.weight_decay > 0) & evidence.runs.optimizer.isin(optimizers)]
    if len(runs) and (others := [name for name in optimizers if not (runs.optimizer == name).any()]):
        where = f"optimizer={','.join(dict.fromkeys(runs.optimizer))} weight_decay>0"
        return lack(evidence, what, where, {"optimizer": others})
    if len(runs):
        where = f"optimizer={','.join(dict.fromkeys(runs.optimizer))} weight_decay>0"
        return lack(evidence, what, where, {"lr": between(runs.lr)})
    lr = float(run_settings("paper", {"optimizer": optimizers[0]})["lr"])
    settings: dict[str, Sequence[object]] = {
        "optimizer": optimizers, "lr": [lr, float(number(3 * lr))], "momentum": [0.7, 0.9],
        "weight_decay": [5e-4, 5e-3, 5e-2],
    }  # fmt: skip
    return lack(evidence, what, settings=settings)


def more_rates(
    evidence: Evidence, what: str, settings: Mapping[str, Sequence[object]] | None = None
) -> tuple[str, str]:
    """Return what is missing, and the command that trains the optimizer with most settings at two more learning rates.

    Args:
        settings: other settings of these runs.
    """
    runs = evidence.runs
    most = runs.groupby("optimizer", sort=False).lr.nunique().idxmax()
    runs = runs[runs.optimizer == most]
    # A name as the report shows it may have its options in it; the code before them is the optimizer's.
    where = f"optimizer={quoted(most)}" if most in PAPER_OPTIMIZERS else ""
    return lack(evidence, what, where, {"lr": between(runs.lr), **(settings or {})})


def between(values: "pd.Series[float]") -> list[float]:
    """Return two values that are not among these positive ones: in the middle of the widest gaps, in the logarithm.

    There is a gap below the smallest and one above the largest, of a factor of 2 each.
    """
    there = np.unique(values)
    ends = np.log([there[0] / 2, *there, 2 * there[-1]])
    widest = np.argsort(-np.diff(ends).round(6), kind="stable")[:2]
    exact = np.exp((ends[:-1] + ends[1:])[np.sort(widest)] / 2)
    return [value if (rounded := float(number(value))) in there else rounded for value in map(float, exact)]


def _command(folder: str, where: str, settings: Mapping[str, Sequence[object]]) -> str:
    changes = [word for name, values in settings.items() for word in (f"--{name.replace('_', '-')}", *map(str, values))]
    return shlex.join(["ncollapse", "rerun", folder, "--where", where, *changes])


def quoted(value: object) -> str:
    """Return the value of a setting as a condition has it; options that are none are {}."""
    text = "none" if is_missing(value) and not isinstance(value, str) else str(value) or "{}"
    if _WORD.fullmatch(text) or text.startswith("{"):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'
