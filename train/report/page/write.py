"""`write_report`: tables on the terminal, figures as PNG and SVG, tables as CSV, one page that needs no network."""

import base64
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console

from ncollapse.train.errors import UserError
from ncollapse.train.formatting import duration, number, percentage
from ncollapse.train.optimizers import FAMILY_COLOURS, LABELS, TABLE
from ncollapse.train.report.best import decay_view, main_view
from ncollapse.train.report.inventory import runs_view, settings_view
from ncollapse.train.report.page.inline_svg import inline
from ncollapse.train.report.page.sections import Part, Section
from ncollapse.train.report.queries import Results, read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.settings import described
from ncollapse.train.report.style import encode
from ncollapse.train.report.terminal import print_across, print_down
from ncollapse.train.results.schema import FINISHED

#: Bytes of SVG beyond which the page has the PNG instead: browsers are slow with tens of thousands of shapes.
_HEAVY = 300_000
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
    """Print the tables, write `figures/`, `tables/` and `report.html`; return the page's path.

    Args:
        out: the folder that is written to, made if missing; by default the results folder itself.

    Raises:
        UserError: the folder holds no results, or `out` cannot be written to.
    """
    out = folder if out is None else out
    results = read_results(folder)
    parts = parts_of(results, selection)
    for part in parts:
        print_across(console, main_view(part.slug, part.runs, selection), part.title)
        if part.runs.groupby("optimizer").coupling.nunique().max() > 1:
            print_down(console, decay_view(part.slug, part.runs, selection), "NC0 by weight decay and coupling")
    path = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind in ("figures", "tables"):
            if (out / kind).is_symlink():
                raise UserError(f"{out / kind} is a symbolic link: a report is written into its own folder only")
            (out / kind).mkdir(exist_ok=True)
        numbers: dict[str, int] = {}
        drawn = [(part, [(section, draw(out, section, numbers)) for section in part.sections()]) for part in parts]
        _write(path, render(out, results, selection, drawn, numbers).encode())
    except OSError as error:
        raise UserError(
            f"cannot write the report to {out.resolve()}: {error}; the results themselves are kept, and --out DIR "
            "writes their report elsewhere"
        ) from None
    return path


def parts_of(results: Results, selection: Selection) -> list[Part]:
    """Return the runs of each model and data set."""
    parts = []
    for (model, data), runs in results.runs.groupby(["model", "data"], sort=False):
        # These names come from the store and become part of paths.
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{model}-{data}").strip("-.")
        parts.append(Part(f"{model} on {data}", slug, runs, results, selection))
    return parts


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
) -> str:  # fmt: skip
    """Return the page; also write the tables of what was run into `folder`.

    Args:
        numbers: of the runs whose points are on the page, as `draw` gives them.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    runs = results.runs
    inventory = [runs_view(runs, selection), settings_view(runs)]
    for view in inventory:
        _write_csv(folder, view.name, view.frame)
    return environment.get_template("page.html.j2").render(
        name=results.meta.get("grid", results.folder.name), description=results.meta.get("description", ""),
        parts=drawn, inventory=inventory, sessions=results.sessions, runs=list(_tooltips(runs, numbers)),
        optimizers=TABLE, families=FAMILY_COLOURS, threshold=selection.percent,
        total=len(runs), counts=runs.status.value_counts().to_dict(), finished=int(runs.status.isin(FINISHED).sum()),
        reached=len(selection.eligible(runs)), seconds=duration(float(runs.seconds.sum())),
    )  # fmt: skip


def _tooltips(runs: pd.DataFrame, numbers: Mapping[str, int]) -> Iterable[str]:
    """Yield the tooltip of each numbered run, in order: its settings on the first line, then its results."""
    if not numbers:
        return
    shown = runs.assign(settings=described(runs)).set_index("id", drop=False).loc[list(numbers)]
    labels = shown.optimizer.map(lambda name: LABELS.get(name, name))
    results = ["NC0", "NC1", "NC2", "NC3", "train_accuracy", "val_accuracy"]
    columns = [shown[name.lower()].tolist() for name in results]
    for label, settings, run, *values in zip(labels, shown.settings, shown.id, *columns, strict=True):
        metrics = "  ".join(f"{n} {number(v)}" for n, v in zip(results[:4], values[:4], strict=True))
        train, val = map(percentage, values[4:])
        yield f"{label}  {settings}\n{metrics}\ntrain {train}, validation {val}; run {run}"
