"""What distinguishes runs: the order of optimizers, which settings vary, which runs differ in one, text for a run."""

from collections.abc import Iterable

import pandas as pd

from ncollapse.train.config import FIELDS
from ncollapse.train.formatting import setting_value
from ncollapse.train.optimizers import FAMILY, OPTIMIZERS, TABLE

#: Settings that are written as symbols; all others by their names.
SYMBOLS = {"momentum": "β", "weight_decay": "λ", "coupling": "c"}
#: Written for every run, whether they vary or not.
_ALWAYS = ("lr", "momentum", "weight_decay")
#: Never written: the section's title or the table's first column has them.
_IN_TITLES = ("model", "data", "optimizer")


def family(optimizers: "pd.Series[str]") -> "pd.Series[str]":
    """Return the update rules: an optimizer and its form with decoupled decay have the same."""
    return optimizers.map(FAMILY)


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by optimizer, in the order of the table of optimizers; otherwise keep their order."""
    return frame.sort_values("optimizer", key=lambda names: names.map(OPTIMIZERS.index), kind="stable")


def tried(runs: pd.DataFrame) -> list[str]:
    """Return the optimizers of these runs, in the order of the table of optimizers."""
    return [name for name in OPTIMIZERS if name in set(runs.optimizer)]


def varying(runs: pd.DataFrame) -> list[str]:
    """Return the settings that have more than one value in these runs; a missing value counts as one."""
    return [f.name for f in FIELDS if f.name in runs and runs[f.name].nunique(dropna=False) > 1]


def alike(runs: pd.DataFrame, ignore: Iterable[str]) -> "pd.Series[int]":
    """Number the groups of runs that have the same settings, except for the settings in `ignore`."""
    names = [name for name in varying(runs) if name not in set(ignore)]
    if not names:
        return pd.Series(0, runs.index)
    return runs.groupby(names, dropna=False, sort=False).ngroup()


def described(runs: pd.DataFrame, ignore: Iterable[str] = ()) -> "pd.Series[str]":
    """Describe each run's settings in a line.

    The line has the learning rate, momentum and weight decay, the other settings that vary in `runs`, and the coupling
    where it is not the optimizer's default.

    Args:
        ignore: settings to leave out.
    """
    names = [*_ALWAYS, *(name for name in varying(runs) if name not in (*_ALWAYS, *_IN_TITLES, "coupling"))]
    parts = [[f"{SYMBOLS.get(name, name)}={written(v)}" for v in runs[name]] for name in names if name not in ignore]
    if "coupling" not in ignore:
        default = runs.coupling == runs.optimizer.map({name: row.coupling for name, row in TABLE.items()})
        parts.append(
            [
                "" if is_default else f"{SYMBOLS['coupling']}={written(c)}"
                for is_default, c in zip(default, runs.coupling, strict=True)
            ]
        )
    return pd.Series([" ".join(texts).strip() for texts in zip(*parts, strict=True)], runs.index, dtype=object)


def written(value: object) -> str:
    """Format the value of a setting as a DataFrame holds it, missing values included."""
    return setting_value(None if pd.isna(value) else value)  # type: ignore[call-overload]
