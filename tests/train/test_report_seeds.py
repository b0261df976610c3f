"""Runs that differ only in the seed are one row of the table; an optimizer that missed the threshold is shown."""

import io
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from ncollapse.formatting import percentage
from ncollapse.train.report.best import best_runs, best_settings, main_table, main_view
from ncollapse.train.report.selection import Selection
from ncollapse.train.report.terminal import print_across, print_down
from ncollapse.train.report.view import Cell, Column, View
from run_frames import runs_of

USUAL = Selection()


def seeds(nc0: list[float], **settings: Any) -> list[dict[str, Any]]:
    """A setting with so many seeds; their NC3 is 10 × their NC0."""
    return [{**settings, "seed": i, "nc0": value, "nc3": 10 * value} for i, value in enumerate(nc0)]


def test_the_best_setting_has_the_smallest_median() -> None:
    lucky, steady = seeds([0.01, 5.0, 6.0], lr=0.1), seeds([0.3, 0.4, 0.2], lr=0.2)
    runs = runs_of(*lucky, *steady)
    assert best_settings(runs, USUAL).id.tolist() == ["run3", "run4", "run5"]
    assert best_runs(runs, USUAL).id.tolist() == ["run3"]
    row = main_table(runs, USUAL).iloc[0]
    assert (row.nc0, row.nc0_low, row.nc0_high) == (0.3, 0.2, 0.4)
    assert row.nc0_change == pytest.approx(-70)
    assert (row.seeds, row.seeds_finished, row.settings_reached, row.settings_tried) == (3, 3, 2, 2)
    assert (row.eligible, row.runs, row.run, row.note) == (6, 6, "run3", "")
    assert row.settings == "lr=0.2 β=0.9 λ=0.0005"


def test_one_seed_has_no_range() -> None:
    row = main_table(runs_of({"nc0": 0.5}, {"nc0": 0.7, "lr": 0.3}), USUAL).iloc[0]
    assert (row.nc0, row.run, row.seeds) == (0.5, "run0", 1)
    assert pd.isna(row.nc0_low)
    assert pd.isna(row.val_accuracy_high)


def test_a_setting_counts_where_more_than_half_of_its_seeds_reached_the_threshold() -> None:
    half, most = seeds([0.1, 0.1], lr=0.1), seeds([0.5, 0.6, 0.1], lr=0.2)
    half[1]["train_accuracy"] = most[2]["train_accuracy"] = 0.5
    row = main_table(runs_of(*half, *most), USUAL).iloc[0]
    assert (row.nc0, row.seeds, row.seeds_finished) == (0.55, 2, 3)
    assert (row.settings_reached, row.settings_tried, row.eligible, row.runs) == (1, 2, 3, 5)
    most[2] |= {"status": "diverged", "train_accuracy": 1.0}
    assert main_table(runs_of(*half, *most), USUAL).nc0.tolist() == [0.55]


def test_an_optimizer_that_missed_the_threshold_is_shown_and_not_compared() -> None:
    far = {"optimizer": "adam", "train_accuracy": 0.5, "nc0": 0.0, "lr": 0.3}
    near = [
        {"optimizer": "adam", "train_accuracy": a, "nc0": n, "lr": lr}
        for a, n, lr in ((0.97, 0.3, 0.1), (0.965, 0.1, 0.2))
    ]
    good = [{"optimizer": name, "nc0": value} for name, value in (("sgd", 0.5), ("sgdw", 0.7))]
    frame = main_table(runs_of(far, *near, *good), USUAL).set_index("optimizer")
    assert frame.nc0.to_dict() == {"sgd": 0.5, "sgdw": 0.7, "adam": 0.1}
    assert frame.note.to_dict() == {"sgd": "", "sgdw": "", "adam": "missed 99.9 %: 96.50 %, shown anyway"}
    assert frame.compared.to_dict() == {"sgd": True, "sgdw": True, "adam": False}
    view = main_view("x", runs_of(far, *near, *good), USUAL)
    assert [row[1].best for row in view.rows()] == [True, False, False]
    assert "not compared with those that reached it" in view.caption
    console = Console(record=True, width=100, file=io.StringIO())
    print_across(console, view, "table")
    shown = " ".join(console.export_text().split())
    assert "missed 99.9 %:" in shown
    assert "0 reached" in shown


def test_nothing_ended_well() -> None:
    runs = runs_of(*seeds([1.0, 1.0], status="diverged"), {"optimizer": "adam", "status": "pending"})
    assert main_table(runs, USUAL).note.tolist() == ["no run ended well", "no run has ended yet"]
    assert best_runs(runs, USUAL).empty
    one = runs_of(*seeds([1.0, 1.0], status="diverged"), {"seed": 2})
    assert main_table(one, USUAL).note.tolist() == ["most seeds of every setting did not end well"]
    assert USUAL.relaxed(runs) == (USUAL, "")


@pytest.mark.parametrize(("accuracy", "text"), [(0.974, "97.40 %"), (0.99896, "99.89 %"), (0.98375, "98.38 %")])
def test_a_missed_threshold_never_looks_reached(accuracy: float, text: str) -> None:
    relaxed, note = USUAL.relaxed(runs_of({"train_accuracy": accuracy}, {"train_accuracy": 0.2, "seed": 1}))
    assert note == f"missed 99.9 %: {text}, shown anyway"
    assert accuracy - 0.0101 < relaxed.threshold <= accuracy - 0.01
    assert percentage(relaxed.threshold) == relaxed.percent.replace(" %", "").ljust(5, "0") + " %"


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [
        ([1.0, 1.1, 1.2], [1.3, 1.4, 1.5], [True, False]),
        ([1.0, 1.1, 1.35], [1.3, 1.4, 1.5], [False, False]),
        ([1.0, 1.1, 1.2], [1.15, 1.15, 1.15], [False, False]),
        ([1.0], [1.0001], [True, False]),
        ([1.0], [1.0], [True, True]),
        ([1.0, 1.2], [1.1, 1.1], [False, False]),
    ],
)
def test_no_bold_for_a_difference_within_the_spread(first: list[float], second: list[float], best: list[bool]) -> None:
    runs = runs_of(*seeds(first, optimizer="sgd"), *seeds(second, optimizer="adam"))
    view = main_view("x", runs, USUAL)
    assert [row[1].best for row in view.rows()] == best
    assert ("One seed" in view.caption) == (len(first) == 1)


def test_the_terminal_and_the_page_show_the_range() -> None:
    view = main_view("x", runs_of(*seeds([0.3, 0.4, 0.2])), USUAL)
    assert view.rows()[0][1].small == "-70.0 %\n0.2 – 0.4"
    assert view.rows()[0][11] == Cell("1 setting", "all reached\n3 seeds", 1.0)
    for show in (print_across, print_down):
        console = Console(record=True, width=200, file=io.StringIO())
        show(console, view, "table")
        shown = console.export_text()
        assert all(text in shown for text in ("0.2 – 0.4", "-70.0 %", "3 seeds", "one setting"))


def test_a_column_that_is_not_marked_has_no_best() -> None:
    frame = pd.DataFrame({"optimizer": ["sgd", "adam"], "nc0": [1.0, 2.0]})
    for best in (True, False):
        view = View("x", "", (Column.optimizer(), Column.metric("nc0", best=best)), frame)
        assert [row[1].best for row in view.rows()] == [best, False]
