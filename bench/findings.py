"""The paper's claims on recorded experiments: what `ncollapse findings` says of a sweep.

python -m bench.findings findings        trains the preset `findings`: bench/results/findings-cpu.json
python -m bench.findings paper-digits    trains the paper's 648 settings on digits: bench/results/paper-digits-cpu.json
python -m bench.findings findings-gpu --device cuda --data-dir DIR --folder DIR --minutes 8
                                         trains ResNet9 on Fashion-MNIST: bench/results/findings-gpu.json

`--folder DIR` keeps the results folder, and the same command goes on in it: bring its runs.sqlite home from a machine
that is lent. The record is written after each share of the runs; those of findings-gpu come in an order in which each
adds to a verdict, some five minutes of an H100 each.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import Record, recording
from ncollapse.train import load_runs
from ncollapse.train.errors import NoResultsError
from ncollapse.train.findings.registry import findings_of
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.reader import load_sessions


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A sweep: where it is recorded, its arguments, and the shares of its runs as conditions, in order."""

    record: str
    arguments: tuple[str, ...]
    shares: tuple[str, ...] = ("",)


_PAPER_DIGITS = "paper --model cnn mlp --data digits --precision fp32 --pad 0 --eval-every 1"
EXPERIMENTS = {
    "findings": Experiment("findings-cpu.json", ("findings",)),
    "paper-digits": Experiment("paper-digits-cpu.json", tuple(_PAPER_DIGITS.split())),
    "findings-gpu": Experiment(
        "findings-gpu.json",
        ("findings-gpu", "--stack", "1", "--workers", "1"),
        (
            "seed=0 weight_decay=5e-3 eval_every=5 optimizer=adam,adamw coupling=0,1",
            "seed=0 weight_decay=5e-3 eval_every=5 optimizer=sgd,sgdw",
            "seed=0 weight_decay=5e-4 eval_every=5 optimizer=sgd,sgdw,adam,adamw",
            "seed=0 weight_decay=5e-3 eval_every=5 coupling>0 coupling<1",
            "seed=0 weight_decay<1e-2 eval_every=5 optimizer=signum,signumw",
            "seed=0 weight_decay>1e-2",
            "seed=0 eval_every=1",
            "seed=1 weight_decay<1e-2",
            "seed=2 weight_decay<1e-2",
            "",
        ),
    ),
}


def parts(folder: Path) -> list[dict[str, Any]]:
    """What `ncollapse findings` says of a results folder, part by part; of the runs behind a claim their number."""
    found = []
    for title, findings in findings_of(read_results(folder), Selection()):
        rows = [{**one.as_dict(), "runs": len(one.runs), "verdict_text": one.verdict_text} for one in findings]
        for row in rows:
            row.pop("command")  # it names the folder
        found.append({"title": title, "findings": rows})
    return found


def _sessions(folder: Path) -> int:
    """The number of the last start of a sweep in a folder; 0 where there was none."""
    try:
        return max((session["id"] for session in load_sessions(folder)), default=0)
    except NoResultsError:
        return 0


def train(experiment: Experiment, folder: Path, options: argparse.Namespace) -> None:
    """Train an experiment into a folder, share by share, and record after each what the folder shows."""
    arguments = ["sweep", *experiment.arguments]
    command = f"ncollapse {shlex.join(arguments)}"
    record = Record(options.out / experiment.record, command, options.device, options.commit)
    sessions = _sessions(folder)
    before = json.loads(record.path.read_text()) if record.path.exists() else {}
    started = time.perf_counter()
    arguments += ["--out", str(folder), "--device", options.device]
    arguments += ["--data-dir", str(options.data_dir)] if options.data_dir else []
    for share in experiment.shares:
        limits = ["--where", share] if share else []
        if options.minutes is not None:
            left = options.minutes - (time.perf_counter() - started) / 60
            if left <= 0:
                break
            limits += ["--minutes", f"{left:.2f}"]
        status = subprocess.run([sys.executable, "-m", "ncollapse.train", *arguments, *limits], check=False).returncode
        if status not in (0, 4, 75):  # 4: some runs have diverged; 75: the time is over
            raise SystemExit(status)
        runs = load_runs(folder)
        # Of a folder that was trained before, nothing but the verdicts is new.
        trained = runs.session.max() > sessions or not before
        record.data |= {
            "runs": len(runs),
            "statuses": runs.status.value_counts().to_dict(),
            "seconds_of_command": round(time.perf_counter() - started) if trained else before["seconds_of_command"],
            "seconds_of_all_runs": round(float(runs.seconds.sum())),
            "parts": parts(folder),
        }
        record.save()


def main() -> None:
    parser = recording(__doc__)
    parser.add_argument("experiments", nargs="+", help=f"what to train: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--folder", type=Path, help="of the results; by default one that is deleted")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data-dir", type=Path, help="where Fashion-MNIST is")
    parser.add_argument("--minutes", type=float, help="for each experiment; it goes on when called again")
    options = parser.parse_args()
    if unknown := set(options.experiments) - EXPERIMENTS.keys():
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    for name in options.experiments:
        with tempfile.TemporaryDirectory() as temporary:
            train(EXPERIMENTS[name], options.folder or Path(temporary), options)


if __name__ == "__main__":
    main()
