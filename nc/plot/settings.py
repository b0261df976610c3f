"""What distinguishes runs: the order of optimizers, which settings vary, which runs differ in one, text for a run."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.formatting import options_text, read_json, setting_value
from ncollapse.optimizer_table import row_of
from ncollapse.plot.looks import ordered

#: Columns of runs that are neither settings nor metrics.
_OUTCOMES = ("id", "position", "status", "stack", "session", "train_samples", "seconds", "diverged_epoch")
#: Names of metrics, also in a frame of a few columns, which lacks their starts.
_METRIC = re.compile(r"nc[0-4](_\w+)?|(train|val)_(loss|accuracy|error)|weight_norm|feature_norm|degenerate")
#: The loss that titles and tables do not name.
USUAL_LOSS = "cross_entropy"
#: Settings that are written as symbols; all others by their names.
SYMBOLS = {"momentum": "β", "weight_decay": "λ", "coupling": "c"}
#: Written for every run, whether they vary or not.
_ALWAYS = ("lr", "momentum", "weight_decay")
#: Never written: the section's title or the table's first column has them, or they follow from the others.
_IN_TITLES = ("model", "data", "optimizer", "code")


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by optimizer, in the order of the table of optimizers; otherwise keep their order."""
    place = {name: i for i, name in enumerate(ordered(frame.optimizer))}
    return frame.sort_values("optimizer", key=lambda names: names.map(place), kind="stable")


def tried(runs: pd.DataFrame) -> list[str]:
    """Return the optimizers of these runs, in the order of the table of optimizers."""
    return ordered(runs.optimizer)


def setting_names(runs: pd.DataFrame) -> list[str]:
    """Return the columns that hold settings: neither what a run came to, nor a metric, which has a `NAME_start`."""
    known = set(runs.columns)
    return [
        str(name)
        for name in runs.columns
        if name not in _OUTCOMES
        and f"{name}_start" not in known
        and not str(name).endswith("_start")
        and not _METRIC.fullmatch(str(name))
    ]


def varying(runs: pd.DataFrame) -> list[str]:
    """Return the settings that have more than one value in these runs; a missing value counts as one."""
    return [name for name in setting_names(runs) if runs[name].nunique(dropna=False) > 1]


def alike(runs: pd.DataFrame, ignore: Iterable[str]) -> "pd.Series[int]":
    """Number the groups of runs that have the same settings, except for the settings in `ignore`."""
    names = [name for name in varying(runs) if name not in set(ignore)]
    return runs.groupby(names, dropna=False, sort=False).ngroup() if names else pd.Series(0, runs.index)


def described(runs: pd.DataFrame, ignore: Iterable[str] = ()) -> "pd.Series[str]":
    """Describe the settings of each run in a line, without those in `ignore`.

    The line has the learning rate, momentum and weight decay, the other settings that vary in `runs`, and the coupling
    where it is not the optimizer's default.
    """
    others = [name for name in varying(runs) if name not in (*_ALWAYS, *_IN_TITLES, "coupling")]
    names = [*(name for name in _ALWAYS if name in runs), *others]
    parts = [_texts(runs[name], SYMBOLS.get(name, name)) for name in names if name not in ignore]
    if "coupling" not in ignore and "coupling" in runs:
        defaults = {name: row_of(name).coupling for name in runs.optimizer.unique()}
        usual = (runs.coupling == runs.optimizer.map(defaults).astype(float)) | runs.coupling.isna()
        parts.append(np.where(usual, "", _texts(runs.coupling, SYMBOLS["coupling"])).astype(object))
    texts = zip(*parts, strict=True) if parts else [()] * len(runs)
    return pd.Series([" ".join(filter(None, line)) for line in texts], runs.index, dtype=object)


def _texts(column: "pd.Series[Any]", name: str) -> "np.ndarray[Any, Any]":
    """Return NAME=VALUE for every value, or OPTION=VALUE for options; each is formatted once: few are different."""
    codes, values = pd.factorize(column, use_na_sentinel=False)
    if name.endswith("_options"):
        texts = [options_text(read_json(value) or {}) for value in values]
    else:
        texts = [f"{name}={written(value)}" for value in values]
    return np.array(texts, dtype=object)[codes]


def written(value: object) -> str:
    """Format the value of a setting as a DataFrame holds it, missing values included."""
    return setting_value(None if pd.isna(value) else value)  # type: ignore[call-overload]
