"""Stacks in worker processes: the numbers of one process, also when workers are killed, and errors that arrive."""

import functools
import io
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from torch import nn

from fork_server import fork_context
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine import stack_size, this_machine
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.messages import Message, WorkerSettings
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import ERRORS, sweep
from ncollapse.train.engine.this_machine import ThisMachine
from ncollapse.train.engine.throughput import DataFacts, Rate, bytes_per_run, measure_rate
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.reader import load_meta, load_runs
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.training.stack import Stack
from sweep_results import assert_same, count

CPU = torch.device("cpu")
DIGITS = DataFacts((1, 8, 8), 10, 1437, "")
MLP = StackKey("mlp", "digits", None, 128)
LOAD = functools.partial(load, data_dir=None, download=False)


@pytest.fixture
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks of a server that has torch loaded, instead of new processes that load it."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        monkeypatch.setattr(this_machine, "_CONTEXT", fork_context())


def pooled(grid: Grid, out: Path, quiet: Console, **options: object) -> int:
    return sweep(grid, out, LOAD, CPU, Options(workers=2, **options), quiet)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick_starts")
def test_side_by_side_and_killed_the_results_are_those_of_one_process(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed worker costs only the time since its last checkpoint."""
    run_sweep(small_grid, tmp_path / "one", stack=3, save_weights=True)
    real, killed = ThisMachine.run, []

    def killing(
        self: ThisMachine, next_stack: Callable[[], PlannedStack | None]
    ) -> Iterator[tuple[PlannedStack, Message]]:
        for number, item in enumerate(real(self, next_stack)):
            yield item
            if number in (6, 15):  # in the middle of a stack, or between two
                victim = self._workers[number % 2].process
                victim.kill()
                killed.append(victim)

    monkeypatch.setattr(ThisMachine, "run", killing)
    pooled(small_grid, tmp_path / "two", quiet, stack=3, save_weights=True, checkpoint_minutes=0)
    assert len(killed) == 2
    assert_same(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "one" / "weights").iterdir():
        mine, theirs = (torch.load(tmp_path / name / "weights" / path.name)["state_dict"] for name in ("two", "one"))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any(victim.is_alive() for victim in killed)


@pytest.mark.usefixtures("quick_starts")
def test_a_stack_that_kills_its_process_each_time_is_halved(small_grid: Grid, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    assert sweep(small_grid, tmp_path, with_little_memory, CPU, Options(workers=2, stack=6), console) == 12
    text = console.export_text()
    assert "was lost: its process ended with exit code -9: SIGKILL, by the system for the memory it took" in text
    assert "it starts again from its beginning" in text
    assert "6 runs at once were lost 2 times without a new checkpoint" in text
    assert load_runs(tmp_path)["stack"].value_counts().max() <= 3
    assert set(load_runs(tmp_path).status) == {"done"}


def with_little_memory(name: str, device: torch.device) -> Dataset:
    """Load digits; a worker process that does is killed by larger stacks, as by the system when memory is short."""
    if in_worker():
        real = Stack.of

        def of(models: Sequence[nn.Module], *args: Any, **options: Any) -> Stack:
            if len(models) > 3:
                psutil.Process().kill()
            return real(models, *args, **options)

        Stack.of = of  # type: ignore[method-assign,assignment]
    return LOAD(name, device)


@pytest.mark.usefixtures("quick_starts")
def test_an_unforeseen_error_in_a_process_is_a_line_and_a_log(small_grid: Grid, tmp_path: Path, quiet: Console) -> None:
    with pytest.raises(UserError, match=r"12 runs .* did not foresee: .*ZeroDivisionError.* Its traceback is in .*log"):
        sweep(small_grid, tmp_path, failing_in_workers, CPU, Options(workers=2), quiet)
    assert "in failing_in_workers" in (tmp_path / ERRORS).read_text()
    assert multiprocessing.active_children() == []


def failing_in_workers(name: str, device: torch.device) -> Dataset:
    if in_worker():
        raise ZeroDivisionError
    return LOAD(name, device)


def in_worker() -> bool:
    return multiprocessing.parent_process() is not None


@pytest.mark.usefixtures("quick_starts")
def test_what_the_user_has_to_mend_is_said(tmp_path: Path, quiet: Console) -> None:
    runs = tuple(RunConfig(limit=1, epochs=1, lr=lr) for lr in (0.1, 0.2))
    with pytest.raises(UserError, match="all of one class; give a larger --limit"):
        pooled(Grid("bad", runs), tmp_path, quiet)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text("model = 'cnn'\nepochs = 10000\nlr = [0.1, 0.2]\neval_every = 10000\n")
    arguments = ["sweep", str(tmp_path / "grid.toml"), "--workers", "2", "--stack", "1", "--out", str(tmp_path / "out")]
    parent = subprocess.Popen([sys.executable, "-m", "ncollapse.train", *arguments], stdout=subprocess.DEVNULL)
    try:
        workers = until(lambda: [p for p in psutil.Process(parent.pid).children() if "spawn_main" in command_of(p)], 2)
        until(lambda: [1] if count(tmp_path / "out", "running") == 2 else [], 1)
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def command_of(process: psutil.Process) -> str:
    """Its command line; empty where it has just ended, as git does, which is asked for the commit."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or a zombie
        return ""


def until(found: Callable[[], list[object]], at_least: int) -> list[object]:
    deadline = time.monotonic() + 120
    while len(result := found()) < at_least:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


def test_a_sweep_with_much_to_do_measures_and_records_its_choice(
    tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_size, "WORTH_MEASURING", 0.0)
    monkeypatch.setattr(stack_size, "WORTH_PROCESSES", 0.0)
    monkeypatch.setattr(this_machine, "processors", lambda: 2)
    grid = Grid("many", tuple(RunConfig(lr=0.01 * lr, epochs=1, limit=150) for lr in range(1, 9)))
    console = Console(record=True, width=200, file=io.StringIO())
    assert sweep(grid, tmp_path, LOAD, CPU, Options(), console) == 8
    engine = json.loads(load_meta(tmp_path)["engine"])
    assert engine["engine"] == "local"
    assert (engine["workers"], engine["threads"]) == (2, 1)
    assert {one["size"] for one in engine["measured"]} >= {1, 4}
    assert all(one["steps_per_second"] > 0 for one in engine["measured"])
    assert "training steps/s)" in console.export_text()


def test_measuring_says_what_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (measure_rate(MLP, DIGITS, 2, CPU, quick=True) or Rate(0.0)).steps > 0

    def exhausted(*args: object, **options: object) -> object:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(Stack, "of", exhausted)
    assert measure_rate(MLP, DIGITS, 2, CPU) is None


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet9"])
def test_the_estimate_of_memory_grows_with_the_model(model: str) -> None:
    """For ResNet9 on 28 × 28: 6.57 M weights, a gradient and two states each, and about 190 MB of activations."""
    size = bytes_per_run(StackKey(model, "mnist", None, 128), DataFacts((1, 28, 28), 10, 60_000, ""))
    low, high = {"mlp": (1e7, 1e8), "cnn": (1e7, 3e8), "resnet9": (2e8, 1.2e9)}[model]
    assert low < size < high


def test_one_process_trains_with_the_threads_that_the_sweep_began_with(digits: Dataset) -> None:
    before = torch.get_num_threads()
    engine = ThisMachine(CPU, WorkerSettings(lambda name, device: digits, 60.0, keep_weights=False))
    engine.use(1, before + 1)
    assert torch.get_num_threads() == before + 1
    engine.close()
    assert torch.get_num_threads() == before


def unsendable(data: Dataset) -> Callable[[str, torch.device], Dataset]:
    """A function that loads data and cannot be sent to another process."""
    lock = threading.Lock()

    def load(name: str, device: torch.device) -> Dataset:
        with lock:
            return data

    return load


def test_what_cannot_be_sent_to_other_processes_trains_in_this_one(
    digits: Dataset, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not depend on measured speed: the function is checked before anything is measured."""
    monkeypatch.setattr(stack_size, "WORTH_MEASURING", 0.0)
    monkeypatch.setattr(stack_size, "WORTH_PROCESSES", 0.0)
    monkeypatch.setattr(this_machine, "processors", lambda: 2)
    monkeypatch.setattr(ThisMachine, "measure_rate", lambda *args, **options: Rate(1e-3))
    console = Console(record=True, width=500, file=io.StringIO())
    grid = Grid("few", small_grid.runs[:2])
    assert sweep(grid, tmp_path, unsendable(digits), CPU, Options(), console) == 2
    assert json.loads(load_meta(tmp_path)["engine"])["workers"] == 1
    (line,) = (line for line in console.export_text().splitlines() if "cannot be sent" in line)
    assert "cannot pickle '_thread.lock' object), so this process trains all stacks" in line


@pytest.mark.usefixtures("quick_starts")
def test_a_plan_for_several_processes_goes_on_in_one_where_it_must(
    digits: Dataset, small_grid: Grid, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ThisMachine, "run", lambda *args: iter(()))
        assert pooled(small_grid, tmp_path, quiet, stack=6) == 12  # plans, trains nothing
    assert json.loads(load_meta(tmp_path)["engine"])["workers"] == 2
    assert set(load_runs(tmp_path).status) == {"pending"}
    sweep(small_grid, tmp_path, unsendable(digits), CPU, Options(), quiet)
    assert set(load_runs(tmp_path).status) == {"done"}


def test_several_workers_that_cannot_start_are_refused(
    digits: Dataset, small_grid: Grid, tmp_path: Path, quiet: Console
) -> None:
    with pytest.raises(UserError, match=r"2 workers need code and data that can be sent .*, or give workers=1"):
        sweep(small_grid, tmp_path, unsendable(digits), CPU, Options(workers=2), quiet)


@pytest.mark.usefixtures("quick_starts")
def test_the_number_of_workers_can_change_between_measurements() -> None:
    before = torch.get_num_threads()
    engine = ThisMachine(CPU, WorkerSettings(LOAD, 60.0, keep_weights=False))
    try:
        for workers, threads in ((1, before), (2, 1), (3, 1), (2, 1), (1, before)):
            engine.use(workers, threads)
            assert len(multiprocessing.active_children()) == (workers if workers > 1 else 0)
            assert (engine.measure_rate(MLP, DIGITS, 2, quick=True) or Rate(0.0)).steps > 0
            assert engine.room(MLP, DIGITS) >= 1
    finally:
        engine.close()
    assert multiprocessing.active_children() == []
    assert torch.get_num_threads() == before
