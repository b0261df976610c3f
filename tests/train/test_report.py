"""The report: what the tables hold, what the page is, and stores that lack something."""

import dataclasses
import io
import math
import re
import shutil
import sqlite3
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from nc.train.config import RunConfig
from nc.train.errors import UserError
from nc.train.grid import Grid
from nc.train.report import tables
from nc.train.report.page import change, number, write_report
from nc.train.report.run import print_run
from nc.train.report.selection import Selection
from nc.train.results import load_metrics, load_runs
from nc.train.schema import FILE

ALL = Selection(threshold=0.0)


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    """A copy of the small grid's results."""
    shutil.copy(swept / FILE, tmp_path)
    return tmp_path


def alter(folder: Path, sql: str) -> None:
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute(sql)


class Page(HTMLParser):
    """The cells of the tables, and everything that the page would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self._in_cell = False
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_the_page_holds_the_numbers_of_the_store_and_fetches_nothing(folder: Path, quiet: Console) -> None:
    path = write_report(folder, ALL, quiet)
    page = Page(path)
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in path.read_text("utf-8")
    assert page.rows[0][:3] == ["optimizer", "NC0", "NC0 predicted"]
    runs = load_runs(folder)
    for row, name in zip(page.rows[1:7], ("sgd", "sgdw", "signum", "signumw", "adam", "adamw"), strict=True):
        best = runs[runs.optimizer == name].sort_values("nc0").iloc[0]
        assert row[0].lower() == name
        assert row[1] == number(best.nc0) + change(100 * (best.nc0 / best.nc0_start - 1))
        assert row[4].startswith(number(best.nc2))
        assert row[7] == f"{100 * best.train_accuracy:.2f} %"
        assert f"λ={best.weight_decay:g}" in row[9]
        assert row[10] == "2 of 2"
    for png in ("nc0-mlp-digits.png", "decay-mlp-digits.png"):
        assert (folder / png).read_bytes().startswith(b"\x89PNG")


def test_prediction_agrees_for_sgd_and_is_not_made_up_for_others(folder: Path) -> None:
    table = tables.main_table(load_runs(folder), ALL).set_index("optimizer")
    for name in ("sgd", "sgdw"):
        assert table.nc0_predicted[name] == pytest.approx(table.nc0[name], rel=1e-3)
    assert table.nc0_predicted[["signum", "signumw", "adam", "adamw"]].isna().all()


def test_best_is_the_smallest_of_the_eligible(folder: Path) -> None:
    runs = load_runs(folder)
    for metric in ("nc0", "nc1", "nc2", "nc3"):
        best = tables.best_runs(runs, Selection(threshold=0.0, best_by=metric))
        assert list(best.optimizer) == ["sgd", "sgdw", "signum", "signumw", "adam", "adamw"]
        for _, row in best.iterrows():
            assert row[metric] == runs[runs.optimizer == row.optimizer][metric].min()
    table = tables.main_table(runs, Selection(threshold=1.0))
    assert len(table) == 6
    assert table.nc0.isna().all()
    assert (table.eligible == 0).all()


@pytest.mark.parametrize("status", ["diverged", "degenerate", "running", "pending"])
def test_a_run_that_did_not_end_well_is_never_the_best(folder: Path, status: str) -> None:
    best = tables.best_runs(load_runs(folder), ALL).set_index("optimizer").id
    alter(folder, f"UPDATE runs SET status = '{status}' WHERE id = '{best.sgd}'")
    assert tables.best_runs(load_runs(folder), ALL).set_index("optimizer").id.sgd != best.sgd


def test_a_partial_sweep_has_a_report_that_says_so(folder: Path, quiet: Console) -> None:
    alter(folder, "DELETE FROM metrics WHERE run IN (SELECT id FROM runs WHERE optimizer != 'adam')")
    alter(folder, "UPDATE runs SET status = 'pending', seconds = NULL WHERE optimizer != 'adam'")
    text = write_report(folder, ALL, quiet).read_text("utf-8")
    assert "10 of 12 runs are not finished yet" in text


def test_nothing_finished_still_makes_a_page(folder: Path, quiet: Console) -> None:
    alter(folder, "DELETE FROM metrics")
    alter(folder, "UPDATE runs SET status = 'pending', seconds = NULL, train_samples = NULL")
    text = write_report(folder, ALL, quiet).read_text("utf-8")
    assert "12 pending" in text
    assert "no run reached the threshold" in text


def test_a_metric_that_is_nan_everywhere_is_shown_as_missing(folder: Path, quiet: Console) -> None:
    alter(folder, "UPDATE metrics SET nc1 = NULL, nc2 = NULL, nc3 = NULL")
    page = Page(write_report(folder, ALL, quiet))
    assert page.rows[1][3] == "–"


def test_what_comes_from_outside_is_escaped(folder: Path, quiet: Console) -> None:
    alter(folder, "UPDATE meta SET value = '<script>alert(1)</script>' WHERE key = 'grid'")
    alter(folder, "UPDATE sessions SET command = 'x <b> & y'")
    text = write_report(folder, ALL, quiet).read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "x &lt;b&gt; &amp; y" in text


def test_several_models_have_a_section_each(run_sweep: Callable[..., int], tmp_path: Path, quiet: Console) -> None:
    run = RunConfig(epochs=1, limit=100)
    run_sweep(Grid("two", (run, dataclasses.replace(run, model="cnn"))), tmp_path)
    text = write_report(tmp_path, ALL, quiet).read_text("utf-8")
    assert re.findall(r"<h2>(.* on .*)</h2>", text) == ["mlp on digits", "cnn on digits"]


def test_start_and_end_are_the_first_and_last_evaluation_nan_included(folder: Path) -> None:
    first = load_runs(folder).id[0]
    alter(folder, f"UPDATE metrics SET nc1 = NULL WHERE run = '{first}' AND epoch = 4")
    runs, metrics = load_runs(folder), load_metrics(folder)
    assert pd.isna(runs.nc1[0])
    assert runs.nc1_start[0] == metrics[(metrics.run == first) & (metrics.epoch == 0)].nc1.iloc[0]


def test_one_run_is_shown_with_every_metric(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    run_sweep(Grid("one", (RunConfig(epochs=1, limit=100),)), tmp_path)
    console = Console(record=True, width=100, file=io.StringIO())
    print_run(tmp_path, console)
    text = console.export_text()
    for name in ("nc0", "nc4", "val_accuracy", "nc0 predicted", "done,"):
        assert name in text


def test_thresholds_are_shares() -> None:
    with pytest.raises(UserError, match=r"--threshold must lie in \[0, 1\].*99.9"):
        Selection(threshold=99.9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.23456, "1.23"), (12345.6, "1.23e+04"), (3.8e-4, "3.80e-04"), (math.nan, "–")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("percent", "text"),
    [(-68.91, "-68.9 %"), (-99.99, "<-99.9 %"), (-100.0, "<-99.9 %"), (94.53, "+94.5 %"), (1713.2, "+1713 %")],
)
def test_changes(percent: float, text: str) -> None:
    assert change(percent) == text
    assert change(math.nan) == ""
