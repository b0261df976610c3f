"""Other programs at the same folder: whoever reads it does not end a sweep, and whoever looks does not keep one out."""

import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from filelock import FileLock

from ncollapse.train.engine import messages
from ncollapse.train.engine.messages import Finished, Message
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results import journal, ownership, schema, transactions
from ncollapse.train.results.ownership import LOCK
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.record import Evaluation
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store
from sweep_results import assert_same


@pytest.fixture(params=["write-ahead", "rollback"])
def local(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the results lie on a file system of this machine, which decides about the journal."""
    monkeypatch.setattr(transactions, "begin_journal", lambda connection, folder: _begin(connection, is_local))
    is_local: bool = request.param == "write-ahead"
    return is_local


def _begin(connection: sqlite3.Connection, is_local: bool) -> None:
    connection.execute(f"PRAGMA journal_mode = {'WAL' if is_local else 'DELETE'}")


def test_a_reader_with_an_open_transaction_does_not_hold_up_the_training(
    local: bool, swept: Path, small_grid: Grid, run_sweep: Callable[..., int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As a database browser, or a report that is suspended, from the first evaluation to the last message."""
    real, counts = messages.train_stack, []
    with Store(tmp_path, small_grid):
        pass
    reader = sqlite3.connect(tmp_path / FILE, isolation_level=None)

    def observed(*args: Any) -> Iterator[Message]:
        for message in real(*args):
            if isinstance(message, Evaluation) and message.epoch == 0:
                reader.execute("BEGIN")
            counts.append(reader.execute("SELECT count(*) FROM metrics").fetchone()[0])
            if isinstance(message, Finished):
                reader.execute("COMMIT")
            yield message

    monkeypatch.setattr("ncollapse.train.engine.this_machine.train_stack", observed)
    assert run_sweep(small_grid, tmp_path, stack=12) == 12
    assert set(counts) == {0}  # it has seen nothing of what was trained meanwhile
    reader.close()
    assert_same(swept, tmp_path)


def test_a_database_that_another_program_writes_is_waited_for(
    swept: Path, small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(swept / FILE, tmp_path)
    texts: list[str] = []
    said = threading.Event()
    other = sqlite3.connect(tmp_path / FILE, check_same_thread=False, isolation_level=None)
    with Store(tmp_path, small_grid, lambda text: (texts.append(text), said.set())) as store:  # type: ignore[arg-type, return-value]
        store.begin_session("again", {})
        other.execute("BEGIN IMMEDIATE")
        release = threading.Thread(target=lambda: (said.wait(60), other.execute("ROLLBACK")))
        release.start()
        assert store.begin_session("again", {}) == 3
        release.join()
        assert len(texts) == 1
        assert "another program holds" in texts[0]
        monkeypatch.setattr(transactions, "PATIENCE", 0.0)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="another program holds the database: close what reads it"):
            store.begin_session("again", {})
        other.close()
        assert store.begin_session("again", {}) == 4


def test_what_is_buffered_is_written_in_order_or_not_at_all(small_grid: Grid, tmp_path: Path) -> None:
    """A checkpoint's file outlasts the newer one until that is in the database; a stopped sweep says what is lost."""
    texts: list[str] = []

    def files() -> list[str]:
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    with Store(tmp_path, small_grid) as store:
        (number,) = store.set_plan([small_grid.runs])
        (stack,) = store.stacks()
        store.save_checkpoint(stack, 1, b"one")
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)

    def stopped() -> None:
        with Store(tmp_path, small_grid, texts.append) as store:
            (stack,) = store.stacks()
            other.execute("BEGIN IMMEDIATE")
            store.save_checkpoint(stack, 2, b"two")
            store.save_checkpoint(stack, 3, b"three")
            assert files() == [f"{number}-{epoch}.pt" for epoch in (1, 2, 3)]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert texts[-1].startswith("2 changes could not be written")
    other.execute("ROLLBACK")
    with Store(tmp_path, small_grid) as store:
        assert store.stack(number).epoch == 1
        assert files() == [f"{number}-1.pt"]
    other.close()


def test_a_full_buffer_waits(small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "MOST_BUFFERED", 2)
    monkeypatch.setattr(transactions, "PATIENCE", 0.0)
    with Store(tmp_path, small_grid) as store:
        store.set_plan([small_grid.runs])
        (stack,) = store.stacks()
        other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        monkeypatch.setattr(transactions, "PATIENCE", 1e9)
        other.execute("BEGIN IMMEDIATE")
        for epoch in (1, 2):
            store.save_checkpoint(stack, epoch, b"")
        monkeypatch.setattr(transactions, "PATIENCE", 0.0)
        with pytest.raises(UserError, match="another program holds the database"):
            store.save_checkpoint(stack, 3, b"")
        other.close()


def test_afterwards_the_database_is_one_file(small_grid: Grid, tmp_path: Path) -> None:
    with Store(tmp_path, small_grid) as store:
        store.begin_session("", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, FILE]
    assert len(load_runs(tmp_path)) == 12


def test_a_database_is_read_while_a_sweep_writes(small_grid: Grid, tmp_path: Path) -> None:
    with Store(tmp_path, small_grid) as store:
        store.begin_session("", {})
        store._db.execute("BEGIN EXCLUSIVE")
        assert load_metrics(tmp_path).empty
        store._db.execute("ROLLBACK")


def test_a_lock_that_is_held_for_an_instant_keeps_no_sweep_out(
    small_grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ncollapse status` holds it."""
    monkeypatch.setattr(ownership, "_SECONDS", 60.0)
    with FileLock(tmp_path / LOCK):
        started = threading.Event()
        opened: list[Store] = []

        def start() -> None:
            started.set()
            with Store(tmp_path, small_grid) as store:
                opened.append(store)

        sweep = threading.Thread(target=start)
        sweep.start()
        started.wait()
    sweep.join()
    assert opened


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/home/me/results", True),
        ("/shared/results", False),
        ("/shared/scratch/results", True),
        ("/strange/results", False),
        ("/cloud", False),
        ("/sharedness", True),
    ],
)
def test_network_file_systems_have_no_write_ahead_log(
    folder: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def partition(mountpoint: str, fstype: str, opts: str = "rw") -> SimpleNamespace:
        return SimpleNamespace(mountpoint=mountpoint, fstype=fstype, opts=opts)

    mounted = [
        partition("/", "rootfs"),
        partition("/", "ext4"),
        partition("/shared", "nfs4"),
        partition("/shared/scratch", "xfs"),
        partition("/strange", "fuse.something"),
        partition("/cloud", "NTFS", "rw,remote"),
    ]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounted)
    assert journal.is_local(Path(folder)) is expected


def test_a_database_whose_log_is_gone_is_read_where_none_can_be_made(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(swept / FILE, tmp_path)
    other = sqlite3.connect(tmp_path / FILE)
    other.execute("PRAGMA journal_mode = WAL")
    other.close()
    real = schema._connect

    def connect(uri: str) -> sqlite3.Connection:
        if "immutable" in uri:
            return real(uri)
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        return mock.Mock(**{"execute.side_effect": error})  # type: ignore[return-value]

    monkeypatch.setattr(schema, "_connect", connect)
    assert load_runs(tmp_path).equals(load_runs(swept))
    (tmp_path / f"{FILE}-wal").touch()  # somebody writes
    with pytest.raises(UserError, match="unable to open"):
        load_runs(tmp_path)
