"""A sweep: stacks are planned, results stored, and a sweep that was stopped continues to the same results."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from interrupts import interrupt_after
from ncollapse.optimizer_table import PAPER_OPTIMIZERS
from ncollapse.train.config import RunConfig
from ncollapse.train.engine import this_machine
from ncollapse.train.engine.grouping import StackKey, make_stacks
from ncollapse.train.errors import InterruptError
from ncollapse.train.grid import Grid, load_grid
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.reader import load_meta, load_metrics, load_runs, load_sessions
from ncollapse.train.results.schema import FILE
from sweep_results import assert_same, count

CPU = torch.device("cpu")


def test_plan_groups_what_can_train_together() -> None:
    runs = [
        RunConfig(optimizer=optimizer, model=model, weight_decay=decay / 100)
        for model in ("mlp", "cnn")
        for optimizer in PAPER_OPTIMIZERS
        for decay in range(9)
    ]
    stacks = make_stacks(runs, lambda key: 24 if key.model == "mlp" else 7)
    assert sorted(run.id for members in stacks for run in members) == sorted(run.id for run in runs)
    for members in stacks:
        assert len({StackKey.of(run) for run in members}) == 1
        assert len(members) <= (24 if members[0].model == "mlp" else 7)
        assert {run.optimizer for run in members} == set(PAPER_OPTIMIZERS)
    assert {members[0].model for members in stacks[:3]} == {"mlp", "cnn"}  # models alternate


@pytest.mark.parametrize("size", [1, 6, 36])
def test_any_beginning_of_a_plan_is_a_fair_sample(size: int) -> None:
    runs = load_grid("paper").runs
    stacks = make_stacks(runs, lambda key: size)
    early = [run for members in stacks[: -(-432 // size)] for run in members]
    for axis in ("optimizer", "model", "data", "momentum"):
        whole, part = (pd.Series([getattr(run, axis) for run in some]).value_counts() for some in (runs, early))
        expected = whole / whole.sum() * part.sum()
        assert (part.reindex(whole.index, fill_value=0) > 0.6 * expected).all(), (axis, part)
    assert len({run.optimizer for members in stacks[: -(-36 // size)] for run in members}) == 6


def test_stacks_are_even_and_divide_among_workers() -> None:
    runs = [RunConfig(lr=lr / 100) for lr in range(1, 14)]
    assert [len(members) for members in make_stacks(runs, lambda key: 12)] == [6, 7]
    assert [len(members) for members in make_stacks(runs, lambda key: 13, workers=3)] == [4, 4, 5]
    assert [len(members) for members in make_stacks(runs[:2], lambda key: 13, workers=3)] == [1, 1]
    mixed = [RunConfig(seed=seed, epochs=epochs) for seed in range(3) for epochs in (1, 2)]
    assert len(make_stacks(mixed, lambda key: 6)) == 1
    assert len(make_stacks([RunConfig(batch_size=size) for size in (1, 2, 3)], lambda key: 6)) == 3


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
    monkeypatch.setattr(this_machine, "train_stack", lambda *args: pytest.fail("trained again"))
    assert run_sweep(small_grid, swept) == 0
    assert (swept / FILE).read_bytes() == before


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
    with pytest.raises(InterruptError, match=r"of 12 runs are finished and kept in .*; the same command continues"):
        run_sweep(small_grid, tmp_path / "cut", stack=4)
    kept = load_runs(tmp_path / "cut")
    done = int((kept.status == "done").sum())
    # A stack of four runs has eight events: three evaluations, the last of which ends the runs, four epochs, the end.
    assert done == 4 * ((events + 2) // 8)
    monkeypatch.undo()
    assert run_sweep(small_grid, tmp_path / "cut", stack=4) == 12 - done
    assert_same(swept, tmp_path / "cut", but="stack")
    assert len(load_sessions(tmp_path / "cut")) == 2


def test_killed_outright_it_continues_to_the_same_results(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text('optimizer = ["sgd", "adamw", "signum"]\nweight_decay = [5e-4, 5e-2]\nepochs = 40\nlr = 0.002\n')

    options = ["--stack", "1", "--workers", "1", "--out", str(tmp_path / "cut")]
    command = [sys.executable, "-m", "ncollapse.train", "sweep", str(grid), *options]
    run_sweep(load_grid(str(grid)), tmp_path / "whole", stack=1, workers=1)
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline:
        if count(tmp_path / "cut", "done") >= 2:
            break
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    done = count(tmp_path / "cut", "done")
    assert 2 <= done < 6
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"Trained {6 - done} of 6 runs" in again.stdout
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_another_size_of_stacks_replans_what_is_not_begun(
    run_sweep: Callable[..., int], swept: Path, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(7, monkeypatch)  # the first of three stacks has ended
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path, stack=4)
    assert sorted(load_runs(tmp_path)["stack"].value_counts()) == [4, 4, 4]
    monkeypatch.undo()
    run_sweep(small_grid, tmp_path, stack=8)
    assert sorted(load_runs(tmp_path)["stack"].value_counts()) == [4, 8]
    assert_same(swept, tmp_path, but="stack")


def test_weights_are_saved_on_request(run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path) -> None:
    from ncollapse import metrics
    from ncollapse.train.networks.models import build

    run_sweep(small_grid, tmp_path, save_weights=True)
    runs = load_runs(tmp_path)
    assert sorted(path.stem for path in (tmp_path / "weights").iterdir()) == sorted(runs.id)
    saved = torch.load(tmp_path / "weights" / f"{runs.id[3]}.pt", weights_only=True)
    model = build("mlp", 1, 8, 10, seed=9)
    model.load_state_dict(saved["state_dict"])
    assert metrics.nc0(model.fc.weight.detach()).item() == pytest.approx(runs.nc0[3], rel=1e-9)
    assert RunConfig(**saved["config"]) == small_grid.runs[3]
