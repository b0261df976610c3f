"""Reports of more runs, or of more values of a setting, than a figure can show: they are binned, and it is said."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from ncollapse.plot import coupling_lines, heat_cells, momentum_lines, style
from ncollapse.train.config import RunConfig
from ncollapse.train.grid import Grid
from ncollapse.train.report.final_cells import binned, cells
from ncollapse.train.report.page.write import write_report
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.reader import load_runs
from ncollapse.train.results.record import Ended, Evaluation
from ncollapse.train.results.writer import Store

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a random search over learning rate, decay and coupling, with three momenta each."""
    folder = tmp_path_factory.mktemp("searched")
    drawn = [
        {"optimizer": name, "lr": 10 ** RNG.uniform(-4, 0), "weight_decay": 10 ** RNG.uniform(-5, -1)}
        for name in ("sgd", "adam")
        for _ in range(50)
    ]
    runs = [
        RunConfig(**settings, momentum=beta, coupling=share, epochs=1)
        for settings in drawn
        for beta, share in ((0.5, 1.0), (0.7, 1.0), (0.9, 1.0), (0.9, 0.5), (0.9, RNG.uniform()))
    ]
    with Store(folder, Grid("searched", tuple(runs))) as store:
        store.set_plan([runs])
        session = store.begin_session("search", {"versions": {}})
        (stack,) = store.stacks()
        store.begin(stack, session, 1000, resume=False)
        rows = tuple(range(len(runs)))
        for epoch in (0, 1):
            values = {name: np.exp(RNG.normal(size=len(runs))).tolist() for name in METRICS}
            ended = {i: Ended("done", None, 1.0) for i in rows} if epoch else {}
            store.record(stack, Evaluation(epoch, rows, values | {"train_accuracy": [1.0] * len(runs)}, {}, ended, {}))
    return folder


def test_values_that_are_too_many_share_rows(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = load_runs(searched)
    monkeypatch.setattr(heat_cells, "_MOST_VALUES", 10)
    shown, note = binned(runs, "lr")
    assert "up to 5 neighbouring ones share a row or a column" in note
    for _, group in shown.groupby("optimizer"):
        assert group.lr.nunique() == group.weight_decay.nunique() == 10
    # Each value is that of a run, at most its own, and their order stays.
    assert (shown.lr <= runs.lr).all()
    assert shown.lr.isin(runs.lr).all()
    for name in ("sgd", "adam"):
        ordered = shown[shown.optimizer == name].loc[runs[runs.optimizer == name].sort_values("lr").index]
        assert ordered.lr.is_monotonic_increasing
    table = cells(shown, "lr", Selection(threshold=0.0))
    assert table.done.sum() == len(runs)
    assert table.nc1.min() == runs.nc1.min()


def test_few_values_stay_as_they_are(searched: Path) -> None:
    runs = load_runs(searched).assign(lr=0.1, weight_decay=5e-4)
    shown, note = binned(runs, "momentum")
    assert note == ""
    pd.testing.assert_frame_equal(shown, runs)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_points_that_cover_each_other_are_drawn_once(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "_MOST_POINTS", 1_000)
    x, y = np.exp(RNG.normal(size=(2, 4_000)))
    y[0], x[1] = np.inf, 0.0
    with style.styled():
        figure, grid = style.panels(1, 1, (4, 3))
        axes, drawing = grid[0, 0], style.Drawing("x", "", figure)
        axes.set_xscale(scale)
        names = [f"run{i}" for i in range(4_000)]
        halves = [(x[part], y[part], names[part], {"marker": "o"}) for part in (slice(0, 2_000), slice(2_000, 4_000))]
        drawing.points(axes, halves)
    drawn = [run for runs in drawing.runs.values() for run in runs]
    assert len(drawn) == len(set(drawn))
    assert drawing.left_out == 4_000 - (2 if scale == "log" else 1) - len(drawn) > 500
    assert (
        drawing.note
        == f" {drawing.left_out:,} points are not drawn, since one of the same kind is drawn in the same place."
    )
    # Every point has one of its own half within the width of a field.
    place = np.log if scale == "log" else np.asarray
    kept = np.array([int(run.removeprefix("run")) for run in drawing.runs["runs-0"]])
    for i in range(2, 2_000):
        near = np.abs(place(x[kept]) - place(x[i])) <= np.ptp(place(x[2:])) / style._FIELDS * 1.01
        assert (near & (np.abs(y[kept] - y[i]) <= np.ptp(y[1:]) / style._FIELDS * 1.01)).any()


def test_the_page_says_what_is_binned_and_describes_only_the_runs_that_it_shows(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few: list[tuple[Any, str, int]] = [
        (heat_cells, "_MOST_VALUES", 10), (style, "_MOST_POINTS", 100), (style, "_FIELDS", 5),
        (momentum_lines, "_MOST_LINES", 50), (momentum_lines, "_MANY_LINES", 20), (coupling_lines, "_MOST_LINES", 50),
        (coupling_lines, "_MOST_SHARES", 5),
    ]  # fmt: skip
    for module, name, value in few:
        monkeypatch.setattr(module, name, value)
    page = write_report(searched, Selection(), Console(quiet=True), tmp_path).read_text("utf-8")
    assert "neighbouring ones share a row or a column" in page
    assert "points are not drawn" in page
    assert "of 100 groups of runs that differ only in momentum" in page
    assert "of 100 groups of runs that differ only in c" in page
    linked = {int(n) for group in re.findall(r'data-runs="([^"]*)"', page) for n in group.split()}
    texts = json.loads(re.findall(r'id="run-texts">(.*?)</script>', page)[0])
    assert linked == set(range(len(texts)))
    assert 0 < len(texts) < 500
    shown = {text.rsplit("run ", 1)[1] for text in texts}
    assert shown < set(load_runs(searched).id)
    assert len(shown) == len(texts)
