"""Neural collapse beyond the paper: other optimizers, other losses; what the presets `optimizers` and `losses` show.

python -m bench.beyond_paper      records bench/results/beyond-paper-cpu.json

The small CNN on handwritten digits, 200 epochs, three seeds. Of every metric the median over the seeds, with the least
and the greatest. Needs pytorch_optimizer. `python -m bench.beyond_paper --tables` prints the tables of the record.
"""

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from bench.record import Record, recording
from ncollapse.optimizer_table import row_of
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


def coupled(row: dict[str, Any]) -> str:
    """How the decay of a row's optimizer stands."""
    options = json.loads(row["optimizer_options"] or "{}")
    if "weight_decouple" in options:
        return "no" if options["weight_decouple"] else "yes"
    return "no" if row["coupling"] is None or row["coupling"] == 0 else "yes"


def number(value: list[float] | None) -> str:
    return "–" if value is None else f"{value[0]:.2g}"


def span(value: list[float] | None) -> str:
    return "–" if value is None else f"{value[0]:.2g} ({value[1]:.2g}–{value[2]:.2g})"


def tables(record: dict[str, Any]) -> str:
    """The record as tables of Markdown, a row for each optimizer, a column for each of the two decays."""
    lines = []
    for preset in PRESETS:
        names = ["optimizer", *(["loss"] if preset == "losses" else []), "decay in the gradient", "λ"]
        start = record["presets"][preset]["rows"][0]["nc0_start"]
        names += [f"NC0 (start {span(start)})", "NC1", "NC2", "NC3", "train acc.", "val. acc."]
        lines += ["", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
        for row in record["presets"][preset]["rows"]:
            loss = row["loss"] + (f", smoothed {row['label_smoothing']:g}" if row["label_smoothing"] else "")
            cells = [row_of(row["optimizer"]).label, *([loss] if preset == "losses" else []), coupled(row)]
            lost = {status: count for status, count in row["ended"].items() if status != "done"}
            if lost:
                told = ", ".join(f"{n} of {sum(row['ended'].values())} {status}" for status, n in lost.items())
                cells += [f"{row['weight_decay']:g}", told, *["–"] * 5]
            else:
                cells += [f"{row['weight_decay']:g}", span(row["nc0"])]
                cells += [number(row[name]) for name in ("nc1", "nc2", "nc3")]
                cells += ["–" if row[name] is None else f"{100 * row[name][0]:.1f} %" for name in METRICS[-2:]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = recording(__doc__)
    parser.add_argument("--tables", action="store_true", help="print the tables of the record, train nothing")
    options = parser.parse_args()
    path = options.out / NAME
    if options.tables:
        print(tables(json.loads(path.read_text())))
        return
    record = Record(path, "python -m bench.beyond_paper", "cpu", options.commit)
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
    print(tables(record.data))


if __name__ == "__main__":
    main()
