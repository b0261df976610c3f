"""Failures of a sweep by kind: what is lost goes on from its checkpoint, what cannot is said and stops nobody."""

import contextlib
import dataclasses
import functools
import io
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine import messages, this_machine
from ncollapse.train.engine.messages import Failed, Message, Progress, WorkerSettings
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import ERRORS, sweep
from ncollapse.train.errors import DataError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results import storage_errors, writer
from ncollapse.train.results.reader import load_runs
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.storage_errors import cannot_write
from ncollapse.train.results.writer import PlannedStack, Store
from sweep_results import assert_same

CPU = torch.device("cpu")
LOST = Failed("lost", "its process ended with exit code -9")


@pytest.fixture(scope="module")
def few(small_grid: Grid) -> Grid:
    """SGD, Signum, Adam and AdamW on 200 images."""
    runs = [dataclasses.replace(small_grid.runs[i], limit=200, epochs=6) for i in (0, 4, 8, 11)]
    return Grid("few", tuple(runs))


@pytest.fixture(scope="module")
def undisturbed(few: Grid, digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """undisturbed(size): the results of the few runs in stacks of that size."""

    @functools.cache
    def swept(size: int) -> Path:
        out = tmp_path_factory.mktemp(f"stacks-of-{size}")
        assert said(few, digits, out, stack=size)[1] == ""
        return out

    return swept


def failing(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[int, tuple[RunConfig, ...], Message], Failed | None]
) -> list[int]:
    """Have stacks fail where `when(number of the training, its runs, message)` says so; return the size of each one."""
    real, sizes = this_machine.train_stack, list[int]()

    def train(runs: tuple[RunConfig, ...], *args: Any) -> Iterator[Message]:
        sizes.append(len(runs))
        number = len(sizes)
        for message in real(runs, *args):
            if failure := when(number, runs, message):
                yield failure
                return
            yield message

    monkeypatch.setattr(this_machine, "train_stack", train)
    return sizes


def said(few: Grid, digits: Dataset, out: Path, **options: Any) -> tuple[str, str]:
    """Sweep; return what it says on the terminal, and the error that it ends with."""
    console = Console(record=True, width=500, file=io.StringIO())
    error = ""
    try:
        sweep(few, out, lambda name, device: digits, CPU, Options(**{"workers": 1} | options), console)
    except UserError as failure:
        error = str(failure)
    return console.export_text(), error


def test_a_single_run_that_is_lost_twice_goes_on_from_its_last_checkpoint(
    digits: Dataset, few: Grid, undisturbed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four losses of one run, with a new checkpoint between any two: progress resets the count."""
    victim = few.runs[0].id
    lost = []

    def when(number: int, runs: tuple[RunConfig, ...], message: Message) -> Failed | None:
        if runs[0].id == victim and isinstance(message, Progress) and message.epoch > len(lost) + 1 and len(lost) < 4:
            lost.append(message.epoch)
            return LOST
        return None

    failing(monkeypatch, when)
    text, error = said(few, digits, tmp_path, stack=1, checkpoint_minutes=0)
    assert (error, lost) == ("", [2, 3, 4, 5])
    assert [f"its last checkpoint, of epoch {epoch}" in text for epoch in (1, 2, 3, 4)] == [True] * 4
    assert_same(undisturbed(1), tmp_path)


def test_a_run_that_is_lost_again_and_again_is_left_with_its_checkpoint(
    digits: Dataset, few: Grid, undisturbed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = few.runs[2].id

    def when(number: int, runs: tuple[RunConfig, ...], message: Message) -> Failed | None:
        late = isinstance(message, Progress) and message.epoch == 3
        return LOST if late and runs[0].id == victim else None

    sizes = failing(monkeypatch, when)
    _, error = said(few, digits, tmp_path, stack=1, checkpoint_minutes=0)
    assert len(sizes) == 3 + 3
    assert error.startswith(
        "1 runs could not be trained, since their process was lost 3 times without a new checkpoint"
    )
    assert "exit code -9" in error
    assert (load_runs(tmp_path).status == "done").sum() == 3
    assert [path.name.partition("-")[2] for path in (tmp_path / "checkpoints").iterdir()] == ["2.pt"]
    monkeypatch.undo()
    assert said(few, digits, tmp_path, stack=1)[1] == ""
    assert_same(undisturbed(1), tmp_path)


@pytest.mark.parametrize("kind", ["lost", "memory"])
def test_a_halved_stack_goes_on_from_the_checkpoint(
    digits: Dataset,
    few: Grid,
    undisturbed: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
) -> None:
    """Adam, SGD and Signum in one stack; each half has its rows of weights and states."""
    begun = []

    def when(number: int, runs: tuple[RunConfig, ...], message: Message) -> Failed | None:
        if isinstance(message, Progress):
            begun.append((len(runs), message.epoch))
            if len(runs) == 4 and message.epoch == 3:
                return Failed(kind, "no room")
        return None

    sizes = failing(monkeypatch, when)
    text, error = said(few, digits, tmp_path, stack=4, checkpoint_minutes=0)
    assert error == ""
    assert sizes == ([4, 4, 2, 2] if kind == "lost" else [4, 2, 2])
    assert "4 runs at once" in text
    assert [epoch for size, epoch in begun if size == 2] == [3, 4, 5, 6] * 2  # not from the beginning
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    assert_same(undisturbed(2), tmp_path, but="stack")


def test_what_the_user_has_to_mend_ends_its_stack_only(
    digits: Dataset, few: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = (*few.runs[:2], *(RunConfig(limit=1, epochs=1, lr=lr) for lr in (0.1, 0.2)))
    _, error = said(Grid("mixed", runs), digits, tmp_path, stack=2)
    assert error.startswith("2 runs could not be trained, ")
    assert "all of one class; give a larger --limit; all other runs are finished and kept" in error
    assert sorted(load_runs(tmp_path).status) == ["done", "done", "running", "running"]


def test_memory_that_is_short_outside_the_training_ends_a_stack_with_words(
    digits: Dataset, few: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = messages.Training

    def short(runs: list[RunConfig], *args: Any, **options: Any) -> object:
        if runs[0].family == "adam":
            raise MemoryError
        return real(runs, *args, **options)

    monkeypatch.setattr(messages, "Training", short)
    _, error = said(few, digits, tmp_path, stack=1)
    assert "2 runs could not be trained, since there is no memory for even one of them" in error
    assert (load_runs(tmp_path).status == "done").sum() == 2


def test_unforeseen_errors_are_logged_and_three_in_a_row_end_the_sweep(
    digits: Dataset, few: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = messages.Training, {run.id for run in few.runs[1:3]}

    def buggy(runs: list[RunConfig], *args: Any, **options: Any) -> object:
        if not broken or runs[0].id in broken:
            raise ZeroDivisionError("a bug\nof two lines")
        return real(runs, *args, **options)

    monkeypatch.setattr(messages, "Training", buggy)
    _, error = said(few, digits, tmp_path / "few", stack=1)
    assert "2 runs could not be trained, for an error that ncollapse did not foresee" in error
    assert "(ZeroDivisionError: a bug)" in error
    assert (tmp_path / "few" / ERRORS).read_text().count("in buggy") == 2
    assert (load_runs(tmp_path / "few").status == "done").sum() == 2
    broken.clear()
    _, error = said(few, digits, tmp_path / "all", stack=1)
    assert error.startswith("3 stacks in a row failed: 3 runs could not be trained")


def test_data_that_have_changed_are_not_trained_on(digits: Dataset) -> None:
    settings = WorkerSettings(lambda name, device: digits, 60.0, False, {"digits": "other"})
    with pytest.raises(DataError, match=rf"digits has changed since the sweep began \({digits.fingerprint} now, other"):
        settings.load("digits", CPU)

    def no_memory(name: str, device: torch.device) -> Dataset:
        raise MemoryError

    with pytest.raises(DataError, match="no memory for the data set digits"):
        dataclasses.replace(settings, load_data=no_memory).load("digits", CPU)


def test_a_worker_that_cannot_read_the_data_leaves_the_stacks_to_the_others(
    digits: Dataset, few: Grid, undisturbed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stack goes back to the queue; where no worker has the data, the sweep ends and the same command continues."""
    refused = Failed("data", "the data set digits has changed")
    failing(monkeypatch, lambda number, runs, message: refused if number == 2 else None)
    _, error = said(few, digits, tmp_path, stack=2)
    assert error == "the data set digits has changed. 2 runs are left, all others are kept; the same command continues"
    assert (load_runs(tmp_path).status == "done").sum() == 2
    monkeypatch.undo()
    assert said(few, digits, tmp_path)[1] == ""
    assert_same(undisturbed(2), tmp_path)


def test_a_folder_that_is_deleted_meanwhile_is_not_made_again(few: Grid, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    with Store(folder, few) as store:
        (number,) = store.set_plan([few.runs[:2]])
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="was deleted or moved while"):
            store.save_checkpoint(PlannedStack(number, few.runs[:2]), 1, b"x")
        with pytest.raises(UserError, match=r"was deleted or moved while|cannot write to"):
            store.begin_session("again", {})
    assert not folder.exists()


def _of_sqlite(code: int, text: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "make room, then give the same command again"),
        (_of_sqlite(sqlite3.SQLITE_FULL, "database or disk is full"), "make room"),
        (OSError(30, "Read-only file system"), "make the folder and its files writable"),
        (_of_sqlite(sqlite3.SQLITE_READONLY, "attempt to write a readonly database"), "writable"),
        (_of_sqlite(sqlite3.SQLITE_BUSY, "database is locked"), "another program holds the database"),
        (_of_sqlite(sqlite3.SQLITE_CORRUPT, "database disk image is malformed"), "is damaged: .* `ncollapse check"),
        (_of_sqlite(sqlite3.SQLITE_READONLY_DBMOVED, "moved"), "was deleted or moved"),
        (OSError(5, "Input/output error"), "the disk or the network that it is on fails"),
        (ValueError("what"), "mend that"),
    ],
)
def test_each_failed_write_has_its_own_sentence(tmp_path: Path, error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message):
        raise cannot_write(tmp_path, error)
    assert storage_errors.is_busy(error) == ("another program" in message)


def test_a_disk_that_is_full_for_a_checkpoint_keeps_the_last_one(
    digits: Dataset, few: Grid, undisturbed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer.write_whole

    def full(path: Path, content: bytes) -> None:
        if path.name.endswith("-3.pt"):
            raise cannot_write(path, OSError(28, "No space left on device"))
        real(path, content)

    monkeypatch.setattr(writer, "write_whole", full)
    _, error = said(few, digits, tmp_path, stack=4, checkpoint_minutes=0)
    assert "make room" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1-2.pt"]
    monkeypatch.undo()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("SELECT checkpoint FROM stacks WHERE id = 1").fetchone() == ("1-2.pt",)
    assert said(few, digits, tmp_path)[1] == ""
    assert_same(undisturbed(4), tmp_path)
