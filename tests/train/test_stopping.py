"""A sweep that is told to stop does so at checkpoints; hopeless runs end early; a log has a line a minute."""

import functools
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fork_server import fork_context
from ncollapse.train import cli
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine import this_machine
from ncollapse.train.engine.messages import Failed, Progress, Stopped, WorkerSettings, train_stack
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.progress_bar import MinuteLog, SweepProgress
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.engine.stopping import StopRequest
from ncollapse.train.errors import StoppedError
from ncollapse.train.grid import Grid
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.writer import Store
from ncollapse.train.training.loop import Training, chance_loss
from sweep_results import assert_same

CPU = torch.device("cpu")
LOAD = functools.partial(load, data_dir=None, download=False)
unix = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals here")


def signalled_after(events: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process send itself a signal at the `events`-th message that the store records progress of."""
    real, left = Store.progress, [events]

    def progress(self: Store, *args: Any) -> None:
        real(self, *args)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Store, "progress", progress)


@unix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_at_checkpoints_and_the_same_command_goes_on(
    name: str,
    run_sweep: Callable[..., int],
    small_grid: Grid,
    swept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(getattr(signal, name))
    signalled_after(6, getattr(signal, name), monkeypatch)
    with pytest.raises(StoppedError, match=rf"stopped by {name}: 4 of 12 runs .*; the same command continues"):
        run_sweep(small_grid, tmp_path, stack=4)
    assert signal.getsignal(getattr(signal, name)) == before
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # of the stack that was in training
    monkeypatch.undo()
    assert run_sweep(small_grid, tmp_path, stack=4) == 8
    assert_same(swept, tmp_path, but="stack")


@unix
def test_workers_stop_too(
    small_grid: Grid, swept: Path, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "forkserver" in multiprocessing.get_all_start_methods():
        monkeypatch.setattr(this_machine, "_CONTEXT", fork_context())
    long = Grid("long", tuple(RunConfig(lr=lr, epochs=2000, eval_every=1000, limit=100) for lr in (0.1, 0.2)))
    signalled_after(5, signal.SIGUSR1, monkeypatch)
    with pytest.raises(StoppedError, match="0 of 2 runs"):
        sweep(long, tmp_path, LOAD, CPU, Options(workers=2, stack=1), quiet)
    assert len(list((tmp_path / "checkpoints").glob("*.pt"))) == 2
    assert multiprocessing.active_children() == []


@unix
def test_a_second_signal_and_one_before_training_end_it_at_once(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = StopRequest()
    with request.listening():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert request.reason == "SIGTERM"
        asked: list[int] = []
        with request.training(lambda: asked.append(1)):
            assert asked == [1]  # at once, since it was asked before
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGUSR1)


def test_minutes_stop_at_checkpoints(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over before the first epoch, however fast the machine is."""
    monkeypatch.setattr(StopRequest, "_time_is_over", lambda *args: None)
    real = StopRequest.training

    def over(self: StopRequest, stop: Callable[[], None]) -> Any:
        self.reason = "--minutes 5"
        return real(self, stop)

    monkeypatch.setattr(StopRequest, "training", over)
    with pytest.raises(StoppedError, match=r"stopped by --minutes 5: 0 of 12 runs"):
        run_sweep(small_grid, tmp_path, minutes=5.0)
    monkeypatch.undo()
    request = StopRequest()
    with request.listening(1e-6), request.training(lambda: None):
        deadline = time.monotonic() + 60
        while not request.reason and time.monotonic() < deadline:
            time.sleep(0.01)
    assert request.reason == "--minutes 1e-06"


def test_a_stack_that_stops_has_a_checkpoint_unless_it_has_ended(digits: Dataset) -> None:
    settings = WorkerSettings(lambda name, device: digits, 3600.0, keep_weights=False)
    runs = [RunConfig(epochs=2, limit=100)]

    def train(stop_at: int) -> list[object]:
        asked = iter(range(1, 10))
        return list(train_stack(runs, lambda: digits, CPU, settings, None, lambda: next(asked) >= stop_at))

    *_, progress, last = train(1)
    assert isinstance(progress, Progress)
    assert progress.epoch == 1
    assert progress.checkpoint is not None
    assert isinstance(last, Stopped)
    ended = train(2)
    assert not any(isinstance(message, (Stopped, Failed)) for message in ended)


@unix
def test_the_command_ends_with_code_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "grid.toml").write_text("epochs = 50\nlimit = 100\nlr = [0.1, 0.2]\n")
    signalled_after(3, signal.SIGTERM, monkeypatch)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert stop.value.code == 75
    assert "stopped by SIGTERM: 0 of 2 runs are finished" in " ".join(capsys.readouterr().err.split())


def test_hopeless_runs_end_early_and_only_where_it_is_asked_for(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    good = RunConfig(epochs=8, eval_every=1, lr=0.05)
    bad = RunConfig(epochs=8, eval_every=1, lr=1e-9, momentum=0.0)
    run_sweep(Grid("mixed", (good, bad)), tmp_path / "ended", stop_hopeless=0.5)
    runs = load_runs(tmp_path / "ended")
    assert runs.status.tolist() == ["done", "hopeless"]
    assert load_metrics(tmp_path / "ended").groupby("run").epoch.max()[bad.id] == 4
    run_sweep(Grid("mixed", (good, bad)), tmp_path / "all")
    assert load_runs(tmp_path / "all").status.tolist() == ["done", "done"]
    # The stack has another shape once it has lost a run: sums are rounded otherwise.
    assert load_runs(tmp_path / "all").nc1[0] == pytest.approx(runs.nc1[0], rel=1e-5)


def test_chance_level_is_the_entropy_of_the_labels(digits: Dataset) -> None:
    assert chance_loss(torch.tensor([0, 0, 1, 1])) == pytest.approx(0.6931472)
    assert chance_loss(torch.tensor([0, 0, 0, 1])) == pytest.approx(0.5623351)
    training = Training([RunConfig(epochs=1)], digits, CPU)
    assert not training.ended
    list(training)
    assert training.ended


def test_a_log_has_a_line_a_minute(small_grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    bar = SweepProgress("small", small_grid.runs, {small_grid.runs[0].id: "diverged"}, Console(quiet=True))
    assert bar.line() == "1/12 runs, 1 diverged, … runs/min"
    with MinuteLog(Console(file=io.StringIO()), seconds=0.01) as log:
        log.line = bar.line
        deadline = time.monotonic() + 60
        while "1/12 runs, 1 diverged" not in written.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "1/12 runs, 1 diverged" in written.getvalue()
    monkeypatch.setattr(written, "isatty", lambda: True)
    with MinuteLog(Console(file=io.StringIO()), seconds=0.001):
        length = len(written.getvalue())
        time.sleep(0.05)
    assert len(written.getvalue()) == length
