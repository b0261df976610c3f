"""Seconds that `ncollapse report` takes, and bytes of its page: of the demo's runs, and of the paper's 3,888.

python -m bench.bench_report       records bench/results/report.json

Nothing is trained: the stores are the presets' runs with made-up metrics, the paper's evaluated after each of its 200
epochs: 781,488 rows. The phases are timed in this process, on one core, after matplotlib's own start-up; "command" is
the whole command in a process of its own, "browser" the page's load event in headless chromium, where there is one.
"""

import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.record import Record, recording
from ncollapse.train.grid import Grid, load_grid
from ncollapse.train.report.page.write import draw, parts_of, render
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.provenance import describe_machine, device_name
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store

ROUNDS = 3
#: Told to the page, which tells it to us.
_LOADED = (
    '<script>addEventListener("load", () => setTimeout(() => { document.title = "loaded " + '
    'performance.getEntriesByType("navigation")[0].loadEventEnd; }));</script></body>'
)


def make_store(folder: Path, grid: Grid) -> int:
    """Write a finished sweep of made-up metrics; returns the rows of metrics."""
    with Store(folder, grid) as store:
        store.begin_session(f"ncollapse sweep {grid.name}", describe_machine(device_name("cpu")))
    rng = np.random.default_rng(0)
    names = list(METRICS)
    places = ", ".join("?" * (2 + len(names)))
    rows = 0
    connection = sqlite3.connect(folder / FILE)
    with connection:
        for run in grid.runs:
            epochs = np.unique([*range(0, run.epochs, run.eval_every), run.epochs])
            part = epochs / run.epochs
            coupled = run.decay_coupling
            pull = np.tanh(30 * run.weight_decay**0.5 * (0.2 + run.momentum) * run.lr**0.2)  # in 0 … 1
            last = dict.fromkeys(names, 2.0 - 3.0 * pull * (0.5 + 0.5 * coupled))  # logarithm to base e
            last |= {"nc0": 5.0 - 13.0 * pull * coupled, "train_loss": -5.0 - run.momentum}
            values = {
                name: np.exp(1 + (last[name] - 1 + 0.3 * rng.standard_normal()) * part + 0.02 * noise)
                for name, noise in zip(names, rng.standard_normal((len(names), len(epochs))), strict=True)
            }
            values["train_accuracy"] = 1 - 0.9 * np.exp(-(6 + rng.random() * 8) * part)
            values["val_accuracy"] = 0.93 * values["train_accuracy"] + 0.01 * rng.random()
            values["nc4"] = 1.02 - values["train_accuracy"]
            values["degenerate"] = np.zeros(len(epochs))
            table = np.stack([values[name] for name in names], axis=1)
            connection.executemany(
                f"INSERT INTO metrics (run, epoch, {', '.join(names)}) VALUES ({places})",
                [(run.id, int(epoch), *row) for epoch, row in zip(epochs, table.tolist(), strict=True)],
            )
            rows += len(epochs)
            done = ("diverged" if rng.random() < 0.02 else "done", float(rng.random()), 60_000, run.id)
            connection.execute("UPDATE runs SET status = ?, seconds = ?, train_samples = ? WHERE id = ?", done)
    connection.close()
    return rows


def phases(folder: Path) -> dict[str, float]:
    """Seconds of a report's parts."""
    seconds = {"load": 0.0, "figures": 0.0, "page": 0.0}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[name] += now - started
        started = now

    results = read_results(folder)
    lap("load")
    for kind in ("figures", "tables"):
        (folder / kind).mkdir(exist_ok=True)
    known = {run: i for i, run in enumerate(results.runs.id)}
    parts = parts_of(results, Selection())
    drawn = [(part, [(section, draw(folder, section, known)) for section in part.sections()]) for part in parts]
    lap("figures")
    (folder / "report.html").write_text(render(folder, results, Selection(), drawn), "utf-8")
    lap("page")
    return seconds


def command(folder: Path) -> float:
    """Seconds of the whole command."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ncollapse.train", "report", str(folder)], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def browser(folder: Path) -> float | None:
    """Seconds until the page's load event in headless chromium; None where there is none."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    page = folder / "loaded.html"
    page.write_text((folder / "report.html").read_text("utf-8").replace("</body>", _LOADED), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    with tempfile.TemporaryDirectory() as profile:
        shown = subprocess.run(
            [chromium, *options, f"--user-data-dir={profile}", page.as_uri()],
            capture_output=True,
            text=True,
            check=True,
        )
    loaded = re.search(r"<title>loaded ([\d.]+)</title>", shown.stdout)
    assert loaded, shown.stderr
    return float(loaded[1]) / 1e3


def median(of: Callable[[], Any], rounds: int) -> Any:
    """Of each number that a function returns, the median."""
    found = [of() for _ in range(rounds)]
    if isinstance(found[0], dict):
        return {name: round(float(np.median([f[name] for f in found])), 3) for name in found[0]}
    return None if found[0] is None else round(float(np.median(found)), 3)


def main() -> int:
    parser = recording(__doc__)
    parser.add_argument("--keep", type=Path, help="folder for the stores and their reports, which stay")
    options = parser.parse_args()
    record = Record(options.out / "report.json", "python -m bench.bench_report", "cpu", options.commit)
    record.data |= {"unit": "seconds, medians on one core", "rounds": ROUNDS, "rows": []}
    psutil.Process().cpu_affinity([0])
    with tempfile.TemporaryDirectory() as temporary:
        for name, overrides in (("demo", {}), ("paper", {"eval_every": [1]})):
            grid = load_grid(name, overrides)
            folder = (options.keep or Path(temporary)) / name
            rows = make_store(folder, grid)
            phases(folder)  # imports, matplotlib's list of fonts
            seconds = median(lambda folder=folder: phases(folder), ROUNDS)  # type: ignore[misc]
            seconds["command"] = median(lambda folder=folder: command(folder), ROUNDS)  # type: ignore[misc]
            seconds["browser"] = median(lambda folder=folder: browser(folder), ROUNDS)  # type: ignore[misc]
            if seconds["browser"] is None:
                print("no chromium here: the page's load time is not measured", file=sys.stderr)
            size = (folder / "report.html").stat().st_size
            row = {"grid": name, "runs": len(grid.runs), "epochs": rows, "page_bytes": size, "seconds": seconds}
            record.data["rows"].append(row)
            record.save()
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
