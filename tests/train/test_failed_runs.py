"""Runs whose own code has raised an error: recorded as failed, with the traceback, and never counted as collapsed."""

import io
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from ncollapse.train import load_runs
from ncollapse.train.commands.rerun import chosen_runs
from ncollapse.train.commands.status import print_status, read_status
from ncollapse.train.config import RunConfig
from ncollapse.train.errors import DamageError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.report.inventory import what_was_run
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.merging import merge_folders
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store
from planted import plant

GOOD, BAD = (RunConfig(seed=seed, epochs=2) for seed in range(2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plant(tmp_path / "results", [GOOD, BAD], failed=[BAD])
    return tmp_path / "results"


def problems(folder: Path) -> list[str]:
    return [f"{found.what}: {found.problem}" for found in inspect_folder(folder) if found.problem]


def test_they_have_ended_and_do_not_count(folder: Path) -> None:
    runs = load_runs(folder)
    assert runs.status.tolist() == ["done", "failed"]
    selection = Selection(threshold=0.0)
    assert selection.eligible(runs).id.tolist() == [GOOD.id]
    assert what_was_run(runs, selection)[["done", "failed", "unfinished", "reached"]].iloc[0].tolist() == [1, 1, 0, 1]
    status, out = read_status(folder), io.StringIO()
    print_status(status, Console(file=out, width=80))
    assert (status.finished, status.counts["failed"]) == (2, 1)
    assert "2 of 2 runs finished: 1 done, 1 failed" in out.getvalue()
    assert "failures/RUN.txt" in out.getvalue()
    assert list(chosen_runs(folder, "status=failed")) == [BAD]


def test_the_folder_has_the_traceback(folder: Path) -> None:
    text = (folder / "failures" / f"{BAD.id}.txt").read_text("utf-8")
    assert text == "mine.py, line 3: ValueError: no\n\nTraceback: …"
    assert problems(folder) == []
    (folder / "failures" / "deadbeef0000.txt").write_bytes(b"")
    (folder / "failures" / f"{BAD.id}.txt").write_bytes(b"\xff")
    assert [one.partition(":")[0] for one in problems(folder)] == [
        f"failures/{name}.txt" for name in sorted((BAD.id, "deadbeef0000"))
    ]


def test_only_runs_of_the_stack_fail_and_only_once(tmp_path: Path) -> None:
    with Store(tmp_path, Grid("one", (GOOD, BAD))) as store:
        store.set_plan([[GOOD], [BAD]])
        stack = next(one for one in store.stacks() if one.runs == (BAD,))
        with pytest.raises(ValueError, match="is not in stack"):
            store.fail(stack, "../../x", "no", "")
        store.fail(stack, BAD.id, "first", "x" * 10**6 + "\udc80")
        store.fail(stack, BAD.id, "second", "")
        assert store.finished() == {BAD.id: "failed"}
    text = (tmp_path / "failures" / f"{BAD.id}.txt").read_text("utf-8")
    assert text.startswith("first")
    assert len(text) < 200_000
    assert problems(tmp_path) == []


def test_a_run_that_is_reset_has_no_traceback(folder: Path) -> None:
    with Store(folder, Grid("again", (BAD,))) as store:
        store.reset([BAD.id])
    assert load_runs(folder).status.tolist() == ["done", "pending"]
    assert not list((folder / "failures").iterdir())


def test_a_link_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "failures").rename(tmp_path / "elsewhere")
    (folder / "failures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="failures is a symbolic link"):
        Store(folder, Grid("again", (BAD,)))


def test_tracebacks_beside_no_database_are_damage(folder: Path) -> None:
    (folder / FILE).unlink()
    with pytest.raises(DamageError, match="failures/ hold files of runs"):
        Store(folder, Grid("again", (BAD,)))


def test_they_are_merged_and_salvaged(folder: Path, tmp_path: Path) -> None:
    plant(tmp_path / "other", [RunConfig(seed=2, epochs=2)])
    merge_folders([folder, tmp_path / "other"], tmp_path / "merged")
    salvage_folder(folder, tmp_path / "copy")
    for copy in (tmp_path / "merged", tmp_path / "copy"):
        assert [path.name for path in (copy / "failures").iterdir()] == [f"{BAD.id}.txt"]
        assert load_runs(copy).status.tolist()[:2] == ["done", "failed"]
        assert problems(copy) == []


def test_hopeless_runs_that_ended_early_are_whole(folder: Path) -> None:
    with closing(sqlite3.connect(folder / FILE)) as connection, connection:
        connection.execute("UPDATE runs SET status = 'hopeless' WHERE status = 'failed'")
    assert problems(folder) == []
