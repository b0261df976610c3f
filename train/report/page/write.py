"""`write_report`: tables on the terminal, figures as PNG and SVG, tables as CSV, one page that needs no network."""

import base64
import dataclasses
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from ncollapse.formatting import number, percentage
from ncollapse.plot.looks import PAGE_COLOURS, Look, base_of, look_of, ordered, shown, with_variants
from ncollapse.plot.settings import described
from ncollapse.plot.style import encode
from ncollapse.train.errors import UserError
from ncollapse.train.findings.registry import as_json, findings_view
from ncollapse.train.formatting import duration, plain
from ncollapse.train.report.best import decay_view
from ncollapse.train.report.collapse import SLIDER_SCRIPT
from ncollapse.train.report.explorer.page import write_explorer
from ncollapse.train.report.inventory import runs_view, settings_view
from ncollapse.train.report.page.inline_svg import inline
from ncollapse.train.report.page.sections import Part, Section
from ncollapse.train.report.page.verdicts import Verdicts, in_short, verdicts_of
from ncollapse.train.report.queries import Results, parts_by_title, read_results
from ncollapse.train.report.selection import NC, Selection
from ncollapse.train.report.terminal import print_across, print_down
from ncollapse.train.results.schema import FINISHED

#: Bytes of SVG beyond which the page has the PNG instead: browsers are slow with tens of thousands of shapes.
_HEAVY = 300_000
#: Metrics of the user's in a tooltip, at most.
_MOST_OWN = 4
#: Characters of the name of a model and a data set in the names of files.
_LONGEST_SLUG = 80
#: Length of an SVG file over that of its element on the page, at most: beyond, the element is not made.
_LONG = 8


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure for the page: as `svg`, or as `data`, a PNG in base64; the other one is empty."""

    name: str
    caption: str
    svg: str
    data: str


def write_report(folder: Path, selection: Selection, console: Console, out: Path | None = None) -> Path:
    """Write `figures/`, `tables/`, findings.json, report.html and explore.html, print the tables; return the page.

    Args:
        out: the folder that is written to, made if missing; by default the results folder itself.

    Raises:
        UserError: the folder holds no results, or `out` cannot be written to.
    """
    out, results = folder if out is None else out, read_results(folder)
    results = dataclasses.replace(results, runs=with_variants(results.runs))
    with shown(results.runs.optimizer.unique()):
        return _write_report(results, selection, console, out)


def _write_report(results: Results, selection: Selection, console: Console, out: Path) -> Path:
    parts = parts_of(results, selection)
    verdicts = verdicts_of(results, selection, {part.title: part.slug for part in parts})
    path = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind in ("figures", "tables"):
            if (out / kind).is_symlink():
                raise UserError(f"{out / kind} is a symbolic link: a report is written into its own folder only")
            (out / kind).mkdir(exist_ok=True)
        numbers: dict[str, int] = {}
        drawn = [(part, [(section, draw(out, section, numbers)) for section in part.sections()]) for part in parts]
        _write(path, render(out, results, selection, drawn, numbers, verdicts).encode())
        if has_explorer():
            write_explorer(results, selection, out / "explore.html")
    except OSError as error:
        raise UserError(
            f"cannot write the report to {out.resolve()}: {error}; the results themselves are kept, and --out DIR "
            "writes their report elsewhere"
        ) from None
    # Last, so that nothing which a terminal does can keep the page from being written.
    for part in parts:
        print_across(console, part.best, part.title)
        if part.runs.groupby("optimizer").coupling.nunique().max() > 1:
            print_down(console, decay_view(part.slug, part.runs, part.shown), "NC0 by weight decay and coupling")
        if part.note:
            console.print(plain(part.note), soft_wrap=True)
    for line in in_short(verdicts, results.folder):
        console.print(plain(line), soft_wrap=True)
    if not has_explorer():
        console.print(plain(f"{out / 'explore.html'} is not written: it needs plotly (pip install plotly)."))
    return path


def has_explorer() -> bool:
    """Return whether explore.html can be written: whether plotly, whose script it holds, is there."""
    return importlib.util.find_spec("plotly") is not None


def parts_of(results: Results, selection: Selection) -> list[Part]:
    """Return the runs of each model, data set (with its options and border) and loss."""
    parts: dict[str, Part] = {}
    for title, runs in parts_by_title(results.runs):
        # These names come from the store and become part of paths.
        name = re.sub(r"[^A-Za-z0-9.]+", "-", title.replace(" on ", "-", 1)).strip("-.")
        name = name[:_LONGEST_SLUG].rstrip("-.") or "runs"
        slug = next(one for one in _numbered(name) if one.lower() not in parts)
        parts[slug.lower()] = Part(title, slug, runs, results, selection)
    return list(parts.values())


def _numbered(name: str) -> Iterator[str]:
    """Yield a name, and then the same with numbers at its end: names of the user's may differ in a few letters only."""
    yield name
    yield from (f"{name}-{i}" for i in itertools.count(2))


def draw(folder: Path, section: Section, numbers: dict[str, int]) -> list[Picture]:
    """Write the section's figures and tables; return the figures for the page.

    Args:
        numbers: of the runs whose points are on the page, from 0; those of this section are added.
    """
    for name, frame in (*section.files, *((view.name, view.frame) for view in section.tables)):
        _write_csv(folder, name, frame)
    pictures = []
    for drawing in section.drawings:
        image, vectors = encode(drawing.figure)
        _write(folder / "figures" / f"{drawing.name}.png", image)
        _write(folder / "figures" / f"{drawing.name}.svg", vectors.encode())
        svg = ""
        if len(vectors) < _LONG * _HEAVY:
            known = dict(numbers)
            points = {
                group: [known.setdefault(run, len(known)) for run in runs] for group, runs in drawing.runs.items()
            }
            svg = inline(vectors, drawing.name, drawing.caption, points)
        if 0 < len(svg) <= _HEAVY:
            numbers |= known
            pictures.append(Picture(drawing.name, drawing.caption, svg, ""))
        else:
            pictures.append(Picture(drawing.name, drawing.caption, "", base64.b64encode(image).decode()))
    return pictures


def _write_csv(folder: Path, name: str, frame: pd.DataFrame) -> None:
    _write(folder / "tables" / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n").encode())


def _write(path: Path, content: bytes) -> None:
    if path.is_symlink():  # which would lead out of the folder
        path.unlink()
    path.write_bytes(content)


def render(
    folder: Path, results: Results, selection: Selection,
    drawn: Sequence[tuple[Part, Sequence[tuple[Section, Sequence[Picture]]]]], numbers: Mapping[str, int],
    verdicts: Sequence[Verdicts],
) -> str:  # fmt: skip
    """Return the page; also write the tables of what was run, and the findings, into `folder`.

    Args:
        numbers: of the runs whose points are on the page, as `draw` gives them.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    runs = results.runs
    # An optimizer with several options has several names in the report, but not among the settings.
    settings = runs.assign(optimizer=runs.optimizer.map(base_of))
    inventory = [runs_view(runs, selection), settings_view(settings)]
    for view in (*inventory, *(findings_view(one.slug, one.findings) for one in verdicts)):
        _write_csv(folder, view.name, view.frame)
    _write(folder / "findings.json", as_json([(one.title, one.findings) for one in verdicts]).encode())
    sliders = any(section.fragments for _, sections in drawn for section, _ in sections)
    environment.filters["number"] = number
    return environment.get_template("page.html.j2").render(
        verdicts=verdicts, explorer=has_explorer(), slider_script=SLIDER_SCRIPT if sliders else "",
        name=results.meta.get("grid", results.folder.name), description=results.meta.get("description", ""),
        parts=drawn, inventory=inventory, sessions=results.sessions,
        runs=list(_tooltips(runs, numbers, list(results.metrics))),
        lines=_lines(runs), families=PAGE_COLOURS, threshold=selection.percent,
        total=len(runs), counts=runs.status.value_counts().to_dict(), finished=int(runs.status.isin(FINISHED).sum()),
        reached=len(selection.eligible(runs)), seconds=duration(float(runs.seconds.sum())),
    )  # fmt: skip


def _lines(runs: pd.DataFrame) -> dict[str, tuple[str, Look]]:
    """Return optimizer -> the CSS class of its line beside a table, and its look."""
    # Names of the user's may hold anything.
    return {name: (f"line-{i}", look_of(name)) for i, name in enumerate(ordered(runs.optimizer))}


def _tooltips(runs: pd.DataFrame, numbers: Mapping[str, int], own: Sequence[str]) -> Iterable[str]:
    """Yield the tooltip of each numbered run, in order: its settings on the first line, then its results."""
    if not numbers:
        return
    drawn = runs.assign(settings=described(runs)).set_index("id", drop=False).loc[list(numbers)]
    labels = drawn.optimizer.map(lambda name: look_of(name).label)
    names = [*(name.upper() for name in NC), *own[:_MOST_OWN]]
    columns = [drawn[name] for name in ("train_accuracy", "val_accuracy", *NC, *own[:_MOST_OWN])]
    for label, settings, run, train_acc, val_acc, *values in zip(
        labels, drawn.settings, drawn.id, *columns, strict=True
    ):
        metrics = "  ".join(f"{n} {number(v)}" for n, v in zip(names, values, strict=True))
        train, val = percentage(train_acc), percentage(val_acc)
        yield f"{label}  {settings}\n{metrics}\ntrain {train}, validation {val}; run {run}"
