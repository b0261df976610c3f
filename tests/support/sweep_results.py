"""What a sweep found out, to be compared with what another one did."""

from pathlib import Path

import pandas as pd

from ncollapse.train.errors import NoResultsError
from ncollapse.train.results.reader import load_metrics, load_runs


def assert_same(a: Path, b: Path, but: str = "seconds") -> None:
    """Row by row and digit by digit; not how long it took, in which session, and the column `but`."""
    runs = [load_runs(folder).drop(columns=["seconds", "session", but], errors="ignore") for folder in (a, b)]
    pd.testing.assert_frame_equal(*runs, check_exact=True)
    pd.testing.assert_frame_equal(load_metrics(a), load_metrics(b), check_exact=True)


def count(out: Path, status: str) -> int:
    """How many runs have that status; 0 where a sweep is just starting."""
    try:
        return int((load_runs(out).status == status).sum())
    except NoResultsError:
        return 0
