"""Metrics of the user's in a results folder: columns beside ncollapse's, which some runs have and others do not."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from csv_files import read_csv_exactly
from ncollapse.train import iter_metrics, load_metrics, load_runs
from ncollapse.train.config import RunConfig
from ncollapse.train.errors import DamageError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.export import Format, export_results
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.merging import merge_folders
from ncollapse.train.results.own_metrics import check_metric_names
from ncollapse.train.results.reader import load_own_metrics
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store
from planted import plant, usual

MARGIN = {"margin": "smallest margin"}
FIRST, SECOND, THIRD = (RunConfig(seed=seed, epochs=2) for seed in range(3))


def alter(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        connection.execute(sql)


def stored(folder: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return connection.execute(sql).fetchall()


def problems(folder: Path) -> list[str]:
    return [f"{found.what}: {found.problem}" for found in inspect_folder(folder) if found.problem]


def test_they_are_columns_beside_those_of_ncollapse(tmp_path: Path) -> None:
    plant(tmp_path, [FIRST], MARGIN, value=lambda run, name, epoch: 10.0 + epoch if name == "margin" else 1.0)
    runs, epochs = load_runs(tmp_path), load_metrics(tmp_path)
    assert runs[["margin_start", "margin"]].to_numpy().tolist() == [[10.0, 12.0]]
    assert epochs.margin.tolist() == [10.0, 12.0]
    assert list(next(iter_metrics(tmp_path))) == list(epochs)
    assert load_own_metrics(tmp_path) == MARGIN


def test_earlier_and_later_runs_lack_them(tmp_path: Path) -> None:
    plant(tmp_path, [FIRST])
    before = stored(tmp_path, "SELECT digest FROM runs")
    plant(tmp_path, [FIRST, SECOND], MARGIN)
    plant(tmp_path, [THIRD])
    assert load_runs(tmp_path).margin.isna().tolist() == [True, False, True]
    assert load_metrics(tmp_path).margin.notna().sum() == 2
    assert stored(tmp_path, f"SELECT digest FROM runs WHERE id = '{FIRST.id}'") == before
    assert problems(tmp_path) == []


def test_a_changed_value_of_theirs_is_found(tmp_path: Path) -> None:
    plant(tmp_path, [FIRST], MARGIN)
    alter(tmp_path, "UPDATE metrics SET margin = 0.5 WHERE epoch = 2")
    assert problems(tmp_path) == [f"run {FIRST.id!r}: its numbers have changed since they were measured"]


@pytest.mark.parametrize(
    "name",
    ["nc0", "NC0", "Epoch", "status", "lr", "nc1_start", "x_START", "x_change", "1x", "a b", "a-b", "", "x" * 61, "é",
     'a"; DROP TABLE runs; --', "settings"],
)  # fmt: skip
def test_names_that_they_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^metric "):
        Store(tmp_path, Grid("one", (FIRST,)), metrics={name: ""})
    assert stored(tmp_path, "SELECT count(*) FROM runs") == [(0,)]


def test_names_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metrics Margin and margin"):
        check_metric_names(["Margin", "margin"])
    with pytest.raises(UserError, match="holds 200 at most"):
        check_metric_names(f"m{i}" for i in range(201))
    plant(tmp_path, [FIRST])
    alter(tmp_path, "ALTER TABLE metrics ADD COLUMN nc5 REAL")
    with pytest.raises(UserError, match="metric nc5: the folder has a column of another ncollapse"):
        plant(tmp_path, [FIRST, SECOND], {"nc5": ""})


def test_columns_that_nobody_has_named_are_ignored(tmp_path: Path) -> None:
    plant(tmp_path, [FIRST])
    alter(tmp_path, "ALTER TABLE metrics ADD COLUMN nc5 REAL")
    assert "nc5" not in load_runs(tmp_path)
    assert "nc5" not in load_metrics(tmp_path)


def test_a_damaged_name_is_one_sentence_and_left_out_of_a_copy(tmp_path: Path) -> None:
    plant(tmp_path / "a", [FIRST], MARGIN)
    alter(tmp_path / "a", "INSERT INTO meta VALUES ('metric nc1', 'x')")
    with pytest.raises(DamageError, match="metric 'nc1': a column of the results has this name"):
        load_runs(tmp_path / "a")
    assert len(problems(tmp_path / "a")) == 1
    salvage_folder(tmp_path / "a", tmp_path / "b")
    pd.testing.assert_series_equal(
        load_runs(tmp_path / "b").margin, pd.Series([usual(FIRST, "margin", 2)]), check_names=False
    )
    assert problems(tmp_path / "b") == []


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_they_are_exported_with_their_meaning(tmp_path: Path, format: Format) -> None:
    plant(tmp_path, [FIRST, SECOND], MARGIN)
    runs, epochs, columns = export_results(tmp_path, format)
    read = pd.read_parquet if format == "parquet" else read_csv_exactly
    assert read(runs).margin.notna().all()
    assert read(epochs).margin.tolist() == load_metrics(tmp_path).margin.tolist()
    meanings = pd.read_csv(columns).set_index(["table", "column"]).meaning
    assert meanings["epochs", "margin"] == "smallest margin"
    assert meanings["runs", "margin_start"] == "smallest margin; before the first step"


def test_merged_folders_have_the_union(tmp_path: Path) -> None:
    plant(tmp_path / "a", [FIRST, SECOND])
    plant(tmp_path / "b", [SECOND, THIRD], MARGIN)
    merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    merged = load_runs(tmp_path / "c").set_index("id").margin
    assert merged.notna().to_dict() == {FIRST.id: False, SECOND.id: True, THIRD.id: True}
    assert problems(tmp_path / "c") == []


def test_folders_in_which_a_name_means_two_things_are_not_merged(tmp_path: Path) -> None:
    plant(tmp_path / "a", [FIRST], MARGIN)
    plant(tmp_path / "b", [SECOND], {"margin": "mean margin"})
    with pytest.raises(UserError, match="metric margin is not the one of the other folders"):
        merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    plant(tmp_path / "d", [FIRST], MARGIN, value=lambda run, name, epoch: usual(run, name, epoch) + (name == "margin"))
    with pytest.raises(UserError, match="margin at epoch 0 is"):
        merge_folders([tmp_path / "a", tmp_path / "d"], tmp_path / "c")
