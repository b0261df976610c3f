"""What is missing for a verdict, and the command that adds it to the folder."""

import re
import shlex
from collections.abc import Mapping, Sequence

import pandas as pd

from ncollapse.formatting import number
from ncollapse.train.findings.claim import Evidence
from ncollapse.train.grid import run_settings
from ncollapse.train.results.schema import FINISHED

#: Texts that a condition takes without quotes.
_WORD = re.compile(r"""[^\s<>=!,"'{}]+""")
#: Settings that tell the parts of a folder apart.
_PARTS = ("model", "data", "data_options", "loss")


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
    names = [name for name in _PARTS if everything[name].nunique() > 1 and first[name]]
    return " ".join(f"{name}={_quoted(str(first[name]))}" for name in names)


def other_seeds(runs: pd.DataFrame, count: int = 2) -> list[int]:
    """Return the next seeds that no run has."""
    return [int(runs.seed.max()) + i for i in range(1, count + 1)]


def more_settings(evidence: Evidence, what: str, optimizers: Sequence[str]) -> tuple[str, str]:
    """Return what is missing, and the command that adds settings of optimizers of one family.

    Where the folder has runs of one of these with decay, they are trained with two more learning rates; where it has
    none, at learning rates around that of the paper's preset.
    """
    runs = evidence.runs[(evidence.runs.weight_decay > 0) & evidence.runs.optimizer.isin(optimizers)]
    if len(runs):
        where = f"optimizer={','.join(dict.fromkeys(runs.optimizer))} weight_decay>0"
        return lack(evidence, what, where, {"lr": between(runs.lr)})
    lr = float(run_settings("paper", {"optimizer": optimizers[0]})["lr"])
    settings: dict[str, Sequence[object]] = {
        "optimizer": optimizers, "lr": [lr, 3 * lr], "momentum": [0.7, 0.9], "weight_decay": [5e-4, 5e-3, 5e-2],
    }  # fmt: skip
    return lack(evidence, what, settings=settings)


def between(values: "pd.Series[float]") -> list[float]:
    """Return two values that are not among these positive ones: 0.7 and 1.4 times their median."""
    middle = float(values.median())
    return [float(number(0.7 * middle)), float(number(1.4 * middle))]


def _command(folder: str, where: str, settings: Mapping[str, Sequence[object]]) -> str:
    changes = [word for name, values in settings.items() for word in (f"--{name.replace('_', '-')}", *map(str, values))]
    return shlex.join(["ncollapse", "rerun", folder, "--where", where, *changes])


def _quoted(text: str) -> str:
    if _WORD.fullmatch(text) or text.startswith("{"):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'
