"""The report's figures: palette, scales, which runs are drawn where, and the figures as elements of the page."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
import pytest
from rich.console import Console

from ncollapse.optimizer_table import FAMILY_COLOURS, LABELS, OPTIMIZERS, TABLE
from ncollapse.plot.looks import PAGE_COLOURS, look_of
from ncollapse.plot.style import (
    Drawing,
    encode,
    line,
    marker,
    panels,
    scale,
    spans_decades,
    styled,
)
from ncollapse.train import load_layers
from ncollapse.train.config import RunConfig
from ncollapse.train.grid import Grid
from ncollapse.train.report.best import best_runs
from ncollapse.train.report.epochs import nc0_over_epochs
from ncollapse.train.report.final_cells import cells, heat_maps
from ncollapse.train.report.page.inline_svg import inline
from ncollapse.train.report.page.write import parts_of, write_report
from ncollapse.train.report.prediction import predicted_nc0
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.scatter import accuracy_against_collapse
from ncollapse.train.report.selection import NC, Selection

ALL = Selection(threshold=0.0)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes() -> list[dict[str, str]]:
    """The page's colours by name, light and dark."""
    source = (files("ncollapse.train.report.page") / "style.css.j2").read_text("utf-8")
    css = jinja2.Template(source).render(lines={}, families=PAGE_COLOURS)
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S))
    return [light, light | dark]


def test_every_optimizer_has_the_colour_of_its_family_and_a_name() -> None:
    assert set(OPTIMIZERS) <= set(LABELS)
    assert len(set(FAMILY_COLOURS.values())) == len(FAMILY_COLOURS)
    for name in OPTIMIZERS:
        assert look_of(name).colour == FAMILY_COLOURS[TABLE[name].family][0]
    assert line("adam", 1.0)["linestyle"] == line("adam", 0.1)["linestyle"] == "-"
    assert line("adamw", 0.0)["linestyle"] != "-"
    assert marker("sgd", 1.0, reached=True)["marker"] != marker("sgd", 0.0, reached=True)["marker"]
    assert marker("sgd", 1.0, reached=False)["mfc"] != marker("sgd", 1.0, reached=True)["mfc"]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_pages_colours_contrast_with_its_background(theme: int) -> None:
    colours = themes()[theme]
    assert contrast(colours["ink"], colours["ground"]) >= 7
    assert contrast(colours["quiet"], colours["card"]) >= 4.5
    assert contrast(colours["accent"], colours["ground"]) >= 4.5
    assert contrast(colours["ink"], colours["note"]) >= 7
    for family in PAGE_COLOURS:
        assert contrast(colours[family], colours["card"]) >= (3 if theme else 2.1)


def test_the_pages_light_colours_are_the_figures() -> None:
    assert {name: themes()[0][name] for name in PAGE_COLOURS} == {
        name: light for name, (light, _) in PAGE_COLOURS.items()
    }


def test_a_colour_needs_no_matplotlib() -> None:
    code = "from ncollapse.plot.style import line; import sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([0.1, 0.9], False),
        ([0.1, 1.1], True),
        ([0.0, 1e-9, 1.0], True),
        ([-1e-9, 1e-9, 1.0], False),  # it would not be drawn
        ([1e-9, 1.0, np.nan], True),
        ([-1.0, 0.0, 1.0], False),
        ([np.nan], False),
        ([], False),
    ],
)
def test_axes_are_logarithmic_where_values_span_decades(values: list[float], logarithmic: bool) -> None:
    assert spans_decades(values) is logarithmic
    with styled():
        _, grid = panels(1, 1, (4, 3))
        scale(grid[0, 0], "y", values)
    assert (grid[0, 0].get_yscale() == "log") is logarithmic
    assert grid[0, 0].get_xscale() == "linear"


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    with styled():
        figure, grid = panels(1, 1, (4, 3))
        drawing = Drawing("x", "", figure)
        grid[0, 0].set_yscale("log")
        look = {"marker": "o"}
        groups = [([1.0, 2.0, np.nan, 4.0], [1.0, 0.0, 3.0, 4.0], "abcd", look), ([np.nan], [1.0], "e", look)]
        drawing.points(grid[0, 0], groups)
    assert drawing.runs == {"runs-0": ["a", "d"]}
    assert drawing.note == ""


def test_points_on_the_page_are_linked_to_their_runs(swept: Path) -> None:
    runs = read_results(swept).runs
    drawing = accuracy_against_collapse("x", runs, ALL, ["nc1"])
    assert not spans_decades(runs.nc1)  # the axis is linear: positions are an affine function of the values
    number = {run: i for i, run in enumerate(runs.id)}
    points = {group: [number[run] for run in members] for group, members in drawing.runs.items()}
    svg = inline(encode(drawing.figure)[1], "x", "", points)
    positions: dict[int, float] = {}
    for numbers, uses in re.findall(r'<g data-runs="([^"]+)">(?:<defs>.*?</defs>)?(.*?)</g>', svg):
        xs = [float(x) for x in re.findall(r'<use [^>]*x="([^"]+)"', uses)]
        positions |= dict(zip(map(int, numbers.split()), xs, strict=True))
    assert sorted(positions) == list(range(len(runs)))
    values = runs.nc1.to_numpy()
    slope, offset = np.polyfit(values, [positions[i] for i in range(len(runs))], 1)
    assert slope > 0
    np.testing.assert_allclose(slope * values + offset, [positions[i] for i in range(len(runs))], atol=0.02)


def test_a_figure_on_the_page_is_shorter_and_has_the_pages_colours(swept: Path) -> None:
    results = read_results(swept)
    best = best_runs(results.runs, ALL)
    drawing = nc0_over_epochs("x", best, results.histories(best.id))
    svg = encode(drawing.figure)[1]
    element = inline(svg, "nc0-x", 'a "caption" <here>', {})
    assert len(element) < 0.7 * len(svg)
    assert 'aria-label="a &quot;caption&quot; &lt;here&gt;"' in element
    used = set(re.findall(r"var\(--(\w+)\)", element))
    assert {"ink", "grid", "sgd", "signum", "adam"} <= used
    for theme in themes():
        assert used <= set(theme)
    for colour in (*(light for light, _ in PAGE_COLOURS.values()), "#1b1b1b", "DejaVu"):
        assert colour not in element
    assert re.findall(r"<text[^>]*>([^<]+)</text>", element) == re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', element))
    assert references == set(re.findall(r' id="([^"]+)"', element))
    assert all(name.startswith("nc0-x-") for name in references)


def test_lines_are_drawn_through_the_stores_values_and_circles_through_the_prediction(swept: Path) -> None:
    results = read_results(swept)
    best = best_runs(results.runs, ALL)
    axes = nc0_over_epochs("x", best, results.histories(best.id)).figure.axes[0]
    drawn = [np.asarray(artist.get_xydata()) for artist in axes.lines if len(artist.get_xydata())]
    for (_, run), xy in zip(best.iterrows(), drawn, strict=False):
        history = results.histories([run["id"]])
        np.testing.assert_array_equal(xy, history[["epoch", "nc0"]].to_numpy())
    circles = drawn[len(best) :]
    assert len(circles) == 2  # SGD and SGDW
    for (_, run), xy in zip(best.iterrows(), circles, strict=False):
        prediction = predicted_nc0(run)
        assert prediction is not None
        np.testing.assert_array_equal(xy[:, 1], prediction[xy[:, 0].astype(int)])


def test_a_heat_map_has_the_colours_of_its_cells(swept: Path) -> None:
    table = cells(read_results(swept).runs, "lr", ALL)
    figure = heat_maps("x", table, "lr", "0 %").figure
    assert [axes.get_title(loc="left") for axes in figure.axes[4:]] == ["NC0", "NC1", "NC2", "NC3"]
    for axes, metric in zip(figure.axes[:4], NC, strict=True):
        shown = np.concatenate([mesh.get_array().ravel() for mesh in axes.collections])
        np.testing.assert_array_equal(np.sort(shown), np.sort(table[metric]))
        assert {mesh.norm.vmax for mesh in axes.collections} == {table[metric].max()}
        assert len(axes.texts) >= len(table)


def test_cells_whose_runs_missed_the_threshold_are_hatched(swept: Path) -> None:
    runs = read_results(swept).runs
    half = Selection(threshold=float(runs.train_accuracy.median()))
    table = cells(runs, "lr", half)
    missed = int((table.reached == 0).sum())
    assert 0 < missed < len(table)
    axes = heat_maps("x", table, "lr", "50 %").figure.axes[0]
    hatched = [part for part in axes.collections if part.get_hatch()]
    assert sum(part.get_array().count() for part in hatched) == missed


def test_blocks_are_shown_if_they_were_measured(tmp_path: Path, run_sweep: Callable[..., int]) -> None:
    grid = Grid(
        "deep",
        tuple(
            RunConfig(model="cnn", optimizer=name, layers="all", epochs=2, limit=150, eval_every=1, lr=0.01)
            for name in ("sgd", "adamw")
        ),
    )
    run_sweep(grid, tmp_path, workers=1)
    results = read_results(tmp_path)
    part = parts_of(results, ALL)[0]
    *_, section = part.sections()
    assert section.title == "Collapse through the layers"
    (drawing,) = section.drawings
    (view,) = section.tables
    layers = load_layers(tmp_path)
    last = layers[layers.epoch == 2].set_index(["run", "position"])
    heads = results.runs.set_index("id")
    assert len(view.frame) == 2 * 3
    for row in view.frame.itertuples():
        source = heads.loc[row.run] if row.layer == "head" else last.loc[(row.run, row.position)]
        assert (row.nc1, row.nc2) == (source.nc1, source.nc2)
        assert row.optimizer == heads.optimizer[row.run]
    shown = [y for axes in drawing.figure.axes for y in (line.get_ydata() for line in axes.lines) if len(y)]
    assert sorted(map(len, shown)) == [3] * 4
    assert sorted(np.concatenate(shown[:2])) == sorted(view.frame.nc1)
    page = write_report(tmp_path, ALL, Console(quiet=True)).read_text("utf-8")
    assert "layers-cnn-digits" in page
    assert (tmp_path / "tables" / "layers-cnn-digits.csv").is_file()


def test_no_section_on_blocks_if_they_were_not_measured(swept: Path) -> None:
    titles = [section.title for section in parts_of(read_results(swept), ALL)[0].sections()]
    assert "Collapse through the layers" not in titles
