"""`write_report`: tables on the terminal, figures as PNG and SVG, tables as CSV, one page that needs no network."""

import base64
import dataclasses
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from ncollapse.train.config import DESCRIPTIONS, FIELDS
from ncollapse.train.errors import UserError
from ncollapse.train.optimizers import FAMILY_COLOURS, LABELS, TABLE
from ncollapse.train.report import text
from ncollapse.train.report.figures import style as figures
from ncollapse.train.report.page.inline_svg import inline
from ncollapse.train.report.page.sections import Part, Section
from ncollapse.train.report.read import Results, read
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.settings import described
from ncollapse.train.report.tables import main as tables
from ncollapse.train.report.text import View, print_across, print_down
from ncollapse.train.results.schema import FINISHED

#: Bytes of SVG beyond which the page has the PNG: a browser is slow with tens of thousands of shapes.
_HEAVY = 300_000
#: Values of a setting that are listed.
_LISTED = 12


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure as the page and the folder have it: one of `svg` and `data` (a PNG in base64) is for the page."""

    name: str
    caption: str
    svg: str
    data: str


def write_report(folder: Path, selection: Selection, console: Console) -> Path:
    """Print the tables and write figures, tables and `report.html` into a results folder, finished or not.

    Figures are `figures/NAME.png` and `.svg`, tables `tables/NAME.csv`.

    Returns:
        The page's path.

    Raises:
        UserError: no results there, or the folder cannot be written.
    """
    results = read(folder)
    parts = parts_of(results, selection)
    for part in parts:
        print_across(console, part.main_view(), part.title)
        if part.runs.groupby("optimizer").coupling.nunique().max() > 1:
            print_down(console, part.decay_view(), "NC0 by weight decay and coupling")
    path = folder / "report.html"
    try:
        for kind in ("figures", "tables"):
            (folder / kind).mkdir(exist_ok=True)
        known = {run: i for i, run in enumerate(results.runs.id)}
        drawn = [(part, [(section, draw(folder, section, known)) for section in part.sections()]) for part in parts]
        path.write_text(render(folder, results, selection, drawn), "utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write the report to {folder.resolve()}: {error}; the results themselves are kept"
        ) from None
    return path


def parts_of(results: Results, selection: Selection) -> list[Part]:
    """The runs of each model and data set."""
    return [
        # Names come from the store, and end up in paths.
        Part(title, re.sub(r"[^A-Za-z0-9.]+", "-", title.replace(" on ", "-")).strip("-."), runs, results, selection)
        for title, runs in tables.settings_of(results.runs)
    ]


def draw(folder: Path, section: Section, known: dict[str, int]) -> list[Picture]:
    """Write the section's figures and tables; returns the figures for the page.

    Args:
        known: run -> its number on the page.
    """
    for name, frame in (*section.files, *((view.name, view.frame) for view in section.tables)):
        _write_csv(folder, name, frame)
    pictures = []
    for drawing in section.drawings:
        image, vectors = figures.encode(drawing.figure)
        (folder / "figures" / f"{drawing.name}.png").write_bytes(image)
        (folder / "figures" / f"{drawing.name}.svg").write_text(vectors, "utf-8")
        numbers = {group: [known[run] for run in runs] for group, runs in drawing.runs.items()}
        svg = inline(vectors, drawing.name, drawing.caption, numbers)
        heavy = len(svg) > _HEAVY
        data = base64.b64encode(image).decode() if heavy else ""
        pictures.append(Picture(drawing.name, drawing.caption, "" if heavy else svg, data))
    return pictures


def _write_csv(folder: Path, name: str, frame: pd.DataFrame) -> None:
    (folder / "tables" / f"{name}.csv").write_text(frame.to_csv(index=False, lineterminator="\n"), "utf-8")


def render(
    folder: Path,
    results: Results,
    selection: Selection,
    drawn: Sequence[tuple[Part, Sequence[tuple[Section, Sequence[Picture]]]]],
) -> str:
    """The page; also writes the tables of what was run."""
    import jinja2

    def source(name: str) -> str:
        return (files("ncollapse.train.report.page") / name).read_text("utf-8")

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(source),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = results.runs
    ran = [_counts(runs, selection), _grid(runs)]
    for view in ran:
        _write_csv(folder, view.name, view.frame)
    pointed = any(drawing.runs for _, sections in drawn for section, _ in sections for drawing in section.drawings)
    return environment.get_template("page.html.j2").render(
        name=results.meta.get("grid", folder.name),
        description=results.meta.get("description", ""),
        parts=drawn,
        ran=ran,
        optimizers=TABLE,
        families=FAMILY_COLOURS,
        threshold=f"{100 * selection.threshold:g} %",
        counts=tables.status_counts(runs),
        total=len(runs),
        finished=int(runs.status.isin(FINISHED).sum()),
        reached=len(selection.eligible(runs)),
        seconds=text.duration(float(runs.seconds.sum())),
        sessions=results.sessions,
        runs=list(_hover(runs)) if pointed else [],
    )


def _hover(runs: pd.DataFrame) -> Iterable[str]:
    """What is said of each run under the pointer: its settings on the first line, its results on the next."""
    names = runs.optimizer.map(lambda name: LABELS.get(name, name))
    results = ["NC0", "NC1", "NC2", "NC3", "train_accuracy", "val_accuracy"]
    columns = [runs[name.lower()].tolist() for name in results]
    for name, settings, run, *values in zip(names, described(runs), runs.id, *columns, strict=True):
        metrics = "  ".join(f"{n} {text.number(v)}" for n, v in zip(results[:4], values[:4], strict=True))
        train, val = ("–" if pd.isna(v) else f"{100 * v:.2f} %" for v in values[4:])
        yield f"{name}  {settings}\n{metrics}\ntrain {train}, validation {val}; run {run}"


def _counts(runs: pd.DataFrame, selection: Selection) -> View:
    columns = [text.words(name, lambda row, name=name: row[name]) for name in ("model", "data")]  # type: ignore[misc]
    columns += [text.optimizer(), *(text.count(name) for name in ("runs", *FINISHED, "unfinished"))]
    columns.append(text.count("reached", "reached the threshold"))
    columns.append(text.Column("time", lambda row: text.Cell(text.duration(row.seconds), value=float(row.seconds))))
    caption = (
        f"Diverged: the loss was not finite. Degenerate: features or weights vanished. The threshold is "
        f"{100 * selection.threshold:g} % training accuracy. Time: of training and evaluation, each run's share of its "
        "stack's."
    )
    return View("runs-by-optimizer", caption, columns, tables.what_was_run(runs, selection))


def _grid(runs: pd.DataFrame) -> View:
    rows = [(f.name, _values(runs[f.name]), DESCRIPTIONS[f.name]) for f in FIELDS if f.name in runs]
    frame = pd.DataFrame(rows, columns=["setting", "values", "meaning"])
    names = {"setting": "setting", "values": "values", "what it is": "meaning"}
    columns = [text.words(title, lambda row, name=name: row[name]) for title, name in names.items()]  # type: ignore[misc]
    return View("grid", "Every setting with the values that it took.", columns, frame)


def _values(values: "pd.Series[Any]") -> str:
    there = list(values.dropna().unique())
    if pd.api.types.is_numeric_dtype(values.dtype):
        there.sort()
    written = [f"{v:g}" if isinstance(v, float) else str(v) for v in there] + ["none"] * bool(values.isna().any())
    if len(written) <= _LISTED:
        return ", ".join(written)
    return f"{len(written)} values, {written[0]} … {written[-1]}"
