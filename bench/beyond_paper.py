"""Neural collapse beyond the paper: other optimizers, other losses; what the presets `optimizers` and `losses` show.

python -m bench.beyond_paper      records bench/results/beyond-paper-cpu.json

The small CNN on handwritten digits, 200 epochs, three seeds. Of every metric the median over the seeds, with the least
and the greatest. Needs pytorch_optimizer. `python -m bench.tables` writes the tables of docs/beyond_the_paper.md.
"""

import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record import Record, recording
from ncollapse.train import sweep
from ncollapse.train.grid import load_grid

NAME = "beyond-paper-cpu.json"
PRESETS = ("optimizers", "losses")
METRICS = ("nc0_start", "nc0", "nc1", "nc2", "nc3", "train_accuracy", "val_accuracy")
SETTINGS = ["optimizer", "optimizer_options", "coupling", "loss", "label_smoothing", "lr", "weight_decay"]


def rows(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each setting: its values, how its runs ended, and each metric over the seeds."""
    found = []
    for settings, group in runs.groupby(SETTINGS, dropna=False, sort=False):
        row: dict[str, Any] = {
            name: None if pd.isna(value) else value for name, value in zip(SETTINGS, settings, strict=True)
        }
        row["ended"] = group.status.value_counts().to_dict()
        for name in METRICS:
            values = group[name].dropna()
            row[name] = (
                [float(f"{v:.4g}") for v in (values.median(), values.min(), values.max())] if len(values) else None
            )
        found.append(row)
    return found


def main() -> None:
    options = recording(__doc__).parse_args()
    record = Record(options.out / NAME, "python -m bench.beyond_paper", "cpu", options.commit)
    record.data["pytorch_optimizer"] = version("pytorch_optimizer")
    record.data["presets"] = {}
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            runs = sweep(preset, Path(folder), device="cpu")
            record.data["presets"][preset] = {
                "runs": len(load_grid(preset).runs),
                "seconds": round(time.perf_counter() - started),
                "rows": rows(runs),
            }
        record.save()


if __name__ == "__main__":
    main()
