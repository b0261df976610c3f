"""The progress of a sweep: while it runs, after it has stopped, before it has begun."""

import dataclasses
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from ncollapse.optimizer_table import PAPER_OPTIMIZERS
from ncollapse.train import cli
from ncollapse.train.commands.status import SweepStatus, print_status, read_status, watch_status
from ncollapse.train.engine import messages as work
from ncollapse.train.errors import InterruptError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results.ownership import LOCK
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store

START = "2030-01-01T00:00:00.000+00:00"
LATER = "2030-01-01T00:01:00.000+00:00"


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    """A copy of the results of the small grid, without a lock."""
    shutil.copy(swept / FILE, tmp_path)
    return tmp_path


def alter(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        for sql in statements:
            connection.execute(sql)


@pytest.fixture
def half(folder: Path) -> Path:
    """A minute into the second session: of three stacks of four runs, one had ended before, one is at epoch 2 of 4."""
    alter(
        folder,
        "DELETE FROM stacks",
        f"INSERT INTO sessions (id, started, command, provenance) VALUES (2, '{START}', 'the [command]', '{{}}')",
        "INSERT INTO stacks (id, size, session, updated, begun_epoch, epoch) VALUES (1, 4, 1, 'long ago', 0, 4)",
        f"INSERT INTO stacks VALUES (2, 4, 0, 2, '{LATER}', 1, 2, '2-1.pt', 1)",
        "INSERT INTO stacks (id, size) VALUES (3, 4)",
        "UPDATE runs SET stack = 1 + position / 4, session = 1",
        "UPDATE runs SET session = 2, status = 'running', seconds = NULL WHERE stack = 2",
        "UPDATE runs SET session = NULL, status = 'pending', seconds = NULL WHERE stack = 3",
        "UPDATE runs SET status = 'diverged' WHERE position = 0",
        "UPDATE runs SET status = 'degenerate' WHERE position = 1",
    )
    return folder


@contextmanager
def sweeping(folder: Path) -> Iterator[None]:
    """Have another process hold the lock of the folder."""
    code = f"""
import filelock
with filelock.FileLock({str(folder / LOCK)!r}):
    print("held", flush=True)
    input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate("\n")


def text(status: SweepStatus) -> str:
    console = Console(record=True, width=80, file=io.StringIO())
    print_status(status, console, datetime.fromisoformat("2030-01-01T00:01:05+00:00"))
    return console.export_text()


def test_a_finished_sweep(folder: Path) -> None:
    status = read_status(folder)
    assert (status.grid, status.sweeping, status.session) == ("small", False, 1)
    assert status.counts == {
        "done": 12,
        "diverged": 0,
        "degenerate": 0,
        "hopeless": 0,
        "failed": 0,
        "running": 0,
        "pending": 0,
    }
    assert status.finished == status.total == 12
    assert status.optimizers == dict.fromkeys(PAPER_OPTIMIZERS, (2, 2))
    assert status.trained == 12
    assert status.seconds > 0
    assert status.left == 0
    assert status.stacks == ()
    assert "12 of 12 runs finished: 12 done\n" in text(status)
    assert "left" not in text(status)
    assert not (folder / LOCK).exists()  # nothing is written


def test_a_sweep_that_runs(half: Path) -> None:
    with sweeping(half):
        status = read_status(half)
    assert status.sweeping is True
    assert status.counts == {
        "done": 2,
        "diverged": 1,
        "degenerate": 1,
        "hopeless": 0,
        "failed": 0,
        "running": 4,
        "pending": 4,
    }
    assert list(status.optimizers.items())[:3] == [("sgd", (2, 2)), ("sgdw", (2, 2)), ("signum", (0, 2))]
    assert status.trained == 1  # a quarter of each of four runs
    assert status.seconds == 60
    assert status.left == 60 * (2 + 4)  # half of four runs in the stack, and four pending runs
    (stack,) = status.stacks
    assert (stack.id, stack.size, stack.model, stack.data) == (2, 4, "mlp", "digits")
    assert (stack.epoch, stack.epochs, stack.checkpoint) == (2, 4, 1)
    assert stack.updated == datetime(2030, 1, 1, 0, 1, tzinfo=UTC)
    shown = text(status)
    for part in (
        "a sweep is running",
        "4 running, 4 pending",
        "60 runs/h in session 2; about 6 min left",
        "In training",
    ):
        assert part in shown
    assert "2 of 4           1  mlp on digits  5 s ago" in shown
    assert "To continue" not in shown


def test_a_killed_sweep_continues_from_its_checkpoint(half: Path) -> None:
    FileLock(half / LOCK).acquire().lock.release()
    status = read_status(half)
    assert status.sweeping is False
    assert status.counts["running"] == 0
    assert status.counts["pending"] == 8
    assert status.left == 60 * (3 + 4)  # from epoch 1 on
    shown = text(status)
    assert "Stopped in the middle" in shown
    assert "To continue: the [command]\n" in shown


def test_reading_the_status_releases_the_lock(half: Path, small_grid: Grid) -> None:
    with Store(half, small_grid):
        assert read_status(half).sweeping is True  # the lock of this process counts too
    assert read_status(half).sweeping is False
    with Store(half, small_grid):
        pass


def test_a_lock_that_may_not_be_tried(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (half / LOCK).touch()

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    status = read_status(half)
    assert status.sweeping is None
    assert status.counts["running"] == 4
    assert "unknown whether a sweep is running" in text(status)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(half: Path) -> None:
    (half / LOCK).touch(0o400)
    (half / FILE).chmod(0o400)
    half.chmod(0o500)
    assert read_status(half).sweeping is None


def test_a_sweep_that_still_measures(small_grid: Grid, tmp_path: Path) -> None:
    with Store(tmp_path, small_grid):
        status = read_status(tmp_path)
    assert (status.session, status.left, status.engine, status.trained, status.seconds) == (None, None, None, 0, 0)
    assert status.counts["pending"] == 12
    assert "a sweep measures speeds before it starts" in text(status)


@pytest.mark.parametrize("trained", ["begun_epoch = 2, epoch = 2", f"updated = '{START}'"])
def test_a_session_that_has_trained_nothing_yet_has_no_rate(half: Path, trained: str) -> None:
    alter(half, f"UPDATE stacks SET {trained} WHERE id = 2")
    status = read_status(half)
    assert status.left is None
    assert "… runs/min in session 2; time left still unknown" in text(status)


def test_runs_in_new_stacks_have_no_progress(half: Path) -> None:
    """As after a stack that did not fit in memory."""
    alter(
        half,
        "INSERT INTO stacks (id, size) VALUES (4, 2), (5, 2)",
        "UPDATE runs SET stack = 4 + position % 2, status = 'pending' WHERE stack = 2",
        "DELETE FROM stacks WHERE id = 2",
    )
    status = read_status(half)
    assert (status.trained, status.seconds, status.left, status.stacks) == (0, 0.0, None, ())


def test_clocks_that_differ_are_no_error(half: Path) -> None:
    alter(half, f"UPDATE stacks SET updated = '{LATER.replace('2030', '2031')}' WHERE id = 2")
    assert " 0 s ago" in text(read_status(half))
    alter(half, f"UPDATE stacks SET updated = '{LATER.replace('2030', '2029')}' WHERE id = 2")
    assert read_status(half).left is None


def test_a_real_sweep_in_the_middle(
    run_sweep: Callable[..., int], small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = work.train_stack, []

    def observed(*args: Any) -> Any:
        for message in real(*args):
            yield message
            if isinstance(message, Evaluation) and message.epoch == 2:
                seen.append(read_status(tmp_path))
                if len(seen) == 2:
                    raise KeyboardInterrupt

    monkeypatch.setattr("ncollapse.train.engine.this_machine.train_stack", observed)
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path, stack=6)
    first, second = seen
    assert (first.sweeping, first.finished, first.counts["running"], first.trained) == (True, 0, 6, 3)
    assert (second.sweeping, second.finished, second.counts["running"], second.trained) == (True, 6, 6, 9)
    assert second.left == pytest.approx(second.seconds * 3 / 9)
    after = read_status(tmp_path)
    assert (after.sweeping, after.finished, after.counts["pending"]) == (False, 6, 6)
    assert after.engine is not None
    assert "mlp on digits, batches of 128: stacks of up to 6 runs in " in text(after)


def test_the_plan_is_shown_without_importing_torch(folder: Path) -> None:
    engine = """{"engine": "ray", "stack": "auto", "workers": 3, "threads": 1, "measured": [], "stacks": [
        {"model": "mlp", "data": "digits", "limit": null, "batch_size": 128, OTHERS, "size": 32,
         "steps_per_second": 9000.0},
        {"model": "cnn", "data": "mnist", "limit": 100, "batch_size": 32, OTHERS, "size": 1,
         "steps_per_second": null}]}"""
    others = '"width": null, "precision": "fp32", "augment": "none", "layers": "head", "muon": false'
    engine = engine.replace("OTHERS", others)
    alter(folder, f"INSERT OR REPLACE INTO meta VALUES ('engine', '{engine}')")
    code = "import sys; from ncollapse.train.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "status", str(folder)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    first, mlp, cnn = shown.stdout.split("Engine ", 1)[1].splitlines()[:3]
    assert first == "ray"
    assert mlp.startswith("  mlp on digits, batches of 128: stacks of up to 32 runs in 3 processes with one thread")
    assert mlp.endswith(" (measured: 9,000 training steps/s)")
    assert cnn.endswith("first 100 samples: one run at a time in 3 processes with one thread")


def test_it_fits_in_80_columns(half: Path) -> None:
    alter(
        half,
        "UPDATE stacks SET id = 1234, epoch = 1000, checkpoint = '1234-1000.pt', checkpoint_epoch = 1000 WHERE id = 2",
    )
    alter(
        half, "UPDATE runs SET stack = 1234, epochs = 2000, model = 'resnet9', data = 'fashion-mnist' WHERE stack = 2"
    )
    shown = text(read_status(half))
    assert max(map(len, shown.splitlines())) <= 80
    assert "1000 of 2000        1000  resnet9 on fashion-mnist" in shown


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results in"):
        read_status(tmp_path)


def test_the_command(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["status", str(swept)])
    assert "12 of 12 runs finished: 12 done" in capsys.readouterr().out


def test_it_is_json_for_other_programs(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["status", str(half), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["finished"], told["counts"]["pending"]) == (12, 4, 8)
    assert (told["started"], told["stacks"][0]["checkpoint"]) == ("2030-01-01T00:00:00+00:00", 1)


def test_it_is_watched_until_the_sweep_ends(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    pauses: list[float] = []
    with sweeping(half), monkeypatch.context() as patch:
        real = read_status

        def read(folder: Path) -> SweepStatus:
            return dataclasses.replace(real(folder), sweeping=len(pauses) < 2)

        patch.setattr("ncollapse.train.commands.status.read_status", read)
        patch.setattr("time.sleep", pauses.append)
        watch_status(half, console)
    assert pauses == [2.0, 2.0]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("a sweep is running") == 2
    assert "no sweep is running" in shown
