"""`write_explorer`: `explore.html`, on which all runs can be brushed, compared and sorted; it needs no network."""

import dataclasses
import functools
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.formatting import options_text, read_json
from ncollapse.plot.looks import PAGE_COLOURS, look_of, ordered, shown, with_variants
from ncollapse.plot.settings import SYMBOLS, varying
from ncollapse.train.report.explorer.packing import (
    Pack,
    add_ends,
    add_words,
    compressed,
    evenly,
    packed_curves,
)
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.schema import FINISHED

#: Bytes of a page, and the runs and the numbers of their ends that it holds, at most.
_LARGEST, _MOST_RUNS, _MOST_ENDS = 8_000_000, 100_000, 1_200_000
#: Bytes of the page that a number of a curve takes, about.
_PER_NUMBER = 2.6
#: Of the metrics, those that stand first; the last ones are left out where there are too many runs.
_FIRST = (*NC, "nc4", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
#: The scripts, in the order of the page; each names what it uses of those before it.
_SCRIPTS = ("decode", "state", "parallel", "charts", "table", "start")


def write_explorer(results: Results, selection: Selection, path: Path) -> None:
    """Write the page to `path`; its folder exists. Of a large folder, the page says what is left out.

    Raises:
        UserError: the results cannot be read.
        OSError: the page cannot be written.
    """
    runs = with_variants(results.runs)
    measured = runs[runs.status.isin(FINISHED) | runs[list(METRICS)].notna().any(axis=1)]
    notes = []
    if waiting := len(runs) - len(measured):
        notes.append(f"{waiting:,} of {len(runs):,} runs have no evaluation yet and are not shown.")
    most = min(_MOST_RUNS, len(measured))
    while True:
        kept = dataclasses.replace(results, runs=measured.iloc[evenly(len(measured), most)].reset_index(drop=True))
        with shown(kept.runs.optimizer.unique()):
            page = _page(kept, selection, notes, len(measured))
        if page or most <= 1:
            break
        most //= 2
    if path.is_symlink():  # which would lead out of the folder
        path.unlink()
    path.write_bytes(page)


def _page(results: Results, selection: Selection, notes: list[str], measured: int) -> bytes:
    """Return the page; empty if it is too large without any curve."""
    import jinja2
    from markupsafe import Markup

    runs, notes = results.runs, list(notes)
    if len(runs) < measured:
        notes.append(f"{len(runs):,} of {measured:,} runs are shown, evenly spaced in the order of the grid.")
    pack = Pack()
    names = [name for name in _metrics(results) if runs[name].notna().any()]
    metrics = names[: max(len(_FIRST), _MOST_ENDS // max(len(runs), 1))]
    if len(metrics) < len(names):
        notes.append(f"The page has {len(metrics)} of {len(names)} metrics: there are many runs.")
    pack.header |= {
        "ids": list(runs.id), "threshold": selection.threshold, "columns": list(_columns(pack, results, metrics)),
        "looks": [_look(name) for name in ordered(runs.optimizer)],
    }  # fmt: skip
    add_ends(pack, runs, metrics)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader([here, here.parent / "page"]),
    )  # fmt: skip
    content: dict[str, Any] = {
        "name": results.meta.get("grid", results.folder.name), "description": results.meta.get("description", ""),
        "total": len(runs), "families": PAGE_COLOURS, "lines": {}, "threshold": selection.percent,
        "scripts": [Markup((here / f"{name}.js").read_text("utf-8")) for name in _SCRIPTS],
        "data": pack.text(), "plotly": _plotly(),
    }  # fmt: skip
    template = environment.get_template("explore.html.j2")
    room = _LARGEST - 1_000 - len(template.render(content, notes=notes, curves="").encode())
    if room < 0:
        return b""
    most = int(room / _PER_NUMBER)
    while len(curves := (pack := packed_curves(results, metrics, most)).text()) > room:
        most = most * 3 // 4
    notes += _left_out(pack.header, len(metrics))
    return template.render(content, notes=notes, curves=curves).encode()


@functools.cache
def _plotly() -> str:
    """Return Plotly's script, compressed. Its Python, which takes long to import, is not needed."""
    return compressed(importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes())


def _left_out(curves: dict[str, Any], metrics: int) -> Iterator[str]:
    """Yield sentences on what the curves leave out, by the header of `packed_curves`."""
    if curves["runs"] < curves["of"]:
        yield f"{curves['runs']:,} of {curves['of']:,} runs have curves on this page."
    if curves["runs"] and curves["epochs"]:
        yield f"Curves have at most {curves['epochs']} evaluations of a run, evenly spaced; the results have all."
    if curves["runs"] and len(curves["metrics"]) < metrics:
        yield f"{len(curves['metrics'])} of {metrics} metrics have curves."


def _metrics(results: Results) -> list[str]:
    """Return all metrics, in the order in which they matter."""
    own = list(results.metrics)
    return [*_FIRST, *own, *(name for name in METRICS if name not in (*_FIRST, *own, "degenerate"))]


def _columns(pack: Pack, results: Results, metrics: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what describes each column of the page, and pack the settings and the status."""
    runs = results.runs
    place = {name: i for i, name in enumerate(ordered(runs.optimizer))}
    pack.add("words optimizer", runs.optimizer.map(place).to_numpy(dtype=np.uint16))
    labels = [look_of(name).label for name in place]
    yield {"name": "optimizer", "label": "optimizer", "role": "setting", "words": labels, "keys": list(place)}
    hidden = {"optimizer", "code"}
    if runs.groupby("optimizer").optimizer_options.nunique().max() == 1:  # then the optimizer's name has them
        hidden.add("optimizer_options")
    for name in varying(runs):
        if name in hidden:
            continue
        column = {"name": name, "label": f"{name} {SYMBOLS.get(name, '')}".replace("_", " ").strip(), "role": "setting"}
        if pd.api.types.is_numeric_dtype(runs[name]):
            values = runs[name].to_numpy(dtype=float, na_value=np.nan)
            pack.add(f"end {name}", values if pd.api.types.is_integer_dtype(runs[name]) else values.astype(np.float32))
            yield column
        else:
            texts = add_words(pack, name, runs[name])
            written = [options_text(read_json(t) or {}) for t in texts] if name.endswith("_options") else texts
            yield column | {"words": written, "keys": texts}
    texts = add_words(pack, "status", runs.status)
    yield {"name": "status", "label": "status", "role": "status", "words": texts, "keys": texts}
    for name in metrics:
        own = name in results.metrics
        label = name if own else name.replace("nc", "NC", 1).replace("_", " ")
        about = results.metrics[name] if own else METRICS[name]
        yield {"name": name, "label": label, "role": "metric", "about": about, "own": own}


def _look(name: str) -> dict[str, str]:
    """Return an optimizer's CSS variable, the name of its points, and its kind of line in Plotly's words."""
    look = look_of(name)
    if look.foreign:
        return {"family": look.family, "mark": "triangle-up", "dash": "dashdot"}
    mark, dash = ("diamond", "dash") if look.dashed else ("circle", "solid")
    return {"family": look.family, "mark": mark, "dash": dash}
