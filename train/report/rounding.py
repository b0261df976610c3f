"""Below which value NC0 is zero for float32: what the rounding of a run's weights leaves of the row sum."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Largest relative error of rounding to float32.
_UNIT = 2.0**-24
#: Standard deviations that count as rounding.
_DEVIATIONS = 4


def floor_of_nc0(steps: ArrayLike, weight_norm: ArrayLike) -> NDArray[np.float64]:
    """Return the NC0 that rounding alone can make, at several moments of a run.

    Each step rounds every weight w to float32. The error is evenly spread over ±u·|w|, u = 2⁻²⁴, at most, so its
    variance is at most u²w²/3; errors of different weights and steps do not depend on each other. Their sum over T
    steps is the error of the row sum s = Wᵀ1, a random walk: E‖error‖² = T·u²/3·‖W‖², whatever K and d. The floor is
    that of four standard deviations, 16·T·u²/3·‖W‖², with the largest ‖W‖ so far: ‖s‖ as computed and ‖s‖ as predicted
    differ by its square root at most. Decay makes errors fade, so that it is an upper estimate; the rounding of
    gradients, which are far smaller than weights at the usual learning rates, is not in it.

    Args:
        steps: T, optimizer steps up to each moment, `[M]`.
        weight_norm: ‖W‖, the Frobenius norm of the last layer's weights at each moment, `[M]`.

    Returns:
        `[M]`.
    """
    largest = np.fmax.accumulate(np.asarray(weight_norm, np.float64))
    return np.asarray(_DEVIATIONS**2 * np.asarray(steps, np.float64) * _UNIT**2 / 3 * largest**2)
