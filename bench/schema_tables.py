"""The tables of docs/results.md that describe a results folder, made from the package's own description of it."""

import re

from ncollapse.train.results.columns import METRICS, RUN_COLUMNS
from ncollapse.train.results.schema import SETTINGS, TABLES

#: Table of the database -> what a row of it is. A table that is missing here is an error.
_ROWS = {
    "runs": "a run: settings and status",
    "metrics": "a run and evaluated epoch",
    "layers": 'a run with `layers = "all"`, evaluated epoch and block',
    "geometry": "a run and kept epoch: the bytes of a `Snapshot`",
    "stacks": "a stack: runs that train side by side, with its progress",
    "sessions": "a start of the sweep: command, and versions, commit and device as JSON",
    "meta": "the grid's name, the plan, fingerprints of data and code, metrics of your own",
}


def database() -> str:
    """A row a table of runs.sqlite: what its rows are, and its columns."""
    if _ROWS.keys() != TABLES.keys():
        raise ValueError(f"_ROWS does not describe the tables {', '.join(_ROWS.keys() ^ TABLES.keys())}")
    lines = ["| table | a row for | columns |", "| --- | --- | --- |"]
    for table, what in _ROWS.items():
        names, groups = dict.fromkeys(TABLES[table]), {"the settings": SETTINGS, "the metrics": METRICS}
        for group, members in groups.items():
            if names.keys() >= set(members):
                names = {name: None for name in names if name not in members} | {group: None}
        shown = (name if name in groups else f"`{name}`" for name in names)
        lines.append(f"| `{table}` | {what} | {', '.join(shown)} |")
    return "\n".join(lines)


def run_columns() -> str:
    """A row a column of `load_runs` that is no metric."""
    measured = {*METRICS, *(f"{name}_start" for name in METRICS)}
    lines = ["| column | dtype | meaning |", "| --- | --- | --- |"]
    for name, meaning, dtype in RUN_COLUMNS:
        if name not in measured:
            lines.append(f"| `{name}` | {dtype} | {_cell(meaning)} |")
    return "\n".join(lines)


def metrics() -> str:
    """A row a metric."""
    rows = (f"| `{name}` | {_cell(meaning)} |" for name, meaning in METRICS.items())
    return "\n".join(["| column | meaning |", "| --- | --- |", *rows])


def _cell(meaning: str) -> str:
    """A meaning on one line, without what Markdown would read: JSON becomes code."""
    said = " ".join(meaning.split()).removesuffix(".")
    for mark in "|*<":
        said = said.replace(mark, f"\\{mark}")
    return re.sub(r"\{.*?\}", r"`\g<0>`", said)
