"""What the report reads of a store, and its tables that compare runs, on known values."""

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ncollapse.plot.settings import alike, described, varying
from ncollapse.train.report.coupling import interpolations
from ncollapse.train.report.final_cells import cells
from ncollapse.train.report.inventory import what_was_run
from ncollapse.train.report.momentum import at_equal_loss, momentum_steps
from ncollapse.train.report.queries import Results, read_results
from ncollapse.train.report.scatter import partial_collapse, rank_correlations
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.schema import FILE, create_tables
from run_frames import runs_of

HALF = Selection(threshold=0.5)


class Epochs(Results):
    """Results with given training losses of the evaluated epochs; other metrics are the epoch."""

    def __init__(self, runs: pd.DataFrame, tmp_path: Path, losses: dict[str, list[float]]) -> None:
        with sqlite3.connect(tmp_path / FILE) as db:
            create_tables(db)
            for run, run_losses in losses.items():
                for epoch, loss in enumerate(run_losses):
                    values = [loss if name == "train_loss" else float(epoch) for name in METRICS]
                    db.execute(
                        f"INSERT INTO metrics VALUES ({', '.join('?' * (2 + len(values)))})", [run, epoch, *values]
                    )
        super().__init__(tmp_path, runs, {}, [])


@pytest.fixture
def results(swept: Path, tmp_path: Path) -> Results:
    shutil.copy(swept / FILE, tmp_path)
    return read_results(tmp_path)


def test_runs_are_those_of_load_runs(results: Results) -> None:
    pd.testing.assert_frame_equal(results.runs, load_runs(results.folder))
    with sqlite3.connect(results.folder / FILE) as db:
        db.execute("DELETE FROM metrics WHERE run IN (SELECT id FROM runs WHERE position < 3)")
        db.execute("UPDATE metrics SET nc1 = NULL WHERE epoch = 4")
    pd.testing.assert_frame_equal(read_results(results.folder).runs, load_runs(results.folder))


def test_histories_are_those_of_load_metrics(results: Results) -> None:
    every = load_metrics(results.folder)
    some = sorted(results.runs.id[:3])
    expected = every[every.run.isin(some)].reset_index(drop=True)
    pd.testing.assert_frame_equal(results.histories(some), expected)
    assert results.histories([]).empty
    assert results.histories(["'); DROP TABLE metrics; --"]).empty


def test_the_first_epoch_at_a_loss(results: Results) -> None:
    every = load_metrics(results.folder)
    lowest = results.lowest_loss(results.runs.id)
    assert lowest.to_dict() == every.groupby("run").train_loss.min().to_dict()
    losses = {run: 1.5 * loss for run, loss in lowest.items()}
    found = results.first_at(losses).set_index("run")
    for run, loss in losses.items():
        expected = every[(every.run == run) & (every.train_loss <= loss)].iloc[0]
        assert found.epoch[run] == expected.epoch
        assert found.nc1[run] == expected.nc1
    assert results.first_at(dict.fromkeys(losses, -1.0)).empty
    assert results.first_at({}).empty


def test_settings_that_vary_and_groups_of_equal_runs() -> None:
    runs = runs_of({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1, "limit": 5}, {"lr": 0.2, "limit": 5})
    assert set(varying(runs)) == {"lr", "limit"}
    assert list(alike(runs, ignore=("lr",))) == [0, 0, 1, 1]
    assert list(alike(runs, ignore=("lr", "limit"))) == [0, 0, 0, 0]
    assert list(described(runs)) == [
        "lr=0.1 β=0.9 λ=0.0005 limit=none",
        "lr=0.2 β=0.9 λ=0.0005 limit=none",
        "lr=0.1 β=0.9 λ=0.0005 limit=5",
        "lr=0.2 β=0.9 λ=0.0005 limit=5",
    ]
    assert list(described(runs[:2], ignore=("lr",))) == ["β=0.9 λ=0.0005"] * 2


def test_a_coupling_is_named_if_it_is_not_the_default() -> None:
    runs = runs_of({"optimizer": "adam"}, {"optimizer": "adamw"}, {"optimizer": "adam", "coupling": 0.25})
    assert [" c=" in text for text in described(runs)] == [False, False, True]
    assert described(runs)[2].endswith("c=0.25")


def test_interpolations_group_by_update_rule_not_by_name() -> None:
    shares = [
        {"optimizer": "adamw"},
        {"optimizer": "adam", "coupling": 0.5, "train_accuracy": 0.1},
        {"optimizer": "adam"},
    ]
    other = [{"optimizer": "sgd"}, {"optimizer": "sgdw"}, {"optimizer": "adam", "lr": 0.5}]
    found = interpolations(runs_of(*shares, *other), HALF)
    assert list(found.coupling) == [0.0, 0.5, 1.0]
    assert list(found.id) == ["run0", "run1", "run2"]
    assert set(found.optimizer) == {"adam"}
    assert list(found.reached) == [True, False, True]
    assert interpolations(runs_of(*shares[:1], *shares[2:], *other), HALF).empty


@pytest.mark.parametrize("status", ["diverged", "degenerate", "running"])
def test_interpolations_are_of_runs_that_ended_well(status: str) -> None:
    runs = runs_of(*({"optimizer": "adam", "coupling": c} for c in (0.0, 0.5, 1.0)))
    runs.loc[1, "status"] = status
    assert interpolations(runs, HALF).empty


def test_runs_are_read_at_the_lowest_loss_that_their_group_reaches(tmp_path: Path) -> None:
    runs = runs_of({"momentum": 0.7}, {"momentum": 0.9}, {"momentum": 0.9, "lr": 0.5}, {"momentum": 0.0})
    runs.loc[3, "train_accuracy"] = 0.1  # missed the threshold, so that its loss does not count
    losses = {"run0": [2.0, 1.0, 0.5, 0.6], "run1": [2.0, 0.4, 0.1, 0.7], "run2": [0.0], "run3": [3.0]}
    found = at_equal_loss(runs, Epochs(runs, tmp_path, losses), HALF)
    assert list(found.run) == ["run0", "run1"]
    assert list(found.momentum) == [0.7, 0.9]
    assert list(found.loss) == [0.5, 0.5]
    assert list(found.epoch) == [2, 1]
    assert list(found.train_loss) == [0.5, 0.4]
    assert list(found.nc3) == [2.0, 1.0]
    assert list(found.settings) == ["lr=0.1 λ=0.0005", "lr=0.1 λ=0.0005"]
    steps = momentum_steps(found)
    assert steps[["optimizer", "lower", "higher", "pairs"]].to_numpy().tolist() == [["sgd", 0.7, 0.9, 1]]
    assert steps.nc0.tolist() == [0.5]


def test_steps_of_momentum_stay_within_a_group(tmp_path: Path) -> None:
    runs = runs_of(*({"momentum": m, "lr": lr} for lr in (0.1, 0.2) for m in (0.5, 0.7, 0.9)))
    losses = {f"run{i}": [1.0] * i + [0.5] for i in range(6)}
    steps = momentum_steps(at_equal_loss(runs, Epochs(runs, tmp_path, losses), HALF))
    assert list(zip(steps.lower, steps.higher, steps.pairs, strict=True)) == [(0.5, 0.7, 2), (0.7, 0.9, 2)]
    assert steps.nc1[1] == pytest.approx(np.median([2 / 1, 5 / 4]))


def test_no_runs_that_differ_in_momentum(tmp_path: Path) -> None:
    runs = runs_of({"lr": 0.1}, {"lr": 0.2})
    found = at_equal_loss(runs, Epochs(runs, tmp_path, {}), HALF)
    assert found.empty
    assert {"nc0", "train_loss", "loss"} <= set(found.columns)
    assert momentum_steps(found).empty


def test_rank_correlations() -> None:
    values = [0.1, 10.0, 3.0, 0.5]
    rows = [{"nc0": v, "nc1": 1 / v, "val_accuracy": -1 / v, "lr": 1.0 + i} for i, v in enumerate(values)]
    frame = rank_correlations(runs_of(*rows, {"nc0": 99.0, "val_accuracy": -9.0, "train_accuracy": 0.0}), HALF)
    table = frame.set_index(["optimizer", "metric"]).correlation
    assert table["all", "nc0"] == pytest.approx(1)
    assert table["sgd", "nc1"] == pytest.approx(-1)
    assert np.isnan(table["all", "nc2"])  # nc2 is the same in all runs
    assert set(frame.runs) == {4}


def test_partial_collapse() -> None:
    whole = {"nc0": 0.1, "nc1": 0.1, "nc2": 0.1, "nc3": 0.1}
    part = {"nc0": 5.0, "nc1": 0.05, "nc2": 0.05, "nc3": 0.9}
    bad = {"nc0": 5.0, "nc1": 0.9, "nc2": 0.9, "nc3": 0.9}
    rows = [{**whole, "optimizer": "sgd"}, {**part, "optimizer": "adamw"}]
    rows += [{**bad, "optimizer": "sgd", "lr": lr} for lr in (0.2, 0.3)]
    missed = {"nc1": 0.0, "optimizer": "sgd", "train_accuracy": 0.0}
    table = partial_collapse(runs_of(*rows, missed), HALF).set_index("optimizer")
    assert table.good.to_dict() == {"sgd": 1, "adamw": 1}
    assert table.partial.to_dict() == {"sgd": 0, "adamw": 1}
    assert table.run.to_dict() == {"sgd": "run0", "adamw": "run1"}
    assert table.nc0_over_start.to_dict() == {"sgd": 0.1, "adamw": 5.0}


def test_cells_hold_the_smallest_of_the_runs_that_reached_the_threshold() -> None:
    runs = runs_of(
        {"momentum": 0.1, "nc0": 3.0},
        {"momentum": 0.2, "nc0": 2.0},
        {"momentum": 0.3, "nc0": 1.0, "train_accuracy": 0.1},
        {"weight_decay": 0.0, "nc0": 7.0, "train_accuracy": 0.1},
        {"weight_decay": 1.0, "nc0": 9.0, "status": "diverged"},
        {"weight_decay": 2.0, "status": "pending"},
    )
    table = cells(runs, "lr", HALF).set_index("weight_decay")
    assert sorted(table.index) == [0.0, 0.0005, 1.0]
    assert table.nc0[0.0005] == 2.0
    assert table.nc0[0.0] == 7.0
    assert np.isnan(table.nc0[1.0])
    assert table[["done", "reached", "missed"]].loc[0.0005].tolist() == [3, 2, 1]
    assert table[["done", "reached", "missed"]].loc[1.0].tolist() == [0, 0, 1]


def test_runs_are_counted_by_how_they_ended() -> None:
    states = ["done", "done", "diverged", "degenerate", "running", "pending"]
    rows = [{"status": s, "seed": i, "train_accuracy": float(i == 0)} for i, s in enumerate(states)]
    table = what_was_run(runs_of(*rows, {"optimizer": "adam", "seconds": 5.0}), HALF).set_index("optimizer")
    assert table.index.tolist() == ["sgd", "adam"]
    columns = ["runs", "done", "diverged", "degenerate", "unfinished", "reached"]
    assert table.loc["sgd", columns].tolist() == [6, 2, 1, 1, 2, 1]
    assert table.seconds["adam"] == 5.0
