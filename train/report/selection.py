"""How the best run of an optimizer is chosen: apart from the tables, so that the command line can name it quickly."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from ncollapse.train.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """How the tables choose the best run of an optimizer."""

    threshold: float = 0.999
    """Training accuracy that a run must reach to count, in [0, 1]."""
    best_by: Literal["nc0", "nc1", "nc2", "nc3"] = "nc0"
    """The metric whose smallest value is best."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold must lie in [0, 1], a share of the training samples; got {self.threshold:g}")

    def eligible(self, runs: "pd.DataFrame") -> "pd.DataFrame":
        """Runs that ended well and reached the threshold; a run that diverged or degenerated never counts."""
        return runs[(runs.status == "done") & (runs.train_accuracy >= self.threshold)]
