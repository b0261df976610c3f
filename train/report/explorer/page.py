"""`write_explorer`: `explore.html`, on which all runs can be brushed, compared and sorted; it needs no network."""

import dataclasses
import importlib.resources
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ncollapse.formatting import options_text, read_json
from ncollapse.plot.looks import PAGE_COLOURS, look_of, ordered, shown, with_variants
from ncollapse.plot.settings import SYMBOLS, varying
from ncollapse.train.report.explorer.packing import Pack, add_curves, add_ends, add_words, compressed, evenly
from ncollapse.train.report.queries import Results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.schema import FINISHED

#: Bytes of a page, and the runs and the numbers of their ends and of their curves that it holds, at most.
_LARGEST = 8_000_000
_MOST_RUNS, _MOST_ENDS, _MOST_NUMBERS = 100_000, 1_200_000, 1_700_000
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
    kept = measured.iloc[evenly(len(measured), _MOST_RUNS)].reset_index(drop=True)
    results = dataclasses.replace(results, runs=kept)
    notes = []
    if waiting := len(runs) - len(measured):
        notes.append(f"{waiting:,} of {len(runs):,} runs have no evaluation yet and are not shown.")
    if len(kept) < len(measured):
        notes.append(f"{len(kept):,} of {len(measured):,} runs are shown, evenly spaced in the order of the grid.")
    with shown(kept.optimizer.unique()):
        most = _MOST_NUMBERS
        while True:
            content = _page(results, selection, notes, most).encode()
            if len(content) <= _LARGEST or not most:
                break
            most = most // 2 if most > 1_000 else 0
    if path.is_symlink():  # which would lead out of the folder
        path.unlink()
    path.write_bytes(content)


def _page(results: Results, selection: Selection, notes: list[str], most: int) -> str:
    """Return the page with at most `most` numbers of curves."""
    import jinja2
    from markupsafe import Markup

    pack, more = _packed(results, selection, most)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader([here, here.parent / "page"]),
    )  # fmt: skip
    plotly = importlib.resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return environment.get_template("explore.html.j2").render(
        name=results.meta.get("grid", results.folder.name), description=results.meta.get("description", ""),
        total=len(results.runs), notes=[*notes, *more], families=PAGE_COLOURS, lines={}, threshold=selection.percent,
        scripts=[Markup((here / f"{name}.js").read_text("utf-8")) for name in _SCRIPTS],
        data=pack.text(), plotly=compressed(plotly),
    )  # fmt: skip


def _packed(results: Results, selection: Selection, most: int) -> tuple[Pack, list[str]]:
    """Return what the page shows, and sentences on what is left out."""
    runs, pack, notes = results.runs, Pack(), []
    names = [name for name in _metrics(results) if runs[name].notna().any()]
    metrics = names[: max(len(_FIRST), _MOST_ENDS // max(len(runs), 1))]
    if len(metrics) < len(names):
        notes.append(f"The page has {len(metrics)} of {len(names)} metrics: there are many runs.")
    pack.header |= {
        "ids": list(runs.id), "threshold": selection.threshold, "columns": list(_columns(pack, results, metrics)),
        "looks": [_look(name) for name in ordered(runs.optimizer)],
    }  # fmt: skip
    add_ends(pack, runs, metrics)
    add_curves(pack, results, metrics, most)
    curves = pack.header["curves"]
    if curves["runs"] < curves["of"]:
        notes.append(f"{curves['runs']:,} of {curves['of']:,} runs have curves on this page.")
    if curves["runs"] and curves["epochs"]:
        notes.append(f"Curves have at most {curves['epochs']} evaluations of a run, evenly spaced; more are stored.")
    if curves["runs"] and len(curves["metrics"]) < len(metrics):
        notes.append(f"{len(curves['metrics'])} of {len(metrics)} metrics have curves.")
    return pack, notes


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
        label = name if name in results.metrics else name.replace("nc", "NC", 1).replace("_", " ")
        yield {"name": name, "label": label, "role": "metric", "about": {**METRICS, **results.metrics}[name]}


def _look(name: str) -> dict[str, str]:
    """Return an optimizer's CSS variable, the name of its points, and its kind of line in Plotly's words."""
    look = look_of(name)
    if look.foreign:
        return {"family": look.family, "mark": "triangle-up", "dash": "dashdot"}
    mark, dash = ("diamond", "dash") if look.dashed else ("circle", "solid")
    return {"family": look.family, "mark": mark, "dash": dash}
