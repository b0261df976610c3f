"""What a large results folder costs: recording, planning, reading and reporting beside its number of runs.

python -m bench.large_store                     records bench/results/large-store.json
python -m bench.large_store --label before      the same of an older version on the PYTHONPATH, beside it

Nothing is trained: the stores hold made-up metrics (`made_up.py`). "record" is one evaluation of a stack of 32 runs, as
`Store.record` and the progress bar take it; "plan" is from the grid's file to the first stack; "status", "export" and
"report" are whole commands. "processor" is the processor's time, without waiting for the disk or for other programs;
`peak_gb` is the largest memory of the process.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.made_up import make_store
from bench.record import Record, recording
from ncollapse.train.engine.grouping import make_stacks
from ncollapse.train.engine.progress_bar import SweepProgress
from ncollapse.train.grid import load_grid
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.record import Ended, Evaluation
from ncollapse.train.results.writer import Store

#: Runs that train together, and evaluations that are timed.
STACK, EVALUATIONS = 32, 200
LRS = [round(float(lr), 8) for lr in np.geomspace(1e-4, 1, 162)]
#: Of the report: the paper's number of runs, with 162 learning rates.
MANY_RATES = f"""epochs = 200
eval_every = 10
optimizer = ["sgd", "sgdw", "signum", "signumw", "adam", "adamw"]
lr = {LRS}
weight_decay = [0.0, 5e-5, 5e-4, 5e-3]
"""


def grid_of(runs: int, evaluations: int) -> str:
    """A grid's file with so many runs, each evaluated so many times."""
    seeds = -(-runs // (10 * 25 * 10 * 4))
    return f"""epochs = {evaluations - 1}
eval_every = 1
optimizer = ["sgd", "sgdw", "signum", "signumw", "adam", "adamw", "lion", "lionw", "muon", "muonw"]
lr = {[round(float(lr), 8) for lr in np.geomspace(1e-4, 0.25, 25)]}
momentum = {[round(0.09 * i, 2) for i in range(10)]}
weight_decay = [0.0, 5e-5, 5e-4, 5e-3]
seed = {list(range(seeds))}
"""


#: A program's largest memory, in GB, as Linux tells it; that of `getrusage` is also its parent's.
_PEAK = """
def peak():
    lines = [line.split() for line in open("/proc/self/status")]
    return round(next(int(line[1]) for line in lines if line[0] == "VmHWM:") / 2**20, 3)
"""


def seconds_of(*command: str) -> dict[str, float]:
    """Seconds of a command in a process of its own, and its largest memory."""
    code = f"""{_PEAK}
import sys
from ncollapse.train.cli import main
main(sys.argv[1:])
print(peak(), file=sys.stderr)"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    seconds = round(time.perf_counter() - started, 3)
    if done.returncode:
        return {"failed_after": seconds}
    return {"seconds": seconds, "peak_gb": float(done.stderr.splitlines()[-1])}


def loading(folder: Path, function: str) -> dict[str, float]:
    """Seconds to load a table, in a process of its own that has imported everything; rows; its largest memory."""
    code = f"""{_PEAK}
import json, sys, time
from ncollapse.train import {function}
import pandas
started = time.perf_counter()
rows = len({function}(sys.argv[1]))
print(json.dumps({{"seconds": round(time.perf_counter() - started, 3), "rows": rows, "peak_gb": peak()}}))"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    found: dict[str, float] = json.loads(done.stdout)
    return found


def planning(file: Path, folder: Path) -> dict[str, float]:
    """Seconds from a grid's file to the first stack of a new folder, and those of the processor."""
    started, used = time.perf_counter(), time.process_time()
    grid = load_grid(str(file))
    with Store(folder, grid) as store:
        finished = store.finished()
        left = [run for run in grid.runs if run.id not in finished]
        stacks = make_stacks(left, lambda key: STACK, 2)
        store.set_plan(stacks, {"engine": "local", "stack": "auto", "workers": 2})
        session = store.begin_session("bench", {})
        planned = store.stacks()
        SweepProgress(grid.name, grid.runs, store.finished(), Console(quiet=True))
        store.begin(planned[0], session, 60_000, resume=False)
        found = {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}
    return {name: round(seconds, 3) for name, seconds in found.items()}


def record_evaluations(file: Path, folder: Path) -> dict[str, float]:
    """Milliseconds of an evaluation of the stack of pending runs, and of the one with which all of them end."""
    grid = load_grid(str(file))
    rng = np.random.default_rng(1)
    times, used = [], []
    with Store(folder, grid) as store:
        finished = store.finished()
        store.set_plan([[run for run in grid.runs if run.id not in finished]], {"workers": 1})
        session = store.begin_session("bench", {})
        (stack,) = store.stacks()
        store.begin(stack, session, 60_000, resume=False)
        bar = SweepProgress(grid.name, grid.runs, store.finished(), Console(quiet=True))
        rows = tuple(range(len(stack.runs)))
        for epoch in range(EVALUATIONS):
            values = {name: rng.standard_normal(len(rows)).tolist() for name in METRICS}
            ended = {i: Ended("done", None, 1.0) for i in rows} if epoch == EVALUATIONS - 1 else {}
            evaluation = Evaluation(epoch, rows, values, {}, ended, {})
            started, before = time.perf_counter(), time.process_time()
            bar.end(store.record(stack, evaluation))
            bar.advance_to(stack, epoch)
            times.append(1e3 * (time.perf_counter() - started))
            used.append(1e3 * (time.process_time() - before))
    middle, high = np.percentile(times[:-1], [50, 90])
    found = {"median_ms": middle, "p90_ms": high, "last_ms": times[-1], "processor_median_ms": np.median(used)}
    return {name: round(float(value), 3) for name, value in found.items()}


def report(folder: Path) -> dict[str, float]:
    """Seconds, memory and bytes of a report."""
    found = seconds_of("report", str(folder))
    page = folder / "report.html"
    return {**found, "page_mb": round(page.stat().st_size / 1e6, 2)} if page.exists() else found


def of_size(work: Path, runs: int, evaluations: int, parts: set[str]) -> dict[str, Any]:
    """The costs of a folder with so many runs, each evaluated so many times."""
    folder, file = work / f"{runs}-{evaluations}", work / f"grid-{runs}-{evaluations}.toml"
    file.write_text(grid_of(runs, evaluations))
    row: dict[str, Any] = {"evaluations": evaluations}
    if "plan" in parts:
        row["plan"] = planning(file, work / "planned")
        shutil.rmtree(work / "planned")
    grid = load_grid(str(file))
    row["runs"], row["rows"] = len(grid.runs), make_store(folder, grid, keep_pending=STACK)
    row["store_gb"] = round((folder / "runs.sqlite").stat().st_size / 1e9, 2)
    if "record" in parts:
        row["record"] = record_evaluations(file, folder)
    if "status" in parts:
        row["status"] = min((seconds_of("status", str(folder)) for _ in range(3)), key=lambda found: found["seconds"])
    for name in ("load_runs", "load_metrics"):
        if name in parts:
            row[name] = loading(folder, name)
    if "export" in parts:
        row["export"] = seconds_of("export", str(folder), "--out", str(work / "export"))
        shutil.rmtree(work / "export", ignore_errors=True)
    if "report" in parts:
        row["report"] = report(folder)
    shutil.rmtree(folder)
    return row


def main() -> None:
    parser = recording(__doc__)
    parser.add_argument("--label", default="now", help="name of this version in the record")
    parser.add_argument("--sizes", nargs="*", default=["10000x11", "100000x11", "100000x101", "many-rates"])
    parser.add_argument(
        "--parts", nargs="*", default=["plan", "record", "status", "load_runs", "load_metrics", "export", "report"]
    )
    parser.add_argument("--work", type=Path, help="folder for the stores, several GB")
    options = parser.parse_args()
    path = options.out / "large-store.json"
    record = Record(path, "python -m bench.large_store", "cpu", options.commit)
    known = json.loads(path.read_text())["versions"] if path.exists() else {}
    rows: list[dict[str, Any]] = []
    record.data["versions"] = {**known, options.label: {"machine": record.data.pop("machine"), "rows": rows}}
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        for size in options.sizes:
            if size == "many-rates":
                file, folder = Path(temporary, "many.toml"), Path(temporary, "many")
                file.write_text(MANY_RATES)
                grid = load_grid(str(file))
                row: dict[str, Any] = {
                    "grid": "162 learning rates",
                    "runs": len(grid.runs),
                    "rows": make_store(folder, grid),
                }
                row["report"] = report(folder)
            else:
                runs, evaluations = map(int, size.split("x"))
                row = of_size(Path(temporary), runs, evaluations, set(options.parts))
            rows.append(row)
            record.save()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
