"""The tables of README and docs, written between their marks, and their sentences with numbers, compared with records.

python -m bench.tables            writes the tables, and says which sentences have other numbers than their record
python -m bench.tables --check    writes nothing; ends with 1 where a document says something else than its record

A document marks the place of a table: `<!-- table NAME -->`, the table, `<!-- end of table -->`. What sentences must
say is in `bench/tables/sentences.py`.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import presets_table, schema_tables
from bench.tables import (
    claims,
    comparisons,
    microbenchmarks,
    networks,
    optimizers,
    records,
    sentences,
    statistics,
    sweeps,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/*.md", "examples/*.md")
_MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "demo": claims.demo,
    "findings": partial(claims.findings, "findings-cpu.json", 0),
    "paper-digits-cnn": partial(claims.findings, "paper-digits-cpu.json", 0),
    "paper-digits-mlp": partial(claims.findings, "paper-digits-cpu.json", 1),
    "paper-table": claims.paper_table,
    "initial-numbers": claims.initial_numbers,
    "beyond-optimizers": partial(claims.beyond, "optimizers"),
    "beyond-losses": partial(claims.beyond, "losses"),
    "optimizers-cpu": optimizers.on_cpu,
    "optimizers-compiled": optimizers.compiled,
    "optimizers-rewritten": optimizers.rewritten,
    "optimizers-gpu": partial(optimizers.on_gpu, *optimizers.CUDA),
    "optimizers-h200": partial(optimizers.on_gpu, "optim-cuda-h200.json"),
    "not-faster": comparisons.not_faster,
    "statistics-cpu": statistics.on_cpu,
    "statistics-gpu": statistics.on_gpu,
    "statistics-adding": statistics.adding,
    "measure": statistics.whole,
    "moment-accuracy": statistics.accuracy,
    "row-sum": statistics.row_sum,
    "step": networks.step,
    "batch-norm": networks.batch_norm,
    "prototypes": networks.prototypes,
    "precision": networks.precision,
    "kernel-code": networks.kernel_code,
    "sweeps": sweeps.rate,
    "own-models": sweeps.own_models,
    "large-folders": sweeps.large_folders,
    "reports": sweeps.reports,
    "trials": sweeps.trials,
    "microbenchmarks": microbenchmarks.on_cpu,
    "records": records.records,
    "presets": presets_table.presets_table,
    "run-columns": schema_tables.run_columns,
    "metric-columns": schema_tables.metrics,
    "database": schema_tables.database,
}


def written(text: str) -> str:
    """A document with its tables as the records have them."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args(arguments).check
    wrong, must = [], sentences.of_documents()
    for path in sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern)):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        new = written(text)
        if new != text and check:
            wrong.append(f"{name}: a table is not of the records as they are; python -m bench.tables writes it")
        elif new != text:
            path.write_text(new, "utf-8")
        wrong += [f"{name} does not say “{told}”" for told in sentences.missing(text, must.get(name, []))]
        if name == "docs/benchmarks.md":
            wrong += [f"{name}: no record says “{told}”" for told in sentences.unfounded(text, must[name])]
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
