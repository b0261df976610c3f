"""Checks of the arguments that `simulate` and `predict` share."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: "fixed": the unit vectors e_k; "etf": a simplex; "free": trained.
Features = Literal["fixed", "etf", "free"]


def check_shape(K: int, d: int, features: str | None) -> None:
    """Raise ValueError for numbers of classes and features that do not make a model."""
    if K < 2 or d < 1:
        raise ValueError(f"the model needs K ≥ 2 classes and d ≥ 1 features; got K = {K} and d = {d}")
    if features is not None and features not in get_args(Features):
        raise ValueError(f"features is {', '.join(map(repr, get_args(Features)))}; got {features!r}")
    if features == "etf" and d < K - 1:
        raise ValueError(f"a simplex of {K} classes needs d ≥ K − 1 = {K - 1} features; got d = {d}")
    if features == "fixed" and d < K:
        raise ValueError(f"the features e_1 … e_{K} need d ≥ K = {K}; got d = {d}. features='etf' needs one less")


def learning_rates(lr: ArrayLike, steps: int, lead: Sequence[int] = ()) -> NDArray[np.float64]:
    """The learning rate of every step, `[*lead, steps]`.

    Raises:
        ValueError: steps < 1, or `lr` is not positive and finite, or does not broadcast to that shape.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    rates = np.asarray(lr, dtype=np.float64)
    if not ((rates > 0) & (rates < np.inf)).all():
        raise ValueError(f"lr must be positive and finite; got {rates[~((rates > 0) & (rates < np.inf))].flat[0]:g}")
    try:
        return np.broadcast_to(rates, (*lead, steps))
    except ValueError:
        raise ValueError(
            f"lr is a number or has the shape [{', '.join(map(str, (*lead, steps)))}], one for each step; "
            f"got shape {list(rates.shape)}"
        ) from None
