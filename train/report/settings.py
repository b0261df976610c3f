"""What tells runs apart: which settings vary, which runs differ in one of them alone, and how a run is named."""

from collections.abc import Iterable

import pandas as pd

from ncollapse.train.config import FIELDS
from ncollapse.train.optimizers import FAMILY, TABLE

#: How settings are written; the others by their names.
SYMBOLS = {"momentum": "β", "weight_decay": "λ", "coupling": "c"}
#: Written of every run.
_ALWAYS = ("lr", "momentum", "weight_decay")
#: Said where runs are put together.
_ELSEWHERE = ("model", "data", "optimizer")


def family(optimizers: "pd.Series[str]") -> "pd.Series[str]":
    """The update rules, whatever their coupling: sgdw is sgd."""
    return optimizers.map(FAMILY)


def varying(runs: pd.DataFrame) -> list[str]:
    """The settings that have more than one value in these runs; none is a value."""
    return [f.name for f in FIELDS if f.name in runs and runs[f.name].nunique(dropna=False) > 1]


def alike(runs: pd.DataFrame, but: Iterable[str]) -> "pd.Series[int]":
    """A number for each run, the same for runs whose settings are the same but for those named."""
    names = [name for name in varying(runs) if name not in set(but)]
    if not names:
        return pd.Series(0, runs.index)
    return runs.groupby(names, dropna=False, sort=False).ngroup()


def described(runs: pd.DataFrame, but: Iterable[str] = ()) -> "pd.Series[str]":
    """Each run's settings in a line: learning rate, momentum, decay, a coupling of its own, and whatever else varies.

    Args:
        but: settings to leave out.
    """
    names = [*_ALWAYS, *(name for name in varying(runs) if name not in (*_ALWAYS, *_ELSEWHERE, "coupling"))]
    parts = [[f"{SYMBOLS.get(name, name)}={_value(v)}" for v in runs[name]] for name in names if name not in but]
    if "coupling" not in but:
        own = runs.coupling == runs.optimizer.map({name: row.coupling for name, row in TABLE.items()})
        parts.append(
            ["" if its else f"{SYMBOLS['coupling']}={_value(c)}" for its, c in zip(own, runs.coupling, strict=True)]
        )
    return pd.Series([" ".join(texts).strip() for texts in zip(*parts, strict=True)], runs.index, dtype=object)


def _value(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
