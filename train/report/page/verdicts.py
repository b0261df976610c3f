"""What the claims' tests found in the runs of the report, for the page, its files and the terminal."""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ncollapse.train.findings.claim import Finding, Verdict
from ncollapse.train.findings.registry import findings_of_runs
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import Selection

#: Verdict -> its mark on the page, the verb for one claim, and for several.
_WORDS: dict[Verdict, tuple[str, str, str]] = {
    "holds": ("✓", "holds", "hold"),
    "fails": ("✗", "fails", "fail"),
    "not enough": ("?", "lacks runs", "lack runs"),
}
#: Parts whose counts the terminal shows.
_MOST_LINES = 11


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """The findings in the runs of one model, data set and loss; `slug` names their files."""

    title: str
    slug: str
    findings: Sequence[Finding]

    @property
    def text(self) -> str:
        """How many claims hold, fail, and lack runs."""
        counts = Counter(finding.verdict for finding in self.findings)
        parts = [
            f"{counts[verdict]} {words[1 if counts[verdict] == 1 else 2]}"
            for verdict, words in _WORDS.items()
            if counts[verdict]
        ]
        first, *others = parts or ["0 hold"]
        number, _, verb = first.partition(" ")
        return ", ".join([f"{number} {'claim' if number == '1' else 'claims'} {verb}", *others])

    @staticmethod
    def mark(finding: Finding) -> str:
        """The sign of a verdict, so that it does not depend on colours."""
        return _WORDS[finding.verdict][0]


def verdicts_of(results: Results, selection: Selection, slugs: Mapping[str, str]) -> list[Verdicts]:
    """Return what the claims' tests find in the runs of each part of the report.

    Args:
        slugs: title of a part -> its slug.
    """
    found = findings_of_runs(results, selection)
    return [Verdicts(title, slugs[title], findings) for title, findings in found if findings]


def in_short(verdicts: Sequence[Verdicts], folder: Path) -> list[str]:
    """Return the lines of the terminal: the counts of each part, and the command that shows the claims."""
    command = f"ncollapse findings {shlex.quote(str(folder))}"
    lines = [f"{one.title}: {one.text}" for one in verdicts[:_MOST_LINES]]
    if len(verdicts) > _MOST_LINES:
        lines.append(f"{len(verdicts) - _MOST_LINES} more models, data sets and losses")
    return [*lines[:-1], f"{lines[-1]}: {command}"] if lines else []
