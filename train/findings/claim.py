"""What a claim's test returns: parts with numbers and intervals, and the verdict that follows from them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ncollapse.formatting import is_missing, number

if TYPE_CHECKING:
    import pandas as pd

    from ncollapse.train.report.queries import Results
    from ncollapse.train.report.selection import Selection

Verdict = Literal["holds", "fails", "not enough"]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The runs of one model, data set and loss, for the tests of the claims.

    Attributes:
        title: the model, data set and loss, as the report names them.
        runs: rows of `load_runs`, of these runs.
        fit: those of them that ended well and fit the training data: that reached the threshold of `selection`.
        note: a sentence on a threshold that was relaxed since no run had reached it; else empty.
        selection: the threshold in use.
        results: for histories of chosen runs.
        preset: the name of the grid that the folder was made with, for commands that add what is missing.
    """

    title: str
    runs: "pd.DataFrame"
    fit: "pd.DataFrame"
    note: str
    selection: "Selection"
    results: "Results"
    preset: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison of a claim, for instance NC3 of Adam against AdamW.

    Attributes:
        name: what is compared, in a few words.
        value: the number that decides, in words `of`, with its 95 % interval `low` to `high` (NaN where there is none).
        of: what the number is, for instance "median ratio".
        verdict: whether this comparison goes as the claim says.
        n: number of runs, pairs or groups behind it, as `counted` names them.
        more: further numbers by name, for instance {"share": 0.93, "p": 0.002}.
    """

    name: str
    of: str
    value: float
    verdict: Verdict
    n: int
    counted: str = "runs"
    low: float = math.nan
    high: float = math.nan
    more: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """The number with its interval, as tables show it."""
        interval = "" if is_missing(self.low) else f" ({number(self.low)} to {number(self.high)})"
        return f"{number(self.value)}{interval}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the runs say of one claim.

    Attributes:
        number, claim: as the paper has it, a sentence.
        tested: how it is tested, a sentence, with the thresholds that decide.
        says: the numbers that decide, in a short sentence, with intervals.
        parts: the comparisons; the claim holds where all of them do that could be made.
        runs: ids of the runs behind it.
        lacks: what is missing for a verdict, or for a part of it; empty where nothing is.
        command: the command that adds it; empty where nothing is missing.
        needs_all: whether one comparison that is open leaves the claim open; else it is of those that could be made.
    """

    number: int
    claim: str
    tested: str
    says: str
    parts: tuple[Comparison, ...]
    runs: tuple[str, ...]
    lacks: str = ""
    command: str = ""
    needs_all: bool = False

    @property
    def verdict(self) -> Verdict:
        """Not enough without a comparison; fails where one of them fails."""
        verdicts = [part.verdict for part in self.parts]
        found = overall(verdicts)
        return "not enough" if self.needs_all and found == "holds" and "not enough" in verdicts else found

    @property
    def verdict_text(self) -> str:
        """The verdict; where comparisons differ, with how many of them hold, and how many are open."""
        verdicts = [part.verdict for part in self.parts]
        hold, left = verdicts.count("holds"), verdicts.count("not enough")
        if self.verdict == "not enough" or hold in (0, len(verdicts)):
            return self.verdict
        return f"{self.verdict} ({hold} of {len(verdicts)} hold{f', {left} open' if left else ''})"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON holds it: NaN as null."""
        return _as_json({**dataclasses.asdict(self), "verdict": self.verdict})


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of a claim whose comparisons have these verdicts; those with too little count for nothing."""
    decided = [verdict for verdict in verdicts if verdict != "not enough"]
    if not decided:
        return "not enough"
    return "fails" if "fails" in decided else "holds"


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
