"""Which runs count and which is the best; imports nothing heavy, since the command line's options include it."""

import dataclasses
import math
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from tyro import conf

from ncollapse.formatting import percentage
from ncollapse.train.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Criterion = Literal["nc0", "nc1", "nc2", "nc3"]
#: The metrics that the paper's figures show.
NC: tuple[str, ...] = get_args(Criterion)
#: Below the highest training accuracy, where no run reaches the threshold: runs within a point of it are shown anyway.
_SLACK = 0.01
#: Thresholds that follow from an accuracy are rounded down to this many parts of 1, as percentages are written.
_PARTS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How the tables choose the best run of an optimizer."""

    threshold: float = 0.999
    """Training accuracy that a run must reach to count, in [0, 1]."""
    best_by: Annotated[Criterion, conf.arg(metavar="NC")] = "nc0"
    """The metric whose smallest value is best: nc0, nc1, nc2 or nc3."""

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
        Where none ended well, it stays.
        """
        highest = float(runs.train_accuracy[runs.status == "done"].max())
        if math.isnan(highest) or highest >= self.threshold:
            return self, ""
        return self.lowered(highest), self.missed(highest)

    def lowered(self, highest: float) -> "Selection":
        """Return the selection with a threshold a point below an accuracy that missed the threshold."""
        return dataclasses.replace(self, threshold=max(_rounded_down(highest - _SLACK), 0.0))

    def missed(self, accuracy: float) -> str:
        """Say that a training accuracy below the threshold is shown anyway."""
        # Rounded, 0.99896 would look as if it had reached 0.999.
        shown = accuracy if round(accuracy, 4) < self.threshold else _rounded_down(accuracy)
        return f"missed {self.percent}: {percentage(shown)}, shown anyway"


def _rounded_down(share: float) -> float:
    # 0.9999 · 10,000 is 9998.999…: without the small number, a share would lose a part that it has.
    return math.floor(share * _PARTS + 1e-6) / _PARTS
