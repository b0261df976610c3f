"""The demo, the paper's claims and its main table, networks before training, and what lies beyond the paper."""

import json
import math
from typing import Any

from bench.tables.markdown import read, table
from ncollapse.formatting import DASH, change, number
from ncollapse.optimizer_table import row_of

#: The paper's main table (arXiv 2602.16642): changes from initialisation; its values stand in the record.
PAPER_CHANGES = {
    "sgd": ("< −99.5 %", "−99.3 %", "−63.0 %", "−75.1 %"),
    "sgdw": ("−68.9 %", "−96.3 %", "−42.4 %", "−43.5 %"),
    "adam": ("−80.6 %", "−99.5 %", "−63.9 %", "−79.5 %"),
    "adamw": ("> +100 %", "−97.2 %", "−32.4 %", "−45.2 %"),
}
_ORDER = ("sgd", "sgdw", "signum", "signumw", "adam", "adamw")


def demo() -> str:
    """The best setting of each optimizer in the demo."""
    (found,) = read("demo.json")["benchmarks"]
    rows = []
    for row in found["extra_info"]["table"]:
        predicted = number(math.nan if row["nc0_predicted"] is None else row["nc0_predicted"])
        accuracy = f"{100 * row['train_accuracy']:.1f} / {100 * row['val_accuracy']:.1f} %"
        cells = [row_of(row["optimizer"]).label, f"**{number(row['nc0'])}**", change(row["nc0_change"]), predicted]
        rows.append([*cells, *(number(row[name]) for name in ("nc1", "nc2", "nc3")), accuracy, row["settings"]])
    return table(["", "NC0", "change", "predicted", "NC1", "NC2", "NC3", "train / val. accuracy", "settings"], rows)


def findings(record: str, part: int) -> str:
    """The findings of a record's part: claim, what was measured, verdict; the theory's last."""
    parts = read(record)["parts"]
    found = parts[part]["findings"] + parts[-1]["findings"]
    rows = [[f"{row['number']}. {row['claim']}", row["says"] or row["lacks"], row["verdict_text"]] for row in found]
    return table(["claim", "measured", "verdict"], rows)


def initial_numbers() -> str:
    """NC1–NC3 of ResNet9 before training, beside what the paper's changes in percent start from."""
    record = read("initial-numbers.json")
    rows = []
    for row in record["rows"]:
        size = 28 + 2 * row["pad"]
        cells = [
            ", ".join(f"{seed[name]:.{digits}f}" for seed in row["seeds"].values())
            for name, digits in (("nc1", 1), ("nc2", 2), ("nc3_difference", 2))
        ]
        rows.append([f"{size} × {size}", row["batch_norm"], *cells])
    paper = [f"{low:g}–{high:g}" for low, high in record["paper"].values()]
    titles = ["images", "batch norm", "NC1", "NC2", "NC3 (difference)"]
    return table(titles, [*rows, ["the paper's", "?", *paper]])


def paper_table() -> str:
    """The paper's main table, and our runs that came past the last drop of the learning rate and fit the data."""
    record = read("paper-table.json")
    rows = []
    for name in _ORDER:
        label = row_of(name).label
        if paper := record["paper"].get(name):
            values = [_final(paper["nc0_norm"]), *(f"{paper[m]:.2f}" for m in ("nc1", "nc2", "nc3"))]
            cells = [f"{value} ({told})" for value, told in zip(values, PAPER_CHANGES[name], strict=True)]
            rows.append([f"{label}, paper", *cells])
        for run in record["runs"]:
            if run["optimizer"] == name and run["epoch"] > 2 * run["epochs"] // 3 and run["train_accuracy"] > 0.99:
                told = f"{label}, **ours**, learning rate {run['lr']:g}"
                told += "" if run["status"] == "done" else f", {run['epoch']} of the {run['epochs']} epochs"
                metrics = ("nc0_norm", "nc1", "nc2", "nc3_difference")
                rows.append([told, *(f"{_final(run[m])} ({_change(run, m)})" for m in metrics)])
    return table(["", "NC0 as ‖Wᵀ1‖", "NC1", "NC2", "NC3 as ‖W/‖W‖ − M/‖M‖‖"], rows)


def _final(value: float) -> str:
    """A final value, as the paper's table writes it."""
    if value >= 0.005:
        return f"{value:.2f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _change(run: dict[str, Any], metric: str) -> str:
    percent = 100 * (run[metric] / run[f"{metric}_start"] - 1)
    if percent < -99.95:
        return "< −99.9 %"
    text = f"{percent:+.0f} %" if percent >= 100 else f"{percent:+.1f} %"
    return text.replace("-", "−")


def beyond(preset: str) -> str:
    """Other optimizers, or other losses: of NC0 the median and range of the seeds, of the others the median."""
    found = read("beyond-paper-cpu.json")["presets"][preset]["rows"]
    losses = preset == "losses"
    rows = []
    for row in found:
        loss = row["loss"] + (f", smoothed {row['label_smoothing']:g}" if row["label_smoothing"] else "")
        cells = [row_of(row["optimizer"]).label, *([loss] if losses else []), coupled(row), f"{row['weight_decay']:g}"]
        if lost := {status: count for status, count in row["ended"].items() if status != "done"}:
            told = ", ".join(f"{n} of {sum(row['ended'].values())} {status}" for status, n in lost.items())
            rows.append([*cells, told, *[DASH] * 5])
        else:
            metrics = [f"{row[name][0]:.2g}" for name in ("nc1", "nc2", "nc3")]
            accuracies = [f"{100 * row[name][0]:.1f} %" for name in ("train_accuracy", "val_accuracy")]
            rows.append([*cells, _span(row["nc0"]), *metrics, *accuracies])
    titles = ["optimizer", *(["loss"] if losses else []), "decay in the gradient", "λ"]
    titles += [f"NC0 (start {_span(found[0]['nc0_start'])})", "NC1", "NC2", "NC3", "train acc.", "val. acc."]
    return table(titles, rows)


def coupled(row: dict[str, Any]) -> str:
    """Whether the decay of a row's optimizer is added to the gradient."""
    options = json.loads(row["optimizer_options"] or "{}")
    if "weight_decouple" in options:
        return "no" if options["weight_decouple"] else "yes"
    return "no" if row["coupling"] is None or row["coupling"] == 0 else "yes"


def _span(value: list[float]) -> str:
    return f"{value[0]:.2g} ({value[1]:.2g}–{value[2]:.2g})"
