"""The main job: the command `ncollapse demo`, from its start to its report. Also draws the README's figure.

make bench
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ncollapse.train.report.best import main_table
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.reader import load_runs

FIGURE = Path(__file__).parents[1] / "docs" / "nc0.png"


def test_demo(benchmark: Any, tmp_path: Path) -> None:
    folders = iter([tmp_path / str(i) for i in range(3)])
    out = tmp_path / "0"
    command = [sys.executable, "-m", "ncollapse.train", "demo", "--out"]
    benchmark.pedantic(lambda: subprocess.run([*command, next(folders)], check=True), rounds=3)

    runs = load_runs(out)
    table = main_table(runs, Selection()).set_index("optimizer")
    start = runs.nc0_start.iloc[0]
    assert (table.nc0[["sgd", "signum", "adam"]] < start / 10).all()
    assert (runs.nc0[runs.optimizer.isin(["signumw", "adamw"])] > start).all()
    for name in ("sgd", "sgdw"):
        assert abs(table.nc0[name] / table.nc0_predicted[name] - 1) < 0.01

    benchmark.extra_info["command"] = "ncollapse demo"
    benchmark.extra_info["runs"] = len(runs)
    process_seconds = [float(load_runs(tmp_path / str(i)).seconds.sum()) for i in range(3)]
    benchmark.extra_info["training_seconds_of_all_processes"] = process_seconds
    benchmark.extra_info["nc0_start"] = float(start)
    recorded = table.reset_index().drop(columns="run").astype(object)
    benchmark.extra_info["table"] = recorded.where(recorded.notna(), None).to_dict("records")  # JSON has no NaN
    shutil.copy(out / "figures" / "nc0-mlp-digits.png", FIGURE)
