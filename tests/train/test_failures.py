"""Failures of a sweep, of runs, memory, disks, grids and processes: no finished run is lost."""

import contextlib
import dataclasses
import io
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine import messages, this_machine
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.errors import InterruptError, NoResultsError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store
from ncollapse.train.training import loop
from sweep_results import assert_same

CPU = torch.device("cpu")


def test_diverged_and_vanished_runs_are_recorded_and_stop_nobody(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    good = RunConfig(epochs=3, eval_every=1)
    runs = (good, dataclasses.replace(good, lr=1e20), dataclasses.replace(good, weight_decay=9.0, momentum=0.0))
    run_sweep(Grid("mixed", runs), tmp_path)
    frame = load_runs(tmp_path)
    assert frame.status.tolist() == ["done", "diverged", "degenerate"]
    assert frame.diverged_epoch.tolist()[1] == 1
    assert pd.isna(frame.nc1[1])
    assert pd.isna(frame.nc3[2])
    assert frame.train_accuracy[0] > 0.8


def test_a_stack_that_has_diverged_altogether_stops_early(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    run_sweep(Grid("bad", (RunConfig(epochs=50, eval_every=1, lr=1e20),)), tmp_path)
    assert load_metrics(tmp_path).epoch.max() == 1


def test_other_data_in_the_folder_are_refused(
    run_sweep: Callable[..., int],
    small_grid: Grid,
    tmp_path: Path,
    digits: Dataset,
    quiet: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(this_machine, "train_stack", interrupt)
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path)
    monkeypatch.undo()
    other = dataclasses.replace(digits, fingerprint="0")
    with pytest.raises(UserError, match="digits is not the one that its earlier runs were trained on"):
        sweep(small_grid, tmp_path, lambda name, device: other, CPU, Options(workers=1), quiet)


def test_a_second_process_is_refused(small_grid: Grid, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from ncollapse.train.grid import load_grid
from ncollapse.train.results.writer import Store
Store(Path({str(tmp_path)!r}), load_grid("demo"))
"""
    with Store(tmp_path, small_grid):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process" in other.stderr
    with Store(tmp_path, small_grid) as store:
        assert store.finished() == {}


def test_a_full_disk_keeps_what_is_finished(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's limit on pages stands in for a disk that fills up in the middle of a sweep."""
    real = Store.record

    def fill_up(self: Store, *args: Any) -> dict[str, str]:
        ended = real(self, *args)
        if ended:
            pages = self._db.execute("PRAGMA page_count").fetchone()[0]
            self._db.execute(f"PRAGMA max_page_count = {pages}")
        return ended

    monkeypatch.setattr(Store, "record", fill_up)
    with pytest.raises(UserError, match=r"cannot write to .*: database or disk is full. Every finished run is kept"):
        run_sweep(small_grid, tmp_path, stack=1)
    kept = int((load_runs(tmp_path).status == "done").sum())
    assert kept >= 1
    monkeypatch.setattr(Store, "record", real)
    assert run_sweep(small_grid, tmp_path, stack=1) == 12 - kept


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_said(run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        run_sweep(small_grid, tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_said(run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/out"):
        run_sweep(small_grid, tmp_path / "file" / "out")


def test_a_store_of_another_version_is_left_alone(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path, tmp_path: Path
) -> None:
    shutil.copy(swept / FILE, tmp_path)
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    for act in (lambda: run_sweep(small_grid, tmp_path), lambda: load_runs(tmp_path)):
        with pytest.raises(UserError, match="has format 99"):
            act()


def test_a_store_whose_creation_was_cut_off_holds_nothing_yet(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path, tmp_path: Path
) -> None:
    """A kill in the middle of the first commit leaves pages in the file, and the journal that rolls them back."""
    with contextlib.closing(sqlite3.connect(tmp_path / "first")) as connection:
        connection.execute("PRAGMA cache_size = 1")  # pages go to the file before the commit
        connection.execute("BEGIN")
        connection.execute("CREATE TABLE meta AS SELECT zeroblob(1000000)")
        shutil.copy(tmp_path / "first", tmp_path / FILE)
        shutil.copy(tmp_path / "first-journal", tmp_path / f"{FILE}-journal")
    assert (tmp_path / FILE).stat().st_size > 0
    with pytest.raises(NoResultsError, match=r"no results in .* yet: .* the same command starts it again"):
        load_runs(tmp_path)
    run_sweep(small_grid, tmp_path)
    assert_same(swept, tmp_path)


def test_another_programs_database_is_left_alone(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    for act in (lambda: run_sweep(small_grid, tmp_path), lambda: load_runs(tmp_path)):
        with pytest.raises(UserError, match="has format 0"):
            act()


def test_what_is_no_store_is_said_and_closed(small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoResultsError, match="no results in"):
        load_runs(tmp_path)
    (tmp_path / FILE).write_bytes(
        b"this is not a database, but it is long enough to look like a file of some kind" * 20
    )
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **options: opened.append(connect(*args, **options)) or opened[-1]
    )
    with pytest.raises(UserError, match="file is not a database"):
        load_runs(tmp_path)
    with pytest.raises(UserError, match="file is not a database"):
        Store(tmp_path, small_grid)
    assert len(opened) == 2
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.total_changes  # noqa: B018


def exhausting(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let only `most` runs at once fit into memory; return the list that receives the size of each stack tried."""
    real, tried = loop.Training, []

    def limited(runs: list[RunConfig], *args: Any, **options: Any) -> object:
        tried.append(len(runs))
        if len(runs) > most:
            raise torch.OutOfMemoryError("no room for so many")
        return real(runs, *args, **options)

    monkeypatch.setattr(messages, "Training", limited)
    return tried


def test_a_stack_that_does_not_fit_is_halved_and_said(
    digits: Dataset, swept: Path, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = exhausting(3, monkeypatch)
    console = Console(record=True, width=200, file=io.StringIO())
    assert sweep(small_grid, tmp_path, lambda name, device: digits, CPU, Options(stack=6, workers=1), console) == 12
    assert tried == [6, 3, 3, 3, 3]  # the second stack of six is not even tried
    assert "6 runs at once do not fit (no room for so many); continuing with stacks of 3" in console.export_text()
    assert_same(swept, tmp_path, but="stack")


def test_a_stack_that_is_lost_after_its_last_run_has_ended_is_done(
    run_sweep: Callable[..., int], swept: Path, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = this_machine.train_stack

    def lost_at_the_end(*args: Any) -> Iterator[messages.Message]:
        for message in real(*args):
            yield messages.Failed("lost", "killed") if isinstance(message, messages.Finished) else message

    monkeypatch.setattr(this_machine, "train_stack", lost_at_the_end)
    run_sweep(small_grid, tmp_path, checkpoint_minutes=0)
    assert_same(swept, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_runs_that_do_not_fit_alone_are_named_and_stop_nobody(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.Training

    def no_adam(runs: list[RunConfig], *args: Any, **options: Any) -> object:
        if any(run.family == "adam" for run in runs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return real(runs, *args, **options)

    monkeypatch.setattr(messages, "Training", no_adam)
    with pytest.raises(UserError, match="4 runs could not be trained, since there is no memory for even one of them"):
        run_sweep(small_grid, tmp_path, stack=2)
    frame = load_runs(tmp_path)
    assert set(frame.status[frame.optimizer.str.startswith("adam")]) == {"running"}
    assert set(frame.status[~frame.optimizer.str.startswith("adam")]) == {"done"}
