"""What theory predicts about NC0, exactly, for any network."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def row_sum_factor(
    lrs: Iterable[float], *, momentum: float = 0.0, weight_decay: float, coupling: float
) -> NDArray[np.float64]:
    """The last layer's row sum under SGD or SGDW, as a multiple of its start: s_t = factor[t] · s_0.

    The row sum of the cross-entropy gradient is zero, since the softmax and the one-hot target both sum to one. So
    s = Wᵀ1 is moved by decay and momentum alone: v ← βv + cλs, then s ← (1 − η(1 − c)λ)s − ηv, a linear recursion that
    holds for every network and data set (arXiv 2602.16642, Theorems 3.1 and 3.2). NC0 is its square:
    NC0_t = factor[t]² · NC0_0. It leaves a real run only by the rounding of its arithmetic.

    Args:
        lrs: η_t of each step, T of them.
        momentum: β; heavy ball without dampening or Nesterov.
        weight_decay: λ.
        coupling: c; 1 for SGD, 0 for SGDW.

    Returns:
        `[T + 1]` float64, beginning with 1.
    """
    s, v = 1.0, 0.0
    factors = [s]
    for lr in lrs:
        v = momentum * v + coupling * weight_decay * s
        s = (1 - lr * (1 - coupling) * weight_decay) * s - lr * v
        factors.append(s)
    return np.array(factors)
