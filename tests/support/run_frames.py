"""Frames like those of `load_runs`, without a results folder."""

from typing import Any

import pandas as pd

from ncollapse.train.config import RunConfig
from ncollapse.train.results.columns import METRICS, RUN_COLUMNS, dtypes


def runs_of(*settings: dict[str, Any]) -> pd.DataFrame:
    """Return a frame like that of `load_runs`, of done runs; keys that are no settings are values of other columns."""
    rows = []
    for position, given in enumerate(map(dict, settings)):
        others = {k: given.pop(k) for k in list(given) if k not in RunConfig().as_dict()}
        config = RunConfig(**given)
        metrics = dict.fromkeys([*METRICS, *(f"{name}_start" for name in METRICS)], 1.0)
        state = {"id": f"run{position}", "position": position, "status": "done", "train_samples": 1000, "seconds": 1.0}
        rows.append(config.as_dict() | metrics | state | others)
    types = dtypes(RUN_COLUMNS)
    return pd.DataFrame(rows, columns=list(types)).astype(types)
