"""Results folders of other versions: read, reported, exported, shown and continued, whatever columns they lack or have.

`fixtures/format-3` was written by the version that introduced format 3, and stopped in the middle: of three stacks of
two runs, the last is at its checkpoint of epoch 5 of 12.
"""

import io
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from ncollapse.train import load_layers, load_metrics, load_runs
from ncollapse.train.commands.status import print_status, read_status
from ncollapse.train.config import FIELDS
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid, load_grid
from ncollapse.train.report.page.write import write_report
from ncollapse.train.report.selection import Selection
from ncollapse.train.results import schema
from ncollapse.train.results.columns import EPOCH_COLUMNS, LAYER_COLUMNS, RUN_COLUMNS, dtypes
from ncollapse.train.results.export import export_results
from ncollapse.train.results.reader import query
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store

# The network is as small as the fixture has to be.
pytestmark = pytest.mark.filterwarnings("ignore:.*10 classes cannot form a simplex")

FIXTURE = Path(__file__).parents[1] / "fixtures" / "format-3"
#: Columns that a version before some change would not have written.
LACKING = (
    "ALTER TABLE runs DROP COLUMN augment",
    "ALTER TABLE runs DROP COLUMN width",
    "ALTER TABLE runs DROP COLUMN lr_drop_factor",
    "ALTER TABLE metrics DROP COLUMN nc3_difference",
    "ALTER TABLE layers DROP COLUMN nc2_equinorm",
    "ALTER TABLE stacks DROP COLUMN begun_epoch",
)
#: Columns that a later version might have added, the setting at its default in all runs.
NEWER = (
    'ALTER TABLE runs ADD COLUMN "smoothing" DEFAULT 0.0',
    "ALTER TABLE runs ADD COLUMN peak_memory INTEGER",
    "UPDATE runs SET peak_memory = 1000 WHERE status = 'done'",
    "ALTER TABLE metrics ADD COLUMN nc5 REAL",
    "UPDATE metrics SET nc5 = 1.5",
)


def alter(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        for sql in statements:
            connection.execute(sql)


def stored(folder: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return connection.execute(sql).fetchall()


def copy_of_fixture(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "old"))


@pytest.fixture(params=["as written", "lacking columns", "with newer columns"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = copy_of_fixture(tmp_path)
    alter(folder, *{"lacking columns": LACKING, "with newer columns": NEWER}.get(request.param, ()))
    # A grid with width 4 is another one than that of the folder without widths.
    if request.param == "lacking columns":
        alter(folder, "ALTER TABLE runs ADD COLUMN width")
        alter(folder, "UPDATE runs SET width = 4")
    return folder


@pytest.fixture(scope="module")
def grid() -> Grid:
    return load_grid(str(FIXTURE / "grid.toml"))


def test_it_is_read_as_if_it_had_all_columns_and_stays_as_it_is(folder: Path) -> None:
    before = (folder / FILE).read_bytes()
    runs, epochs, layers = load_runs(folder), load_metrics(folder), load_layers(folder)
    for frame, columns in ((runs, RUN_COLUMNS), (epochs, EPOCH_COLUMNS), (layers, LAYER_COLUMNS)):
        assert frame.dtypes.astype(str).to_dict() == dtypes(columns)
    assert list(runs.status) == ["running", "done", "running", "done", "done", "done"]
    assert set(runs.augment) == {"none"}
    assert set(runs.lr_drop_factor) == {0.1}
    assert set(runs.width) == {4}
    finished = epochs[epochs.run.isin(runs.id[runs.status == "done"])]
    assert list(finished.epoch) == [0, 4, 8, 12] * 4
    measured = "nc3_difference" in {row[1] for row in stored(folder, "PRAGMA table_info(metrics)")}
    assert epochs.nc3_difference.notna().all() == measured
    assert epochs[["nc0", "nc2", "nc3", "train_loss"]].notna().all(axis=None)
    assert set(layers.run) == set(runs.id)
    assert (folder / FILE).read_bytes() == before
    assert [path.name for path in folder.glob("runs.sqlite*")] == [FILE]


def test_a_missing_column_is_at_its_default_in_queries_too(tmp_path: Path) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, *LACKING)
    counted = query(folder, "SELECT count(*) AS n FROM runs WHERE runs.augment = 'none' AND width IS NULL")
    assert counted.n[0] == 6
    assert query(folder, "SELECT DISTINCT nc3_difference FROM metrics").nc3_difference.tolist() == [None]


def test_it_is_reported_exported_and_shown(folder: Path, quiet: Console) -> None:
    page = write_report(folder, Selection(threshold=0), quiet)
    assert "format-3" in page.read_text()
    names = {path.name for path in export_results(folder, "csv")}
    assert names == {"runs.csv", "epochs.csv", "layers.csv", "columns.csv"}
    assert len(pd.read_csv(folder / "export" / "runs.csv")) == 6
    console = Console(record=True, width=80, file=io.StringIO())
    print_status(read_status(folder), console)
    shown = console.export_text()
    assert "4 of 6 runs finished: 4 done, 2 pending" in shown
    assert "stacks of up to 2 runs" in shown


def test_it_is_continued_from_its_checkpoint(folder: Path, run_sweep: Callable[..., int], grid: Grid) -> None:
    stopped, before = load_runs(folder), load_metrics(folder)
    assert run_sweep(grid, folder) == 2
    runs, after = load_runs(folder), load_metrics(folder)
    assert set(runs.status) == {"done"}
    assert list(after.epoch) == [0, 4, 8, 12] * 6
    assert stored(folder, "SELECT begun_epoch, epoch FROM stacks WHERE id = 3") == [(5, 12)]
    kept = after.merge(before[["run", "epoch"]])
    pd.testing.assert_frame_equal(kept, before, check_exact=True)
    added = after[after.run.isin(stopped.id[stopped.status == "running"]) & (after.epoch > 4)]
    assert len(added) == 4
    assert added[["nc0", "nc3", "nc3_difference", "train_loss"]].notna().all(axis=None)
    assert run_sweep(grid, folder) == 0


def test_a_plan_with_other_fields_is_read(tmp_path: Path, run_sweep: Callable[..., int], grid: Grid) -> None:
    """A field that is not there has its default, one that is not known is ignored."""
    folder = copy_of_fixture(tmp_path)
    plan = json.loads(str(stored(folder, "SELECT value FROM meta WHERE key = 'engine'")[0][0]))
    del plan["per_gpu"], plan["measured"]
    plan["racks"] = 2
    for stack in plan["stacks"]:
        del stack["precision"], stack["steps_per_second"]
        stack["smoothing"] = 0.0
    alter(folder, f"UPDATE meta SET value = '{json.dumps(plan)}' WHERE key = 'engine'")
    console = Console(record=True, width=80, file=io.StringIO())
    print_status(read_status(folder), console)
    assert "stacks of up to 2 runs" in console.export_text()
    assert run_sweep(grid, folder) == 2


def test_a_newer_setting_that_is_not_at_its_default_is_refused(tmp_path: Path, grid: Grid) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, *NEWER, "UPDATE runs SET smoothing = 0.1 WHERE position = 2")
    assert len(load_runs(folder)) == 6
    with pytest.raises(UserError, match=r"made by a newer ncollapse, .*: smoothing = 0\.1\. Use the version"):
        Store(folder, grid)


def test_a_newer_setting_without_a_default_counts_as_missing_where_it_is_null(tmp_path: Path, grid: Grid) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, 'ALTER TABLE runs ADD COLUMN "it""s"')
    with Store(folder, grid):
        pass
    alter(folder, 'UPDATE runs SET "it""s" = \'new\'')
    with pytest.raises(UserError, match='it"s = new'):
        Store(folder, grid)


def test_newer_columns_are_kept(tmp_path: Path, run_sweep: Callable[..., int], grid: Grid) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, *NEWER)
    before = len(load_metrics(folder))
    run_sweep(grid, folder)
    assert stored(folder, "SELECT count(nc5) FROM metrics WHERE nc5 = 1.5") == [(before,)]
    assert stored(folder, "SELECT DISTINCT smoothing FROM runs") == [(0.0,)]


def test_an_added_setting_and_metric(tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of_fixture(tmp_path)
    monkeypatch.setitem(schema.TABLES["runs"], "smoothing", "DEFAULT 0.0")
    monkeypatch.setitem(schema.TABLES["metrics"], "nc5", "REAL")
    seen = [query(folder, f"SELECT DISTINCT {name} AS v FROM {table}").v.tolist() for name, table in
            (("smoothing", "runs"), ("nc5", "metrics"))]  # fmt: skip
    assert seen == [[0.0], [None]]
    with Store(folder, grid):
        pass
    assert stored(folder, 'SELECT DISTINCT "runs"."smoothing" FROM runs') == [(0.0,)]
    assert stored(folder, 'SELECT DISTINCT "metrics"."nc5" FROM metrics') == [(None,)]


def test_a_reader_that_is_at_work_while_a_sweep_adds_columns(tmp_path: Path, grid: Grid) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, "ALTER TABLE runs DROP COLUMN augment")
    with closing(schema.connect(folder, create=False)) as reader:
        schema.show_missing_columns(reader)
        before = reader.execute("SELECT * FROM runs")
        names, rows = [column[0] for column in before.description], before.fetchall()
        with Store(folder, grid):
            pass
        after = reader.execute("SELECT * FROM runs")
        assert [column[0] for column in after.description] == names
        assert after.fetchall() == rows


def test_runs_of_other_settings_leave_an_older_folder_as_it_is(tmp_path: Path, grid: Grid) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, *LACKING)
    with pytest.raises(UserError, match="the settings of run a06464e087d9 are not those of its id"):
        Store(folder, grid)
    assert "augment" not in {row[1] for row in stored(folder, "PRAGMA table_info(runs)")}


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, *LACKING)
    real = sqlite3.connect

    def read_only(name: str, **options: Any) -> sqlite3.Connection:
        return real(name.replace("mode=rw", "mode=ro"), **options)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    assert set(load_runs(folder).augment) == {"none"}
    assert load_metrics(folder).nc3_difference.isna().all()
    assert read_status(folder).finished == 4


@pytest.mark.parametrize("version", [2, 4])
def test_another_format_is_refused(tmp_path: Path, grid: Grid, version: int) -> None:
    folder = copy_of_fixture(tmp_path)
    alter(folder, f"PRAGMA user_version = {version}")
    with pytest.raises(UserError, match=f"has format {version}, this ncollapse reads 3; use the version that wrote it"):
        load_runs(folder)
    with pytest.raises(UserError, match=f"has format {version}"):
        Store(folder, grid)


def test_the_default_of_a_column_is_that_of_its_setting() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        schema.create_tables(connection)
        connection.execute("INSERT INTO runs (id, position, status) VALUES ('a', 0, 'pending')")
        (row,) = connection.execute(f"SELECT {schema.quoted(schema.SETTINGS, 'runs')} FROM runs").fetchall()
    assert row == tuple(field.default for field in FIELDS)
