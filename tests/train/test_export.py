"""Results as DataFrames and as files: columns and types are the same whatever is missing."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from csv_files import read_csv_exactly
from ncollapse.train import cli, iter_metrics, load_metrics, load_runs
from ncollapse.train.config import FIELDS
from ncollapse.train.errors import DamageError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results import export, frames
from ncollapse.train.results.columns import EPOCH_COLUMNS, METRICS, RUN_COLUMNS, dtypes
from ncollapse.train.results.export import Format, export_results
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store

FORMATS: tuple[Format, ...] = ("parquet", "csv")


@pytest.fixture(params=["finished", "partial", "untrained"])
def folder(request: pytest.FixtureRequest, swept: Path, small_grid: Grid, tmp_path: Path) -> Path:
    """Results that are complete, that lack half of the values, and that have only their grid."""
    if request.param == "untrained":
        with Store(tmp_path, small_grid):
            return tmp_path
    shutil.copy(swept / FILE, tmp_path)
    if request.param == "partial":
        half = "SELECT id FROM runs WHERE position % 2"
        with sqlite3.connect(tmp_path / FILE) as connection:
            connection.execute(f"DELETE FROM metrics WHERE run IN ({half})")
            connection.execute("UPDATE metrics SET nc1 = NULL")
            connection.execute(
                "UPDATE runs SET status = 'pending', stack = NULL, session = NULL, train_samples = NULL, "
                f"seconds = NULL WHERE id IN ({half})"
            )
            connection.execute('UPDATE runs SET "limit" = 100, diverged_epoch = 2 WHERE position = 0')
        connection.close()
    return tmp_path


def test_columns_and_types_are_as_documented(folder: Path) -> None:
    runs, epochs = load_runs(folder), load_metrics(folder)
    assert list(runs) == [column.name for column in RUN_COLUMNS]
    assert list(epochs) == [column.name for column in EPOCH_COLUMNS]
    assert runs.dtypes.astype(str).to_dict() == dtypes(RUN_COLUMNS)
    assert epochs.dtypes.astype(str).to_dict() == dtypes(EPOCH_COLUMNS)
    assert len(runs) == 12


def test_types_are_what_the_columns_hold() -> None:
    types = dtypes(RUN_COLUMNS)
    words = {"id", "status", "model", "data", "optimizer", "loss", "head", "code", "precision", "augment", "layers"}
    words |= {"model_options", "data_options", "optimizer_options", "loss_options"}
    assert {name for name, kind in types.items() if kind == "string"} == words
    may_lack = {"position", "stack", "session", "train_samples", "diverged_epoch", "limit", "width"}
    assert {name for name, kind in types.items() if kind == "Int64"} == may_lack
    whole = {"epochs", "batch_size", "lr_drops", "seed", "eval_every", "pad"}
    assert {name for name, kind in types.items() if kind == "int64"} == whole
    assert {field.name for field in FIELDS} < set(types)
    assert all(types[name] == types[f"{name}_start"] == "float64" for name in METRICS)


@pytest.mark.parametrize("format", FORMATS)
def test_files_hold_what_the_dataframes_hold(folder: Path, format: Format) -> None:
    paths = export_results(folder, format)
    assert [path.relative_to(folder / "export").as_posix() for path in paths] == [
        f"runs.{format}",
        f"epochs.{format}",
        "columns.csv",
    ]
    for path, expected, types in zip(
        paths, (load_runs(folder), load_metrics(folder)), (dtypes(RUN_COLUMNS), dtypes(EPOCH_COLUMNS)), strict=False
    ):
        # A parquet file has the types; reading csv needs them.
        frame = pd.read_parquet(path) if format == "parquet" else read_csv_exactly(path, dtype=types)
        if format == "csv":  # which does not tell an empty text from a missing one
            frame = frame.fillna({name: "" for name, kind in types.items() if kind == "string"})
        pd.testing.assert_frame_equal(frame, expected, check_exact=True)


def test_parquet_types_do_not_depend_on_what_is_missing(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = export_results(folder, "parquet")
    of = {"string": (pa.string(), pa.large_string()), "float64": (pa.float64(),)}
    for path, types in zip(paths, (dtypes(RUN_COLUMNS), dtypes(EPOCH_COLUMNS)), strict=False):
        schema = pq.read_schema(path)
        for name, kind in types.items():
            assert schema.field(name).type in of.get(kind, (pa.int64(),)), name


def test_every_column_has_its_meaning(folder: Path) -> None:
    meanings = pd.read_csv(export_results(folder, "csv")[-1])
    assert list(meanings) == ["table", "column", "meaning"]
    assert meanings.notna().all().all()
    for table, frame in (("runs", load_runs(folder)), ("epochs", load_metrics(folder))):
        assert meanings[meanings.table == table].column.tolist() == list(frame)


def test_another_folder_and_existing_files(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    for _ in range(2):  # the second call replaces the files of the first
        paths = export_results(swept, "csv", out)
        assert sorted(out.iterdir()) == sorted(paths)
    assert not (swept / "export").exists()


def test_the_command_writes_parquet_by_default(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["export", str(swept), "--out", str(tmp_path)])
    names = ["runs.parquet", "epochs.parquet", "columns.csv"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]


def test_parquet_without_pyarrow_is_explained(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'ncollapse\[parquet\]', or give --format csv"):
        export_results(swept, "parquet", tmp_path)
    assert not list(tmp_path.iterdir())
    export_results(swept, "csv", tmp_path)


def test_a_file_that_cannot_be_written_is_named(swept: Path, tmp_path: Path) -> None:
    (tmp_path / "epochs.csv").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*epochs\.csv"):
        export_results(swept, "csv", tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_the_package_loads_pandas_on_first_use() -> None:
    code = (
        "import sys, ncollapse.train; print('pandas' in sys.modules or 'torch' in sys.modules); "
        "from ncollapse.train import load_runs; print(load_runs.__module__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split() == ["False", "ncollapse.train.results.reader", "False"]
    with pytest.raises(ImportError, match="nothing"):
        from ncollapse.train import nothing  # noqa: F401


@pytest.mark.parametrize("format", FORMATS)
def test_large_tables_go_block_by_block(
    swept: Path, tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_metrics(swept)
    before = [path.read_bytes() for path in export_results(swept, "csv", tmp_path / "whole")]
    monkeypatch.setattr(frames, "BLOCK", 5)
    blocks = list(iter_metrics(swept))
    assert [len(block) for block in blocks] == [5] * 7 + [1]
    pd.testing.assert_frame_equal(pd.concat(blocks, ignore_index=True), whole)
    pd.testing.assert_frame_equal(load_metrics(swept), whole)
    paths = export_results(swept, format, tmp_path / "parts")
    if format == "csv":
        assert [path.read_bytes() for path in paths] == before
    else:
        pd.testing.assert_frame_equal(pd.read_parquet(paths[1]), whole)


def test_an_error_in_the_middle_changes_no_file(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Iterator[pd.DataFrame]:
        yield load_metrics(folder)
        raise DamageError("a page")

    paths = export_results(swept, "csv", tmp_path)
    before = [path.read_bytes() for path in paths]
    monkeypatch.setattr(export, "iter_metrics", broken)
    with pytest.raises(DamageError):
        export_results(swept, "csv", tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [path.read_bytes() for path in paths] == before
