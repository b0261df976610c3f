"""NC1–NC3 of an untrained ResNet9 beside the paper's at its start: did it pad its images?

python -m bench.initial_numbers      records bench/results/initial-numbers.json

The first 1,500 images of Fashion-MNIST (--data-dir, or NCOLLAPSE_DATA), with 28 × 28 pixels and padded to 32 × 32, and
batch norm in evaluation mode (its initial statistics) and in training mode (those of each batch of 128). The paper's
numbers are those that its table's changes in percent and its final values make: arXiv 2602.16642.
"""

from pathlib import Path
from typing import Any

import torch

from bench.record import Record, recording
from ncollapse.measurement import Measurement, to_numbers
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.sets import load
from ncollapse.train.networks.models import build
from ncollapse.train.training.stack import Stack

NAME = "initial-numbers.json"
PAPER = {"nc1": [7.0, 8.0], "nc2": [0.78, 0.80], "nc3_difference": [1.40, 1.42]}
SAMPLES, BATCH, SEEDS, PADS = 1500, 128, (0, 1, 2), (0, 2)


def numbers(data: Dataset, seed: int, *, train: bool) -> dict[str, float]:
    """The metrics of `PAPER` of a network with initial weights."""
    model = build("resnet9", data.channels, data.size, data.num_classes, seed=seed)
    stack = Stack.of([model], torch.device("cpu"))
    measurement = Measurement(stack.weight)
    with torch.no_grad():
        for images, labels in data.evaluation_batches("train", BATCH, torch.device("cpu")):
            measurement.add(*stack(images, train=train), labels)
    values = to_numbers(measurement.finish()[0])
    return {name: float(f"{values[name][0]:.4g}") for name in PAPER}


def table(rows: list[dict[str, Any]]) -> str:
    """The record as a table of Markdown: of each number the least and the greatest of the seeds."""
    lines = ["| images | batch norm | NC1 | NC2 | NC3 |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        size = 28 + 2 * row["pad"]
        cells = [span([of[name] for of in row["seeds"].values()]) for name in PAPER]
        lines.append(f"| {size} × {size} | {row['batch_norm']} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| the paper's | | {' | '.join(span(values) for values in PAPER.values())} |"])


def span(values: list[float]) -> str:
    least, most = (f"{value:.2f}" for value in (min(values), max(values)))
    return least if least == most else f"{least}–{most}"


def main() -> None:
    parser = recording(__doc__)
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    record = Record(options.out / NAME, "python -m bench.initial_numbers", "cpu", options.commit)
    rows: list[dict[str, Any]] = []
    record.data |= {"data": "fashion-mnist", "samples": SAMPLES, "batch": BATCH, "paper": PAPER, "rows": rows}
    for pad in PADS:
        data = load("fashion-mnist", torch.device("cpu"), data_dir=options.data_dir, download=False, pad=pad)
        for train in (False, True):
            seeds = {str(seed): numbers(data.limited(SAMPLES), seed, train=train) for seed in SEEDS}
            rows.append({"pad": pad, "batch_norm": "training" if train else "evaluation", "seeds": seeds})
            record.save()
    print(table(rows))


if __name__ == "__main__":
    main()
