"""Which runs count and which is the best; imports nothing heavy, since the command line's options include it."""

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

from ncollapse.train.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Criterion = Literal["nc0", "nc1", "nc2", "nc3"]
#: The metrics that the paper's figures show.
NC: tuple[str, ...] = get_args(Criterion)


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
