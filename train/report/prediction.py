"""NC0 after each epoch of a run as theory predicts it."""

import functools
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ncollapse.optimizer_table import row_of
from ncollapse.train.config import FIELDS, RunConfig, is_own, make_run, sums_to_zero


def predicted_nc0(row: "pd.Series[Any]") -> NDArray[np.float64] | None:
    """Return NC0 after each epoch, `[epochs + 1]`, of a row of `load_runs`; None where nothing is known.

    The exact recursion of the row sum under ncollapse's SGD and SGDW, from NC0 before the first step. It needs a loss
    whose gradient by the logits sums to zero over the classes, and a head whose weight is trained and used nowhere
    else, as in all models that come with ncollapse. (Whether a model of the user's uses it elsewhere, a row cannot
    tell.)
    """
    if row_of(row["optimizer"]).family != "sgd" or not sums_to_zero(row["loss"]):
        return None
    if is_own("model", row["model"]) and row.nc0 == row.nc0_start:  # its head is fixed
        return None
    settings: dict[str, Any] = {field.name: row[field.name] for field in FIELDS}
    # A row of a DataFrame holds NumPy's numbers.
    values = {name: None if pd.isna(v) else v.item() if hasattr(v, "item") else v for name, v in settings.items()}
    config = make_run(values, "the store")
    return np.asarray(row.nc0_start * _factor(config, int(row.train_samples)) ** 2)


@functools.lru_cache(maxsize=64)  # a table and a figure ask for the same runs
def _factor(config: RunConfig, samples: int) -> NDArray[np.float64]:
    β, λ, c = config.momentum, config.weight_decay, config.decay_coupling
    steps, state, factors = config.steps_per_epoch(samples), np.array([1.0, 0.0]), [1.0]
    powers: dict[float, NDArray[np.float64]] = {}
    for epoch in range(config.epochs):
        # Within an epoch η stays: a step of `ufm.row_sum_factor` is a matrix on (s, v), and an epoch its power.
        η = config.lr * config.lr_factor(epoch)
        if η not in powers:
            powers[η] = np.linalg.matrix_power(np.array([[1 - η * λ, -η * β], [c * λ, β]]), steps)
        state = powers[η] @ state
        factors.append(float(state[0]))
    return np.array(factors)
