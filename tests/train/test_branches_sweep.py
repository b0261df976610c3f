"""Sweeps whose stacks are branches: the store says which form a stack has, and a stack that has begun keeps it."""

import io
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from interrupts import interrupt_after
from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.engine import this_machine
from ncollapse.train.engine.messages import Failed
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.preview import print_preview
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.engine.stack_size import StackPolicy
from ncollapse.train.errors import InterruptError
from ncollapse.train.grid import Grid
from ncollapse.train.results.merging import merge_folders
from ncollapse.train.results.reader import query
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE
from sweep_results import assert_same

CPU = torch.device("cpu")
GRID = Grid(
    "branched",
    tuple(
        RunConfig(model="resnet9", width=4, optimizer=name, lr=lr, epochs=3, eval_every=1, limit=64, batch_size=32)
        for name, lr in (("sgd", 0.05), ("adamw", 1e-3), ("signum", 1e-3), ("sgdw", 0.02))
    ),
)  # fmt: skip


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as on a GPU."""
    monkeypatch.setattr(StackPolicy, "_may_branch", lambda *args: True)


@pytest.fixture(scope="module")
def alone(run_sweep: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs one by one."""
    folder = tmp_path_factory.mktemp("alone")
    run_sweep(GRID, folder, stack=1)
    return folder


def forms(folder: Path) -> list[tuple[int, int]]:
    """Return size and form of each stack."""
    rows = query(folder, "SELECT size, branches FROM stacks ORDER BY id")
    return list(zip(rows["size"].tolist(), rows["branches"].tolist(), strict=True))


@pytest.mark.usefixtures("on_gpu")
def test_a_sweep_of_branches_has_the_bits_of_its_runs_alone(
    run_sweep: Callable[..., int], alone: Path, tmp_path: Path
) -> None:
    run_sweep(GRID, tmp_path, stack=3)
    assert forms(tmp_path) == [(2, 1), (2, 1)]
    assert_same(alone, tmp_path, but="stack")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("events", [4, 11])
def test_begun_stacks_go_on_in_their_form(
    run_sweep: Callable[..., int], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: int
) -> None:
    """On a machine without a GPU too; a stack of two runs has eight events, four evaluations and three epochs."""
    with monkeypatch.context() as patch:
        interrupt_after(events, patch)
        with pytest.raises(InterruptError):
            run_sweep(GRID, tmp_path, stack=2, checkpoint_minutes=0)
    monkeypatch.setattr(StackPolicy, "_may_branch", lambda *args: False)
    run_sweep(GRID, tmp_path, stack=2)
    assert forms(tmp_path) == [(2, 1), (2, 1)]
    assert_same(alone, tmp_path, but="stack")


@pytest.mark.usefixtures("on_gpu")
def test_halved_stacks_keep_their_form(
    run_sweep: Callable[..., int], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = this_machine.train_stack, list[int]()

    def failing(runs: Any, *args: Any) -> Any:
        sizes.append(len(runs))
        if len(sizes) > 1:
            yield from real(runs, *args)
            return
        for number, message in enumerate(real(runs, *args)):
            yield message
            if number == 4:  # after the checkpoint of the second epoch
                yield Failed("memory", "out of memory")
                return

    monkeypatch.setattr(this_machine, "train_stack", failing)
    run_sweep(GRID, tmp_path, stack=4, checkpoint_minutes=0)
    assert sizes == [4, 2, 2]
    assert forms(tmp_path) == [(2, 1), (2, 1)]
    assert_same(alone, tmp_path, but="stack")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("copied", ["merged", "salvaged"])
def test_copies_of_a_folder_go_on_in_the_form_of_their_stacks(
    run_sweep: Callable[..., int], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: str
) -> None:
    begun, others = (Grid("half", GRID.runs[part]) for part in (slice(2), slice(2, 4)))
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(InterruptError):
            run_sweep(begun, tmp_path / "cut", stack=2, checkpoint_minutes=0)
    if copied == "merged":
        run_sweep(others, tmp_path / "others", stack=1)
        merge_folders([tmp_path / "cut", tmp_path / "others"], tmp_path / "copy")
    else:
        salvage_folder(tmp_path / "cut", tmp_path / "copy")
    assert forms(tmp_path / "copy")[0] == (2, 1)
    monkeypatch.setattr(StackPolicy, "_may_branch", lambda *args: False)
    run_sweep(begun, tmp_path / "copy", stack=2)
    monkeypatch.undo()
    run_sweep(GRID, tmp_path / "copy", stack=1)
    assert_same(alone, tmp_path / "copy", but="stack")


def test_stacks_of_an_older_store_are_one_program(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    run_sweep(GRID, tmp_path, stack=2)
    connection = sqlite3.connect(tmp_path / FILE)
    with connection:
        connection.execute("ALTER TABLE stacks DROP COLUMN branches")
    connection.close()
    assert forms(tmp_path) == [(2, 0), (2, 0)]
    assert run_sweep(GRID, tmp_path, stack=2) == 0
    assert forms(tmp_path) == [(2, 0), (2, 0)]


@pytest.mark.usefixtures("on_gpu")
def test_the_plan_of_branches_is_told_before_and_while_they_train(digits: Dataset, tmp_path: Path) -> None:
    console = Console(record=True, width=500, file=io.StringIO())
    options, given = Options(workers=1, stack=2), (lambda name, device: digits, CPU)
    print_preview(GRID, tmp_path, *given, options, console)
    sweep(GRID, tmp_path, *given, options, console)
    line = "stacks of up to 2 runs as branches of one CUDA graph in one process"
    assert console.export_text().count(line) == 2
