"""The engine and the store: planning, resuming, refusing, and losing nothing."""

import dataclasses
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console

from nc.train import loop
from nc.train.columns import METRICS
from nc.train.config import OPTIMIZERS, RunConfig
from nc.train.data import Dataset
from nc.train.engine import processes, work
from nc.train.engine.options import Options
from nc.train.engine.plan import Shape, plan
from nc.train.engine.progress import rate
from nc.train.engine.sweep import sweep
from nc.train.errors import InterruptError, UserError
from nc.train.grid import Grid, load_grid
from nc.train.results import load_meta, load_metrics, load_runs, load_sessions
from nc.train.schema import FILE
from nc.train.store import Store
from sweep_results import assert_same

CPU = torch.device("cpu")


def test_plan_groups_what_can_train_together() -> None:
    runs = [
        RunConfig(optimizer=optimizer, model=model, weight_decay=decay / 100)
        for model in ("mlp", "cnn")
        for optimizer in OPTIMIZERS
        for decay in range(9)
    ]
    stacks = plan(runs, lambda shape: 24 if shape.model == "mlp" else 7)
    assert sorted(run.id for members in stacks for run in members) == sorted(run.id for run in runs)
    for members in stacks:
        assert len({Shape.of(run) for run in members}) == 1
        assert len(members) <= (24 if members[0].model == "mlp" else 7)
        assert {run.optimizer for run in members} == set(OPTIMIZERS)
    assert {members[0].model for members in stacks[:3]} == {"mlp", "cnn"}  # they take turns


@pytest.mark.parametrize("size", [1, 6, 36])
def test_any_beginning_of_a_plan_is_a_fair_sample(size: int) -> None:
    runs = load_grid("paper").runs
    stacks = plan(runs, lambda shape: size)
    early = [run for members in stacks[: -(-432 // size)] for run in members]
    for axis in ("optimizer", "model", "data", "momentum"):
        whole, part = (pd.Series([getattr(run, axis) for run in some]).value_counts() for some in (runs, early))
        expected = whole / whole.sum() * part.sum()
        assert (part.reindex(whole.index, fill_value=0) > 0.6 * expected).all(), (axis, part)
    assert len({run.optimizer for members in stacks[: -(-36 // size)] for run in members}) == 6


def test_stacks_are_even_and_divide_among_workers() -> None:
    runs = [RunConfig(lr=lr / 100) for lr in range(1, 14)]
    assert [len(members) for members in plan(runs, lambda shape: 12)] == [6, 7]
    assert [len(members) for members in plan(runs, lambda shape: 13, workers=3)] == [4, 4, 5]
    assert [len(members) for members in plan(runs[:2], lambda shape: 13, workers=3)] == [1, 1]
    mixed = [RunConfig(seed=seed, epochs=epochs) for seed in range(3) for epochs in (1, 2)]
    assert len(plan(mixed, lambda shape: 6)) == 1
    assert len(plan([RunConfig(batch_size=size) for size in (1, 2, 3)], lambda shape: 6)) == 3


def test_a_sweep_is_stored_as_it_goes(swept: Path, small_grid: Grid) -> None:
    runs, metrics = load_runs(swept), load_metrics(swept)
    assert list(runs.id) == [run.id for run in small_grid.runs]
    assert set(runs.status) == {"done"}
    assert set(runs.train_samples) == {1437}
    assert metrics.groupby("run").epoch.apply(list).map(tuple).unique().tolist() == [(0, 2, 4)]
    assert metrics[list(METRICS)].notna().all().all()
    first = metrics[(metrics.run == runs.id[0]) & (metrics.epoch == 0)].iloc[0]
    assert runs.nc0_start[0] == first.nc0
    assert runs.nc0[0] != first.nc0
    (session,) = load_sessions(swept)
    assert session["versions"]["torch"] == torch.__version__.split("+")[0]
    assert all(session[key] for key in ("device", "command", "started", "threads", "platform"))
    assert load_meta(swept)["grid"] == "small"


def test_the_same_command_again_trains_nothing(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (swept / FILE).read_bytes()
    monkeypatch.setattr(processes, "train", lambda *args: pytest.fail("trained again"))
    assert run_sweep(small_grid, swept) == 0
    assert (swept / FILE).read_bytes() == before


def interrupt_after(events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after so many of the messages of training."""
    real, left = processes.train, events

    def interrupted(*args: Any) -> object:
        nonlocal left
        for event in real(*args):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield event

    monkeypatch.setattr(processes, "train", interrupted)


@pytest.mark.parametrize("events", [0, 3, 8, 9, 13, 20])
def test_interrupted_anywhere_it_continues_to_the_same_results(
    run_sweep: Callable[..., int],
    small_grid: Grid,
    swept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    events: int,
) -> None:
    interrupt_after(events, monkeypatch)
    with pytest.raises(InterruptError, match=r"of 12 runs are finished and kept in .*; the same command goes on"):
        run_sweep(small_grid, tmp_path / "cut", stack=4)
    kept = load_runs(tmp_path / "cut")
    done = int((kept.status == "done").sum())
    # A stack of four runs has eight events: three evaluations, the last of which ends the runs, four epochs, the end.
    assert done == 4 * ((events + 2) // 8)
    monkeypatch.undo()
    assert run_sweep(small_grid, tmp_path / "cut", stack=4) == 12 - done
    assert_same(swept, tmp_path / "cut", but="stack")
    assert len(load_sessions(tmp_path / "cut")) == 2


def test_killed_outright_it_continues_to_the_same_results(small_grid: Grid, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text('optimizer = ["sgd", "adamw", "signum"]\nweight_decay = [5e-4, 5e-2]\nepochs = 40\nlr = 0.002\n')

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "nc.train", "sweep", str(grid), "--stack", "1", "--out", str(tmp_path / out)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    victim = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "cut" / FILE).exists() and (load_runs(tmp_path / "cut").status == "done").sum() >= 2:
            break
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    done = int((load_runs(tmp_path / "cut").status == "done").sum())
    assert 2 <= done < 6
    again = subprocess.run(command("cut"), check=True, capture_output=True, text=True)
    assert f"Trained {6 - done} of 6 runs" in again.stdout
    assert_same(tmp_path / "whole", tmp_path / "cut")


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


def test_another_grid_in_the_folder_is_refused_by_name(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path
) -> None:
    changed = Grid("small", tuple(dataclasses.replace(run, epochs=5) for run in small_grid.runs[:3]))
    with pytest.raises(UserError) as error:
        run_sweep(changed, swept)
    text = str(error.value)
    assert "made by another grid (12 runs there, 3 now)" in text
    assert "epochs was 4, is 5" in text
    assert "optimizer was adam, adamw, sgd, sgdw, signum, signumw, is sgd, sgdw" in text
    assert (load_runs(swept).status == "done").all()


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

    monkeypatch.setattr(processes, "train", interrupt)
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path)
    monkeypatch.undo()
    other = dataclasses.replace(digits, fingerprint="0")
    with pytest.raises(UserError, match="digits is not the one that its earlier runs were trained on"):
        sweep(small_grid, tmp_path, lambda name, device: other, CPU, Options(), quiet)


def test_a_second_process_is_refused(small_grid: Grid, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from nc.train.grid import load_grid
from nc.train.store import Store
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
    """SQLite's own limit on pages stands in for a disk that fills up in the middle of a sweep."""
    real = Store.record

    def fill_up(self: Store, *args: Any) -> dict[str, str]:
        ended = real(self, *args)
        if ended:
            pages = self._db.execute("PRAGMA page_count").fetchone()[0]
            self._db.execute(f"PRAGMA max_page_count = {pages}")
        return ended

    monkeypatch.setattr(Store, "record", fill_up)
    with pytest.raises(
        UserError, match=r"cannot write to .*: database or disk is full. Every finished run in it is kept"
    ):
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


def test_what_is_no_store_is_said_and_closed(small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no results in"):
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


@pytest.mark.parametrize(
    ("runs", "seconds", "text"),
    [(0, 5.0, "… runs/min"), (96, 60.0, "96 runs/min"), (119, 3600.0, "119 runs/h"), (0.5, 3600.0, "0.5 runs/h")],
)
def test_the_rate_is_in_plain_numbers(runs: float, seconds: float, text: str) -> None:
    assert rate(runs, seconds) == text


def exhausting(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for so many runs at once; gives the sizes of the stacks that were tried."""
    real, tried = loop.Training, []

    def limited(runs: list[RunConfig], *args: Any, **options: Any) -> object:
        tried.append(len(runs))
        if len(runs) > most:
            raise torch.OutOfMemoryError("no room for so many")
        return real(runs, *args, **options)

    monkeypatch.setattr(work, "Training", limited)
    return tried


def test_a_stack_that_does_not_fit_is_halved_and_said(
    digits: Dataset, swept: Path, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = exhausting(3, monkeypatch)
    console = Console(record=True, width=200, file=io.StringIO())
    assert sweep(small_grid, tmp_path, lambda name, device: digits, CPU, Options(stack=6), console) == 12
    assert tried == [6, 3, 3, 3, 3]  # the second stack of six is not even tried
    assert "6 runs at once do not fit (no room for so many); going on with stacks of 3" in console.export_text()
    assert_same(swept, tmp_path, but="stack")


def test_runs_that_do_not_fit_alone_are_named_and_stop_nobody(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.Training

    def no_adam(runs: list[RunConfig], *args: Any, **options: Any) -> object:
        if any(run.family == "adam" for run in runs):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return real(runs, *args, **options)

    monkeypatch.setattr(work, "Training", no_adam)
    with pytest.raises(UserError, match="4 runs could not be trained, since there is no memory for even one of them"):
        run_sweep(small_grid, tmp_path, stack=2)
    frame = load_runs(tmp_path)
    assert set(frame.status[frame.optimizer.str.startswith("adam")]) == {"running"}
    assert set(frame.status[~frame.optimizer.str.startswith("adam")]) == {"done"}


def test_another_size_of_stacks_replans_what_is_not_begun(
    run_sweep: Callable[..., int], swept: Path, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(7, monkeypatch)  # the first of three stacks has ended
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path, stack=4)
    assert sorted(load_runs(tmp_path)["stack"].value_counts()) == [4, 4, 4]
    monkeypatch.undo()
    run_sweep(small_grid, tmp_path, stack=2)
    assert sorted(load_runs(tmp_path)["stack"].value_counts()) == [2, 2, 2, 2, 4]
    assert_same(swept, tmp_path, but="stack")


def test_weights_are_saved_on_request(run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path) -> None:
    from nc import metrics
    from nc.train.models import build

    run_sweep(small_grid, tmp_path, save_weights=True)
    runs = load_runs(tmp_path)
    assert sorted(path.stem for path in (tmp_path / "weights").iterdir()) == sorted(runs.id)
    saved = torch.load(tmp_path / "weights" / f"{runs.id[3]}.pt", weights_only=True)
    model = build("mlp", 1, 8, 10, seed=9)
    model.load_state_dict(saved["state_dict"])
    assert metrics.nc0(model.fc.weight.detach()).item() == pytest.approx(runs.nc0[3], rel=1e-9)
    assert RunConfig(**saved["config"]) == small_grid.runs[3]
