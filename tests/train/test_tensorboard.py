"""Logs for TensorBoard: every recorded metric, read with TensorBoard itself, also after a restart."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncollapse.train.config import RunConfig
from ncollapse.train.engine import messages as work
from ncollapse.train.errors import InterruptError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.record import Ended, Evaluation
from ncollapse.train.results.tensorboard import Logs, folder_name

RUN = RunConfig(optimizer="adam", coupling=0.5)


def shown(folder: Path, name: str) -> dict[int, float]:
    """Return epoch -> value of a metric in the folder of a run, as TensorBoard would show it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Scalars(name)
    assert len({one.step for one in scalars}) == len(scalars), "a point is there twice"
    return {one.step: one.value for one in scalars}


def assert_shows_the_store(folder: Path) -> None:
    metrics = load_metrics(folder)
    logs = {path.name[-12:]: path for path in (folder / "tensorboard").iterdir()}
    assert set(logs) == set(load_runs(folder).id)
    for run, rows in metrics.groupby("run"):
        for name in METRICS:
            stored = dict(zip(rows.epoch, rows[name], strict=True))
            assert shown(logs[run], name) == pytest.approx(stored, rel=1e-6, nan_ok=True), (run, name)


def test_a_sweep_logs_what_it_stores(run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path) -> None:
    grid = Grid("few", small_grid.runs[:3])
    run_sweep(grid, tmp_path, tensorboard=True)
    assert_shows_the_store(tmp_path)


def test_without_the_option_there_is_no_folder(swept: Path) -> None:
    assert not (swept / "tensorboard").exists()


def test_a_continued_sweep_has_no_point_twice(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second session starts the stack again, and with it the run that had ended."""
    grid = Grid("few", (dataclasses.replace(small_grid.runs[0], epochs=2), *small_grid.runs[1:3]))
    real = work.train_stack

    def interrupted(*args: Any) -> Any:
        for message in real(*args):
            if isinstance(message, Evaluation) and message.epoch == 4:
                raise KeyboardInterrupt
            yield message

    monkeypatch.setattr("ncollapse.train.engine.this_machine.train_stack", interrupted)
    with pytest.raises(InterruptError):
        run_sweep(grid, tmp_path, tensorboard=True)
    monkeypatch.setattr("ncollapse.train.engine.this_machine.train_stack", real)
    assert (load_runs(tmp_path).status == "done").tolist() == [True, False, False]
    assert run_sweep(grid, tmp_path, tensorboard=True) == 2
    assert_shows_the_store(tmp_path)


def test_a_stack_that_starts_again_replaces_what_it_had_logged(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    for epoch, value in ((0, 0.0), (5, 0.5), (10, 1.0), (5, 0.25)):  # lost after 10, with a checkpoint at 4
        logs.record(RUN, epoch, {"nc0": value})
    folder = tmp_path / "tensorboard" / folder_name(RUN)
    assert shown(folder, "nc0") == {0: 0.0, 5: 0.25}
    Logs(tmp_path).record(RUN, 5, {"nc0": 0.75})  # another session
    assert shown(folder, "nc0") == {0: 0.0, 5: 0.75}


def test_logs_of_runs_that_had_ended_stay(tmp_path: Path) -> None:
    other = dataclasses.replace(RUN, seed=1)
    done = {1: Ended("done", None, 1.0)}
    Logs(tmp_path).evaluated([other, RUN], Evaluation(2, (1,), {"nc0": [3.0]}, {}, done, {}), {other.id: "done"})
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == [folder_name(RUN)]
    Logs(tmp_path).evaluated([other, RUN], Evaluation(0, (0, 1), {"nc0": [1.0, 2.0]}, {}, {}, {}), {RUN.id: "done"})
    assert shown(tmp_path / "tensorboard" / folder_name(other), "nc0") == {0: 1.0}
    assert shown(tmp_path / "tensorboard" / folder_name(RUN), "nc0") == {2: 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_values_out_of_the_range_of_float32_are_no_error(tmp_path: Path, value: float) -> None:
    Logs(tmp_path).record(RUN, 0, {"nc1": value})
    (logged,) = shown(tmp_path / "tensorboard" / folder_name(RUN), "nc1").values()
    assert not math.isfinite(logged)


def test_folders_have_plain_names() -> None:
    assert folder_name(RUN) == f"mlp-digits_adam_lr=0.1_momentum=0.9_decay=0.0005_c=0.5-{RUN.id}"


def test_a_missing_package_is_named_before_anything_trains(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard needs .*pip install 'ncollapse\[tensorboard\]'"):
        run_sweep(small_grid, tmp_path, tensorboard=True)
    assert (load_runs(tmp_path).status == "pending").all()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*Every finished run is kept"):
        Logs(tmp_path).record(RUN, 0, {"nc0": 1.0})


def test_a_long_name_of_the_users_makes_a_folder_that_can_be_made() -> None:
    run = RunConfig(model=f"{'x' * 290}.py:Net", data=f"{'y' * 290}.npz", code=f"{'x' * 290}.py=aaa", epochs=1)
    assert len(folder_name(run)) < 255
    assert folder_name(run).endswith(f"-{run.id}")
