"""NC0 over steps in the unconstrained features model: the data of the figure of `ncollapse theory`."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ncollapse.ufm import Prediction


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """NC0 under one optimizer.

    Attributes:
        steps: `[T]`, the recorded steps.
        nc0: `[T]`, as simulated.
        prediction: over all steps; None where theory has none.
    """

    optimizer: str
    coupling: float
    steps: "NDArray[np.int64]"
    nc0: "NDArray[np.float64]"
    prediction: "Prediction | None"
