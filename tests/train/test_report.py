"""The report: what the tables hold, what the page is, and stores that lack something."""

import dataclasses
import io
import itertools
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from ncollapse.formatting import change, number, percentage
from ncollapse.optimizer_table import LABELS, OPTIMIZERS
from ncollapse.train.config import RunConfig
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.report.best import best_runs, main_table
from ncollapse.train.report.page import write as write_module
from ncollapse.train.report.page.sections import Section
from ncollapse.train.report.page.write import parts_of, write_report
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.terminal import print_across, print_run
from ncollapse.train.report.view import Column, View
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.schema import FILE

ALL = Selection(threshold=0.0)


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    """A copy of the small grid's results."""
    shutil.copy(swept / FILE, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def reported(swept: Path, tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Path:
    """The small grid's results with their report, read-only."""
    folder = tmp_path_factory.mktemp("reported")
    shutil.copy(swept / FILE, folder)
    write_report(folder, ALL, quiet)
    return folder


def alter(folder: Path, sql: str) -> None:
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute(sql)


def sections(folder: Path, selection: Selection = ALL) -> dict[str, Section]:
    """The sections on the folder's one part, without drawing their figures."""
    (part,) = parts_of(read_results(folder), selection)
    return {section.key: section for section in part.sections()}


class Page(HTMLParser):
    """The cells of the tables, ids, and everything that the page refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = path.read_text("utf-8")
        self._in_cell = False
        self.feed(self.text)

    def table(self, first: str) -> list[list[str]]:
        """The rows of the table whose first title this is, with its titles."""
        start = next(i for i, row in enumerate(self.rows) if row[0] == first)
        width = len(self.rows[start])
        return list(itertools.takewhile(lambda row: len(row) == width, self.rows[start:]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
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


def test_the_page_holds_the_numbers_of_the_store(reported: Path) -> None:
    table = Page(reported / "report.html").table("optimizer")
    assert table[0][:3] == ["optimizer", "NC0", "NC0 predicted"]
    runs = load_runs(reported)
    for row, name in zip(table[1:], ("sgd", "sgdw", "signum", "signumw", "adam", "adamw"), strict=True):
        best = runs[runs.optimizer == name].sort_values("nc0").iloc[0]
        assert row[0].lower() == name
        assert row[1] == number(best.nc0) + change(100 * (best.nc0 / best.nc0_start - 1))
        assert row[4].startswith(number(best.nc2))
        assert row[8] == f"{100 * best.train_accuracy:.2f} %"
        assert f"λ={best.weight_decay:g}" in row[10]
        assert row[11] == "2 settingsall reachedone seed"


def test_the_page_fetches_nothing_and_its_links_lead_somewhere(reported: Path) -> None:
    page = Page(reported / "report.html")
    assert "://" not in page.text
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert link.startswith("data:image/png;base64,") or (reported / link).is_file()
    for used in re.findall(r"url\(#([^)]+)\)", page.text):
        assert used in page.ids


def test_figures_and_tables_are_files_too(reported: Path) -> None:
    names = {path.stem for path in (reported / "figures").iterdir()}
    slug = "mlp-digits"
    drawn = ("nc0", "nc123", "curves", "phase", "heat-lr", "accuracy", "partial", "geometry-1", "geometry-2")
    assert names == {f"{name}-{slug}" for name in (*drawn, "geometry-ends")}
    for name in names:
        assert (reported / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (reported / "figures" / f"{name}.svg").read_text("utf-8").startswith("<?xml")
    table = pd.read_csv(reported / "tables" / f"best-{slug}.csv")
    assert table.pop("note").isna().all()  # empty texts
    expected = main_table(load_runs(reported), ALL).drop(columns="note")
    pd.testing.assert_frame_equal(table, expected, check_dtype=False, rtol=1e-12)
    assert {path.suffix for path in (reported / "tables").iterdir()} == {".csv"}


def test_the_same_results_give_the_same_page(reported: Path, folder: Path, quiet: Console) -> None:
    again = write_report(folder, ALL, quiet).read_text("utf-8").replace(str(folder), str(reported))
    assert again == (reported / "report.html").read_text("utf-8")


def test_prediction_agrees_for_sgd_and_is_missing_for_others(folder: Path) -> None:
    table = main_table(load_runs(folder), ALL).set_index("optimizer")
    for name in ("sgd", "sgdw"):
        assert table.nc0_predicted[name] == pytest.approx(table.nc0[name], rel=1e-3)
    assert table.nc0_predicted[["signum", "signumw", "adam", "adamw"]].isna().all()


def test_best_is_the_smallest_of_the_eligible(folder: Path) -> None:
    runs = load_runs(folder)
    for metric in ("nc0", "nc1", "nc2", "nc3"):
        best = best_runs(runs, Selection(threshold=0.0, best_by=metric))
        assert list(best.optimizer) == ["sgd", "sgdw", "signum", "signumw", "adam", "adamw"]
        for _, row in best.iterrows():
            assert row[metric] == runs[runs.optimizer == row.optimizer][metric].min()


@pytest.mark.parametrize("status", ["diverged", "degenerate", "running", "pending"])
def test_a_run_that_did_not_end_well_is_never_the_best(folder: Path, status: str) -> None:
    best = best_runs(load_runs(folder), ALL).set_index("optimizer").id
    alter(folder, f"UPDATE runs SET status = '{status}' WHERE id = '{best.sgd}'")
    assert best_runs(load_runs(folder), ALL).set_index("optimizer").id.sgd != best.sgd


def test_a_partial_sweep_has_a_report_that_says_so(folder: Path) -> None:
    alter(folder, "DELETE FROM metrics WHERE run IN (SELECT id FROM runs WHERE optimizer != 'adam')")
    alter(folder, "UPDATE runs SET status = 'pending', seconds = NULL WHERE optimizer != 'adam'")
    found = sections(folder)
    assert found["best"].lacks[0] == "10 of 12 runs are not finished yet."
    assert found["accuracy"].lacks[0] == "Fewer than three runs reached 0 % training accuracy."
    assert main_table(load_runs(folder), ALL).note.tolist() == [
        *["no run has ended yet"] * 4,
        "",
        "no run has ended yet",
    ]


def test_nothing_finished_still_makes_a_page(folder: Path, quiet: Console) -> None:
    alter(folder, "DELETE FROM metrics")
    alter(folder, "UPDATE runs SET status = 'pending', seconds = NULL, train_samples = NULL")
    text = write_report(folder, ALL, quiet).read_text("utf-8")
    assert "<b>12</b> pending" in text
    assert "no run has ended yet" in text
    assert "No run has ended yet." in text
    assert not list((folder / "figures").iterdir())


def test_a_store_without_runs_still_makes_a_page(folder: Path, quiet: Console) -> None:
    for table in ("metrics", "runs", "sessions"):
        alter(folder, f"DELETE FROM {table}")
    text = write_report(folder, ALL, quiet).read_text("utf-8")
    assert "The results folder has no runs." in text
    assert "No start of a sweep is recorded" in text


def test_a_single_run_has_a_report(run_sweep: Callable[..., int], tmp_path: Path, quiet: Console) -> None:
    run_sweep(Grid("one", (RunConfig(epochs=1, limit=100),)), tmp_path)
    text = write_report(tmp_path, ALL, quiet).read_text("utf-8")
    assert "No optimizer has finished runs that differ in weight decay, learning rate or momentum." in text
    assert "No 3 finished runs differ only in the coupled share of their weight decay" in text
    assert "differ only in momentum." in text
    drawn = {path.stem.removesuffix("-mlp-digits") for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"nc0", "nc123", "curves", "phase", "partial", "geometry-1"}


def test_where_no_run_reached_the_threshold_it_is_relaxed_visibly(folder: Path) -> None:
    (part,) = parts_of(read_results(folder), Selection(threshold=1.0))
    highest = part.runs.train_accuracy.max()
    assert highest < 1
    assert part.note.startswith(f"Training accuracy missed 100 %: {percentage(highest)}, shown anyway.")
    assert f"those that reached {part.shown.percent} count instead" in part.note
    for (_, shown), row in zip(part.best.frame.iterrows(), part.best.rows(), strict=True):
        runs = part.runs[part.runs.optimizer == shown.optimizer]
        best = runs[runs.id == shown.run].iloc[0]
        assert best.nc0 == runs.nc0[runs.train_accuracy >= runs.train_accuracy.max() - 0.0101].min()
        assert row[10].small == f"missed 100 %: {percentage(best.train_accuracy)}, shown anyway"
        assert row[11].small == "0 reached\none seed"


def test_runs_without_validation_data_have_a_report(folder: Path) -> None:
    alter(folder, "UPDATE metrics SET val_loss = NULL, val_accuracy = NULL")
    accuracy = sections(folder)["accuracy"]
    assert accuracy.lacks[0] == "The runs have no validation accuracy."
    assert not accuracy.drawings


@pytest.mark.parametrize("names", [("nc1", "nc2", "nc3"), ("nc0",)], ids="+".join)
def test_metrics_that_are_nan_everywhere_are_shown_as_missing(folder: Path, names: tuple[str, ...]) -> None:
    alter(folder, f"UPDATE metrics SET {', '.join(f'{name} = NULL' for name in names)}")
    found = sections(folder, Selection(threshold=0.0, best_by="nc1" if names == ("nc0",) else "nc0"))
    (table,) = found["best"].tables
    shown = {column.title.lower(): cell.text for column, cell in zip(table.columns, table.rows()[0], strict=True)}
    assert {name for name in ("nc0", "nc1", "nc2", "nc3", "nc4") if shown[name] == "–"} == set(names)
    assert found["best"].lacks == [f"Undefined (NaN) in all of these runs: {', '.join(n.upper() for n in names)}."]


def test_no_metric_at_all_still_makes_a_page(folder: Path, quiet: Console) -> None:
    alter(folder, "UPDATE metrics SET nc0 = NULL, nc1 = NULL, nc2 = NULL, nc3 = NULL, nc4 = NULL")
    page = Page(write_report(folder, ALL, quiet))
    assert [row[10] for row in page.table("optimizer")[1:7]] == ["NC0 is undefined"] * 6
    assert "Undefined (NaN) in all of these runs: NC0, NC1, NC2, NC3, NC4." in page.text


def test_what_comes_from_outside_is_escaped(reported: Path, folder: Path, quiet: Console) -> None:
    clean = (reported / "report.html").read_text("utf-8").count("<script")
    alter(folder, "UPDATE meta SET value = '<script>alert(1)</script>' WHERE key = 'grid'")
    alter(folder, "UPDATE sessions SET command = 'x <b> & y'")
    alter(folder, "UPDATE metrics SET run = '</script><script>' || char(39) || run")
    alter(folder, "UPDATE runs SET id = '</script><script>' || char(39) || id")
    text = write_report(folder, ALL, quiet).read_text("utf-8")
    assert text.count("<script") == text.count("</script>") == clean
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "x &lt;b&gt; &amp; y" in text
    assert "run \\u003c/script\\u003e" in text


def test_names_from_the_store_do_not_lead_out_of_the_folder(folder: Path) -> None:
    assert [part.slug for part in parts_of(read_results(folder), ALL)] == ["mlp-digits"]
    alter(folder, "UPDATE runs SET model = '../../<x y>'")
    with pytest.raises(UserError, match=r"holds runs with model = '\.\./\.\./<x y>': unknown model"):
        read_results(folder)


def test_several_models_have_a_section_each(run_sweep: Callable[..., int], tmp_path: Path, quiet: Console) -> None:
    run = RunConfig(epochs=1, limit=100)
    run_sweep(Grid("two", (run, dataclasses.replace(run, model="cnn"))), tmp_path)
    text = write_report(tmp_path, ALL, quiet).read_text("utf-8")
    assert re.findall(r'<h2 id="[^"]+">(.*?)</h2>', text) == [
        "Findings",
        "mlp on digits",
        "cnn on digits",
        "What was run",
    ]
    assert json.loads((tmp_path / "findings.json").read_text()).keys() == {"mlp on digits", "cnn on digits"}


def test_the_terminal_shows_all_optimizers_in_80_columns() -> None:
    frame = pd.DataFrame({"optimizer": OPTIMIZERS, "nc0": range(len(OPTIMIZERS))})
    view = View("x", "a caption", (Column.optimizer(), Column.metric("nc0")), frame)
    console = Console(record=True, width=80, file=io.StringIO())
    print_across(console, view, "a title")
    shown = console.export_text()
    assert all(LABELS[name] in shown for name in OPTIMIZERS)
    assert shown.count("a title") == shown.count("a caption") == 1


def test_start_and_end_are_the_first_and_last_evaluation_nan_included(folder: Path) -> None:
    first = load_runs(folder).id[0]
    alter(folder, f"UPDATE metrics SET nc1 = NULL WHERE run = '{first}' AND epoch = 4")
    runs, metrics = load_runs(folder), load_metrics(folder)
    assert pd.isna(runs.nc1[0])
    assert runs.nc1_start[0] == metrics[(metrics.run == first) & (metrics.epoch == 0)].nc1.iloc[0]


def test_one_run_is_shown_with_every_metric(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    run_sweep(Grid("one", (RunConfig(epochs=1, limit=100),)), tmp_path)
    console = Console(record=True, width=100, file=io.StringIO())
    print_run(tmp_path, load_runs(tmp_path).id[0], console)
    text = console.export_text()
    for name in ("nc0", "nc4", "val_accuracy", "nc0 predicted", "done,"):
        assert name in text


def test_thresholds_are_shares() -> None:
    with pytest.raises(UserError, match=r"--threshold must lie in \[0, 1\].*99.9"):
        Selection(threshold=99.9)


def test_a_report_without_plotly_says_what_it_lacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "has_explorer", lambda: False)
    console = Console(record=True, width=200, file=io.StringIO())
    page = write_report(folder, ALL, console)
    assert "explore.html" not in page.read_text("utf-8")
    assert not (folder / "explore.html").exists()
    assert "explore.html is not written: it needs plotly" in console.export_text()
