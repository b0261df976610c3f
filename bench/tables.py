"""The tables of README and docs that come from bench/results: written between their marks, or compared.

python -m bench.tables            writes them
python -m bench.tables --check    ends with 1 where a document has other numbers than its record

A document marks the place: `<!-- table NAME -->`, the table, `<!-- end of table -->`.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import findings
from bench.record import RESULTS
from ncollapse.formatting import change, number
from ncollapse.optimizer_table import row_of

ROOT = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A record."""
    record: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return record


def demo() -> str:
    """The best setting of each optimizer in the demo."""
    (found,) = read("demo.json")["benchmarks"]
    titles = ["", "NC0", "change", "predicted", "NC1", "NC2", "NC3", "train / val. accuracy", "settings"]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for row in found["extra_info"]["table"]:
        predicted = number(math.nan if row["nc0_predicted"] is None else row["nc0_predicted"])
        accuracy = f"{100 * row['train_accuracy']:.1f} / {100 * row['val_accuracy']:.1f} %"
        cells = [row_of(row["optimizer"]).label, f"**{number(row['nc0'])}**", change(row["nc0_change"]), predicted]
        cells += [*(number(row[name]) for name in ("nc1", "nc2", "nc3")), accuracy, row["settings"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def all_findings(record: str, part: int) -> str:
    """The findings of a record's part: claim, what was measured, verdict."""
    return findings.table(_findings(read(record), part))


def _findings(record: dict[str, Any], part: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record["parts"][part]["findings"]
    theory: list[dict[str, Any]] = record["parts"][-1]["findings"]
    return found + theory


def initial_numbers() -> str:
    """NC1–NC3 of ResNet9 before training, beside what the paper's changes in percent start from."""
    record = read("initial-numbers.json")
    lines = ["| images | batch norm | NC1 | NC2 | NC3 (difference) |", "| --- | --- | --- | --- | --- |"]
    for row in record["rows"]:
        size = 28 + 2 * row["pad"]
        cells = [
            ", ".join(f"{seed[name]:.{digits}f}" for seed in row["seeds"].values())
            for name, digits in (("nc1", 1), ("nc2", 2), ("nc3_difference", 2))
        ]
        lines.append(f"| {size} × {size} | {row['batch_norm']} | {' | '.join(cells)} |")
    paper = [f"{low:g}–{high:g}" for low, high in record["paper"].values()]
    return "\n".join([*lines, f"| the paper's | ? | {' | '.join(paper)} |"])


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "findings": partial(all_findings, "findings-cpu.json", 0),
    "paper-digits-cnn": partial(all_findings, "paper-digits-cpu.json", 0),
    "paper-digits-mlp": partial(all_findings, "paper-digits-cpu.json", 1),
    "initial-numbers": initial_numbers,
}


def written(text: str) -> str:
    """A document with its tables as the records have them."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    wrong = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text("utf-8")
        if (new := written(text)) != text:
            wrong.append(path.name)
            if not check:
                path.write_text(new, "utf-8")
    if check and wrong:
        print(f"other numbers than in bench/results: {', '.join(wrong)}; python -m bench.tables", file=sys.stderr)
    return int(check and bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
