"""`pytest bench/kernels` measures, records and sums up; nothing is asserted of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_case_is_checked_timed_and_recorded(tmp_path: Path) -> None:
    record = tmp_path / "kernels.json"
    command = [
        sys.executable, "-m", "pytest", "bench/kernels/bench_update.py", "-q", "-p", "no:cacheprovider",
        "-k", "sgd and tiny", f"--benchmark-json={record}", "--benchmark-max-time=0.001", "--benchmark-min-rounds=1",
    ]  # fmt: skip
    # In what pytest-xdist takes for its own process nothing would be timed.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, cwd=ROOT, env=outside | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(record.read_text())["benchmarks"]
    assert [one["name"] for one in benchmarks[:3]] == ["nc", "torch fused", "torch foreach"]
    assert {one["group"] for one in benchmarks} == {"sgd, tiny: a step"}
    for one in benchmarks:
        assert {"difference", "gb_per_s", "share_of_copy"} <= one["extra_info"].keys()
    [line] = [line for line in done.stdout.splitlines() if line.startswith("sgd, tiny: a step  nc ")]
    assert "torch fused" in line
