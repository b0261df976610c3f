"""Folders are merged: the union of their runs, unless a run or the data differ; stacks go on from their checkpoints."""

import dataclasses
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock

from interrupts import interrupt_after
from ncollapse.train.engine import this_machine
from ncollapse.train.errors import DamageError, InterruptError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.merging import Merged, merge_folders
from ncollapse.train.results.ownership import LOCK
from ncollapse.train.results.reader import load_metrics, load_runs, load_sessions
from ncollapse.train.results.schema import FILE


def alter(folder: Path, sql: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        connection.execute(sql)


def part(grid: Grid, start: int, end: int) -> Grid:
    return dataclasses.replace(grid, runs=grid.runs[start:end])


@pytest.fixture(scope="module")
def parts(run_sweep: Callable[..., int], small_grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders that share two runs of the same stack size, with weights; not to be written to."""
    folders = [tmp_path_factory.mktemp(name) for name in "ab"]
    for folder, (start, end) in zip(folders, ((0, 3), (1, 5)), strict=True):
        run_sweep(part(small_grid, start, end), folder, stack=1, save_weights=True)
    return folders


def test_the_union(parts: list[Path], small_grid: Grid, run_sweep: Callable[..., int], tmp_path: Path) -> None:
    assert merge_folders(parts, tmp_path / "all") == Merged(runs=5, finished=5, repeated=2)
    runs, metrics = load_runs(tmp_path / "all"), load_metrics(tmp_path / "all")
    assert runs.id.tolist() == [run.id for run in small_grid.runs[:5]]
    assert runs.session.tolist() == [1, 1, 1, 2, 2]
    assert len(load_sessions(tmp_path / "all")) == 2
    for folder in parts:
        mine = load_metrics(folder)
        assert metrics[metrics.run.isin(mine.run)].reset_index(drop=True).equals(mine)
    assert all(not finding.problem for finding in inspect_folder(tmp_path / "all"))
    assert len(list((tmp_path / "all/weights").iterdir())) == 5
    assert run_sweep(part(small_grid, 0, 6), tmp_path / "all") == 1


def test_a_run_that_differs_is_named(parts: list[Path], small_grid: Grid, tmp_path: Path) -> None:
    other = tmp_path / "b"
    shutil.copytree(parts[1], other)
    run = small_grid.runs[2]
    alter(other, f"UPDATE metrics SET nc1 = nc1 * 2 WHERE run = '{run.id}' AND epoch = 2")
    with pytest.raises(DamageError, match=f"the numbers of run {run.id} are not those that were written"):
        merge_folders([parts[0], other], tmp_path / "all")
    alter(other, "UPDATE runs SET digest = NULL")  # as of an older version
    with pytest.raises(UserError) as error:
        merge_folders([parts[0], other], tmp_path / "all")
    text = str(error.value)
    assert text.startswith(
        f"1 runs are not the same in two folders: {run.describe()} (run {run.id}): nc1 at epoch 2 is "
    )
    assert str(parts[0]) in text
    assert not list(tmp_path.glob("all*"))
    assert merge_folders([parts[0], other], tmp_path / "all", keep_first=True).repeated == 2
    kept, first = load_metrics(tmp_path / "all"), load_metrics(parts[0])
    assert kept[kept.run == run.id].reset_index(drop=True).equals(first[first.run == run.id].reset_index(drop=True))


def test_what_cannot_be_merged_is_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two different results folders"):
        merge_folders([parts[0], parts[0]], tmp_path / "all")
    with pytest.raises(UserError, match="it exists already; give a new folder"):
        merge_folders(parts, parts[0])
    with pytest.raises(UserError, match="no results in"):
        merge_folders([parts[0], tmp_path], tmp_path / "all")
    other = tmp_path / "other"
    shutil.copytree(parts[1], other)
    with FileLock(other / LOCK), pytest.raises(UserError, match="is in use by another process"):
        merge_folders([parts[0], other], tmp_path / "all")
    alter(other, "UPDATE meta SET value = 'else' WHERE key = 'data digits'")
    with pytest.raises(UserError, match="the data set digits is not the one of the other folders"):
        merge_folders([parts[0], other], tmp_path / "all")
    assert not list(tmp_path.glob("all*"))


def test_stacks_in_training_go_on_from_their_checkpoints(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder was stopped after epoch 2 of its second stack; the other has finished one run of its third."""
    interrupt_after(8 + 4, monkeypatch)
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path / "a", stack=4, checkpoint_minutes=0)
    monkeypatch.undo()
    frame = load_runs(tmp_path / "a")
    pending = frame.id[frame.status == "pending"].tolist()
    one = dataclasses.replace(small_grid, runs=tuple(run for run in small_grid.runs if run.id == pending[0]))
    run_sweep(one, tmp_path / "b")
    assert merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "all") == Merged(12, 5, 1)
    assert len(list((tmp_path / "all/checkpoints").iterdir())) == 1
    begun: list[int] = []

    real = this_machine.train_stack

    def watched(runs: object, *args: object) -> object:
        for number, message in enumerate(real(runs, *args)):  # type: ignore[arg-type]
            if number == 0:
                begun.append(message.epoch)  # type: ignore[union-attr]
            yield message

    monkeypatch.setattr(this_machine, "train_stack", watched)
    assert run_sweep(small_grid, tmp_path / "all") == 7
    assert sorted(begun)[-1] == 3  # the first message of the stack that goes on from epoch 2
    runs, whole = load_runs(tmp_path / "all").set_index("id"), load_runs(swept).set_index("id")
    assert runs.nc1.to_dict() == pytest.approx(whole.nc1.to_dict(), rel=1e-5)  # one was trained alone
