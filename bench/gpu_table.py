"""The rows that the paper's table lacks, on a GPU, as many runs as the time allows.

make gpu-table MINUTES=25 DATA=DIR
python -m bench.gpu_table --minutes 5 --data-dir DIR [--out DIR] [-- OPTIONS OF ncollapse sweep]
python bench/gpu.py --steps table --data-dir DIR --out DIR --wheels .whl        the same on a bare machine
python -m bench.gpu_table --join FILE         add the runs of such a record to bench/results/paper-table.json

`ncollapse sweep` of bench/missing_rows.toml, or of another grid or preset (`--grid paper-table`). All three runs at
once are branches of one CUDA graph (`-- --stack 2 --workers 1`: two, then one). DIR/paper-table.json is written every
ten seconds, of the runs that have ended by then and of those under way (`epoch` says how far they have come,
`side_by_side` how many trained together). The results folder stays, and the same command goes on in it. Data may be
compressed (FILE.gz).
"""

import argparse
import gzip
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.gpu import ROOT, run, why_not
from bench.record import RESULTS, Record
from ncollapse.train import load_metrics, load_runs
from ncollapse.train.errors import NoResultsError
from ncollapse.train.report.prediction import predicted_nc0

#: What arXiv 2602.16642 has for ResNet9 on Fashion-MNIST; its NC0 is most likely ‖Wᵀ1‖, the root of ours, and its NC3
#: by all signs our `nc3_difference`: 0.35 after a fall by 75.1 % began at 1.41, as that does.
PAPER = {
    "sgd": {"nc0_norm": 2.14e-4, "nc1": 0.05, "nc2": 0.29, "nc3": 0.35},
    "adam": {"nc0_norm": 0.34, "nc1": 0.04, "nc2": 0.29, "nc3": 0.29},
    "adamw": {"nc0_norm": 5.33, "nc1": 0.20, "nc2": 0.54, "nc3": 0.78},
    "sgdw": {"nc0_norm": 0.55, "nc1": 0.26, "nc2": 0.46, "nc3": 0.80},
}
_SETTINGS = ("optimizer", "lr", "momentum", "weight_decay", "coupling", "precision", "seed", "epochs", "model", "data")
_ENDING = 15.0  # seconds before the end at which the sweep is to stop by itself
EXIT_STOPPED = 75  # of a sweep that has stopped by --minutes
_METRICS = ("nc0", "nc1", "nc2", "nc3", "nc3_difference", "nc4", "train_accuracy", "train_loss", "val_accuracy")


def trained(folder: Path) -> list[dict[str, Any]]:
    """The runs of a results folder that have been trained, or begun: settings, seconds, first and last metrics.

    Also NC0 at every evaluated epoch (`nc0_at`), and what theory says of its root at the last (`nc0_norm_predicted`).
    """
    try:
        runs, epochs = load_runs(folder), load_metrics(folder)
    except NoResultsError:
        return []
    runs = runs.assign(epoch=runs.id.map(epochs.groupby("run").epoch.max()))
    runs = runs[runs.epoch > 0].astype({"epoch": int})
    rows = []
    for _, one in runs.iterrows():
        own, predicted = epochs[epochs.run == one.id], predicted_nc0(one)
        values = {name: one[name] for name in ("id", *_SETTINGS, "status", "seconds", "epoch")}
        values["side_by_side"] = int((runs["stack"] == one["stack"]).sum())
        values |= {"nc0_norm": one.nc0**0.5, "nc0_norm_start": one.nc0_start**0.5}
        values["nc0_norm_predicted"] = None if predicted is None else predicted[one.epoch] ** 0.5
        values |= {name: one[name] for name in _METRICS}
        values |= {f"{name}_start": one[f"{name}_start"] for name in ("nc1", "nc2", "nc3", "nc3_difference")}
        path = {epoch: _plain(nc0) for epoch, nc0 in zip(own.epoch.tolist(), own.nc0, strict=True)}
        rows.append({name: _plain(value) for name, value in values.items()} | {"nc0_at": path})
    return rows


def _plain(value: Any) -> Any:
    """As JSON knows it: numpy's own numbers, and those that are missing, it does not."""
    return None if pd.isna(value) else value.item() if isinstance(value, np.generic) else value


def unpacked(data_dir: Path, target: Path) -> Path:
    """The folder of data with its compressed files unpacked, elsewhere; the folder itself if there are none."""
    packed = sorted(data_dir.rglob("*.gz"))
    if not packed:
        return data_dir
    for path in packed:
        plain = target / path.relative_to(data_dir).with_suffix("")
        plain.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path) as source, plain.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def join(path: Path, to: Path) -> None:
    """Add a record's runs to another one's, each with the device and the commit that trained it."""
    record, found = json.loads(to.read_text()), json.loads(path.read_text())
    machine = {"device": found["machine"]["device"], "commit": found["machine"]["commit"]}
    rows = {row["id"]: row for row in record["runs"]}
    for row in found["runs"]:
        if rows.get(row["id"], {}).get("status") != "done":
            rows[row["id"]] = row | machine
    record["runs"] = list(rows.values())
    to.write_text(json.dumps(record, indent=1) + "\n")


def train(options: argparse.Namespace, extra: list[str], scratch: Path) -> int:
    """Train the grid until the time is up, and record its runs."""
    end = time.monotonic() + 60 * options.minutes
    command = f"python -m bench.gpu_table --minutes {options.minutes:g} --grid {Path(options.grid).name}"
    device = "cuda" if options.device == "cuda" else "cpu"
    record = Record(options.out.resolve() / "paper-table.json", command, device, options.commit)
    record.data |= {"sweep": extra, "paper": PAPER, "runs": []}

    def save() -> None:
        record.data["runs"] = trained(options.folder)
        record.save()

    sweep = ["-m", "ncollapse.train", "sweep", options.grid, "--out", str(options.folder), "--device", options.device]
    if options.data_dir is not None:
        sweep += ["--data-dir", str(unpacked(options.data_dir, scratch / "data"))]
    left = end - time.monotonic()
    sweep += ["--minutes", f"{max(0.1, (left - _ENDING) / 60):.2f}"]
    log = scratch / "sweep.log"
    status = run([*sweep, *extra], left, log, meanwhile=save)
    save()
    print(log.read_text()[-4000:])
    for row in record.data["runs"]:
        print(
            json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items() if key != "nc0_at"})
        )
    print(f"gpu-table: {len(record.data['runs'])} runs in {record.path}")
    return 0 if status in (0, None, EXIT_STOPPED) else 1


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, extra = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything together")
    parser.add_argument("--data-dir", type=Path, help="where Fashion-MNIST is; by default $NCOLLAPSE_DATA, else ./data")
    parser.add_argument("--grid", default=str(ROOT / "bench" / "missing_rows.toml"), help="a TOML file, or a preset")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--folder", type=Path, default=Path("results") / "paper-table", help="the results folder")
    parser.add_argument("--device", default="cuda", help="cpu: to see that it works")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    parser.add_argument("--join", type=Path, metavar="FILE", help="train nothing, add this record's runs to the table")
    options = parser.parse_args(own)
    if options.join is not None:
        join(options.join, RESULTS / "paper-table.json")
        return 0
    if options.device == "cuda" and (reason := why_not()):
        print(f"gpu-table: nothing was run: {reason}.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        return train(options, extra or ["--stack", "3", "--workers", "1"], Path(scratch))


if __name__ == "__main__":
    raise SystemExit(main())
