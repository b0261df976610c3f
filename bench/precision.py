"""Whether computing in bfloat16 changes the picture of neural collapse: the same runs in float32 and in bfloat16.

python -m bench.precision      records bench/results/precision-cpu.json

The CNN on handwritten digits, 200 epochs, six optimizers, three seeds, each in both precisions; of every metric the
median over the seeds, with the least and the greatest. "bf16, measured in fp32": what `measure` makes of the weights
that bfloat16 trained, so that the rounding of training can be told from that of measuring.
"""

import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.record import Record, recording
from ncollapse import measure
from ncollapse.train.config import RunConfig, make_run
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.grid import Grid
from ncollapse.train.networks.models import build
from ncollapse.train.results.reader import load_runs

#: Optimizer -> learning rate and decay: those at which the demo's runs of it have the smallest NC0, but for AdamW and
#: SignumW, whose NC0 is never small.
SETTINGS = {
    "sgd": (0.1, 5e-3),
    "sgdw": (0.1, 5e-2),
    "signum": (3e-3, 5e-3),
    "signumw": (1e-3, 5e-2),
    "adam": (1e-2, 5e-3),
    "adamw": (3e-3, 5e-2),
}
METRICS = ("nc0", "nc1", "nc2", "nc3", "nc4", "train_accuracy", "val_accuracy")


def runs(epochs: int, seeds: int) -> list[RunConfig]:
    """Each twice, in float32 and in bfloat16."""
    shared = {"model": "cnn", "epochs": epochs, "eval_every": epochs}
    return [
        make_run({**shared, "optimizer": name, "lr": lr, "weight_decay": decay, "seed": seed, "precision": how}, "grid")
        for name, (lr, decay) in SETTINGS.items()
        for seed in range(seeds)
        for how in ("fp32", "bf16")
    ]


def digits(name: str, device: torch.device) -> Dataset:
    return load(name, device, data_dir=None, download=False)


def measured_in_fp32(folder: Path, data: Dataset) -> dict[str, dict[str, float]]:
    """Run -> metrics of its final weights, in float32."""
    found = {}
    for path in folder.glob("weights/*.pt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        model = build("cnn", 1, 8, 10, 0)
        model.load_state_dict(state)
        found[path.stem] = measure(model, (data.train_x, data.train_y)).as_dict()
    return found


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {
        name: float(f"{of(values):.5g}")
        for name, of in (("median", statistics.median), ("least", min), ("greatest", max))
    }


def main(arguments: list[str] | None = None) -> None:
    parser = recording(__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    grid = Grid("precision", tuple(runs(options.epochs, options.seeds)))
    record = Record(options.out / "precision-cpu.json", "python -m bench.precision", "cpu", options.commit)
    record.data |= {"model": "cnn", "data": "digits", "epochs": options.epochs, "seeds": options.seeds}
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sweep(grid, folder, digits, cpu, Options(save_weights=True), Console(stderr=True))
        frame, exact = load_runs(folder), measured_in_fp32(folder, digits("digits", cpu))
    rows: list[dict[str, Any]] = []
    for optimizer, (lr, decay) in SETTINGS.items():
        own = frame[frame.optimizer == optimizer]
        half = own[own.precision == "bf16"]
        ways = {
            "fp32": {name: own[own.precision == "fp32"][name] for name in METRICS},
            "bf16": {name: half[name] for name in METRICS},
            "bf16, measured in fp32": {n: [exact[run][n] for run in half.id] for n in METRICS if n != "val_accuracy"},
        }
        row: dict[str, Any] = {"optimizer": optimizer, "lr": lr, "weight_decay": decay}
        row["nc0_start"] = spread(own.nc0_start)
        row |= {way: {name: spread(values) for name, values in each.items()} for way, each in ways.items()}
        rows.append(row)
        print(
            optimizer,
            *(f"{way}: " + ", ".join(f"{n} {row[way][n]['median']:.4g}" for n in METRICS[:5]) for way in ways),
            sep="\n  ",
        )
    record.data["rows"] = rows
    record.save()


if __name__ == "__main__":
    main()
