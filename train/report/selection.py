"""Which runs count and which is the best; imports nothing heavy, since the command line's options include it."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal, get_args

from ncollapse.formatting import percentage
from ncollapse.train.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Criterion = Literal["nc0", "nc1", "nc2", "nc3"]
#: The metrics that the paper's figures show.
NC: tuple[str, ...] = get_args(Criterion)
#: Below the highest training accuracy, where no run reaches the threshold: runs within a point of it are shown anyway.
_SLACK = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How the tables choose the best run of an optimizer."""

    threshold: float = 0.999
    """Training accuracy that a run must reach to count, in [0, 1]."""
    best_by: Criterion = "nc0"
    """The metric whose smallest value is best."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold must lie in [0, 1], a share of the training samples; got {self.threshold:g}")

    @property
    def percent(self) -> str:
        """The threshold as text."""
        return f"{100 * self.threshold:g} %"

    def eligible(self, runs: "pd.DataFrame") -> "pd.DataFrame":
        """Return the runs that ended well and reached the threshold; never a diverged or degenerate run."""
        return runs[(runs.status == "done") & (runs.train_accuracy >= self.threshold)]

    def relaxed(self, runs: "pd.DataFrame") -> tuple["Selection", str]:
        """Return a selection that some of the runs pass, and what has to be said of it, empty where nothing has.

        Where none reaches the threshold, it is a point below the highest training accuracy of those that ended well.
        """
        highest = runs.train_accuracy[runs.status == "done"].max()
        if math.isnan(highest) or len(self.eligible(runs)):
            return self, ""
        note = f"missed {self.percent}: {percentage(highest)}, shown anyway"
        return dataclasses.replace(self, threshold=max(float(highest) - _SLACK, 0.0)), note
