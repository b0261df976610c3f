"""Seconds that `ncollapse report` takes, and bytes of its page: of the demo's runs, and of the paper's 3,888.

python -m bench.report_times       records bench/results/report.json

Nothing is trained: the stores are the presets' runs with made-up metrics, the paper's evaluated after each of its 200
epochs: 781,488 rows. The phases are timed in this process, on one core, after matplotlib's own start-up; "command" is
the whole command in a process of its own, "browser" the page's load event in headless chromium, where there is one.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.made_up import make_store
from bench.record import Record, recording
from ncollapse.train.grid import load_grid
from ncollapse.train.report.explorer.page import write_explorer
from ncollapse.train.report.page.verdicts import verdicts_of
from ncollapse.train.report.page.write import draw, parts_of, render
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection

ROUNDS = 3
#: Told to the page, which tells it to us.
_LOADED = (
    '<script>addEventListener("load", () => setTimeout(() => { document.title = "loaded " + '
    'performance.getEntriesByType("navigation")[0].loadEventEnd; }));</script></body>'
)


def phases(folder: Path) -> dict[str, float]:
    """Seconds of a report's parts."""
    seconds = dict.fromkeys(("load", "figures", "findings", "page", "explorer"), 0.0)
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
    known: dict[str, int] = {}
    parts = parts_of(results, Selection())
    drawn = [(part, [(section, draw(folder, section, known)) for section in part.sections()]) for part in parts]
    lap("figures")
    verdicts = verdicts_of(results, Selection(), {part.title: part.slug for part in parts})
    lap("findings")
    (folder / "report.html").write_text(render(folder, results, Selection(), drawn, known, verdicts), "utf-8")
    lap("page")
    write_explorer(results, Selection(), folder / "explore.html")
    lap("explorer")
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
    record = Record(options.out / "report.json", "python -m bench.report_times", "cpu", options.commit)
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
