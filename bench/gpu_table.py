"""The CNNs on a GPU: what a step takes, then the paper's table, as many runs as the time allows.

make gpu-table MINUTES=25 DATA=DIR
python -m bench.gpu_table --minutes 25 --data-dir DIR [--out DIR] [-- OPTIONS OF ncollapse sweep]

First `bench.cnn_times` (cnn-cuda.json), then `ncollapse sweep paper-table`: the six optimizers at decay 5e-4, then the
other decays. paper-table.json is written after each, of the runs that have ended by then and of those that were under
way (`epoch` says how far they had come); the results folders stay, and the same command goes on in them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.gpu import run, why_not
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


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, extra = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything together")
    parser.add_argument("--data-dir", type=Path, help="where Fashion-MNIST is; by default $NCOLLAPSE_DATA, else ./data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="of the sweeps' results folders")
    parser.add_argument("--device", default="cuda", help="cpu: to see that it works")
    parser.add_argument("--speed-share", type=float, default=0.4, help="of the time, for the speed of a step")
    parser.add_argument("--commit", help="of the sources, where git cannot tell")
    options = parser.parse_args(own)
    if options.device == "cuda" and (reason := why_not()):
        print(f"gpu-table: nothing was run: {reason}.", file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * options.minutes
    out, commit = options.out.resolve(), ["--commit", options.commit] if options.commit else []
    failed = []
    if options.speed_share > 0:
        seconds = 60 * options.minutes * options.speed_share
        speed = ["-m", "bench.cnn_times", "--device", options.device, "--out", str(out), *commit]
        status, output = run([*speed, "--minutes", f"{max(0.1, seconds / 60 - 2):.2f}"], seconds)
        print(output, flush=True)
        failed += ["cnn_times"] if status not in (0, None) else []
    command = f"python -m bench.gpu_table --minutes {options.minutes:g}"
    record = Record(out / "paper-table.json", command, "cuda" if options.device == "cuda" else "cpu", options.commit)
    record.data |= {"sweep": extra, "paper": PAPER, "runs": []}
    place = ["--device", options.device, *(["--data-dir", str(options.data_dir)] if options.data_dir else [])]
    folders = {"reference": ["--weight-decay", "5e-4"], "decays": []}
    for name, chosen in folders.items():
        left = end - time.monotonic() - 5
        if left < 20:
            print(f"gpu-table: no time is left for {name}", flush=True)
            break
        folder = options.folder / f"paper-table-{name}"
        sweep = ["-m", "ncollapse.train", "sweep", "paper-table", "--out", str(folder), *place, *chosen, *extra]
        status, output = run(sweep, left)
        print(output[-4000:], flush=True)
        failed += [name] if status not in (0, None) else []
        found = {row["id"]: row for one in folders for row in trained(options.folder / f"paper-table-{one}")}
        record.data["runs"] = list(found.values())
        record.save()
    for row in record.data["runs"]:
        print(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}))
    print(f"gpu-table: {len(record.data['runs'])} runs in {out / 'paper-table.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
