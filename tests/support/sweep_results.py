"""Compare the results of two sweeps."""

from pathlib import Path

import pandas as pd

from ncollapse.train.errors import NoResultsError
from ncollapse.train.results.reader import load_metrics, load_runs


def assert_same(a: Path, b: Path, but: str = "seconds") -> None:
    """Assert that all rows are equal to the last digit, except for seconds, session and the column `but`."""
    runs = [load_runs(folder).drop(columns=["seconds", "session", but], errors="ignore") for folder in (a, b)]
    pd.testing.assert_frame_equal(*runs, check_exact=True)
    pd.testing.assert_frame_equal(load_metrics(a), load_metrics(b), check_exact=True)


def count(out: Path, status: str) -> int:
    """Count the runs with a status; 0 where the sweep has not created its store yet."""
    try:
        return int((load_runs(out).status == status).sum())
    except NoResultsError:
        return 0
