"""README and docs: their tables hold the numbers of bench/results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_records() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
