"""No finished run is ever lost: sweeps that are killed at a hundred points end like the undisturbed one."""

import contextlib
import multiprocessing
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

import crashes
from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE
from sweep_results import assert_same

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason=f"no forks on {sys.platform}"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    crashes.finish(folder)
    return folder


def assert_as_undisturbed(undisturbed: Path, out: Path) -> None:
    assert_same(undisturbed, out)
    assert not list((out / "checkpoints").iterdir())
    assert sorted(path.name for path in (out / "weights").iterdir()) == sorted(f"{i}.pt" for i in load_runs(out).id)
    for run in load_runs(out).id[::5]:
        mine, theirs = (torch.load(f / "weights" / f"{run}.pt")["state_dict"] for f in (out, undisturbed))
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, equal_nan=True)


def assert_finished_as_undisturbed(undisturbed: Path, out: Path) -> None:
    """The store opens, and its finished runs have the metrics of the undisturbed one."""
    try:
        runs = load_runs(out)
    except NoResultsError:  # killed before its first transaction was committed
        assert not list((out / "weights").glob("*"))
        return
    finished = set(runs.id[runs.status.isin(["done", "diverged", "degenerate"])])
    mine, theirs = (
        frame[frame.run.isin(finished)].reset_index(drop=True) for frame in map(load_metrics, (out, undisturbed))
    )
    assert mine.equals(theirs)


def test_the_sweep_has_everything_that_could_be_lost(undisturbed: Path) -> None:
    runs = load_runs(undisturbed)
    assert runs.status.value_counts().to_dict() == {"done": 12, "diverged": 2}
    assert runs["stack"].nunique() == 2


@pytest.mark.parametrize("part", range(5))
def test_killed_at_every_kind_of_point(part: int, undisturbed: Path, tmp_path: Path) -> None:
    """Before and after statements, renames, deletions and syncs; twice in a row where it resumes."""
    count = crashes.chances(tmp_path / "whole")
    assert count > 200
    chosen = random.Random(part)
    for trial in range(10):
        out = tmp_path / "cut"
        for _ in range(1 + trial % 2):
            process = crashes.start(out, die_at=chosen.randrange(1, count))
            process.join()
            assert process.exitcode in (-9, 0)  # 0: a resumed sweep passes fewer points
            assert_finished_as_undisturbed(undisturbed, out)
        crashes.finish(out)
        assert_as_undisturbed(undisturbed, out)
        shutil.rmtree(out)


def test_killed_and_a_file_damaged(undisturbed: Path, tmp_path: Path) -> None:
    """A flipped bit in what a killed sweep has left is refused or harmless, never another number."""
    count = crashes.chances(tmp_path / "whole")
    chosen, seen = random.Random(7), set()
    for trial in range(5):
        out = tmp_path / "cut"
        crashes.start(out, die_at=chosen.randrange(count // 3, count)).join()
        assert_finished_as_undisturbed(undisturbed, out)
        kept = Path(shutil.copytree(out, tmp_path / "kept"))
        checkpoints = sorted(out.glob("checkpoints/*.pt"))
        victim = checkpoints[0] if trial % 2 and checkpoints else out / FILE
        content = bytearray(victim.read_bytes())
        for bit in chosen.sample(range(8 * len(content)), 1 if trial % 2 else 40):
            content[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(content)
        damaged = _problems(out)
        process = crashes.start(out)
        process.join()
        if process.exitcode:  # refused, or left: what can be read goes on in another folder
            assert damaged
            with contextlib.suppress(UserError):
                salvage_folder(out, tmp_path / "salvaged")
                assert_finished_as_undisturbed(undisturbed, tmp_path / "salvaged")
        elif not damaged or victim.parent.name == "checkpoints":
            assert_same(undisturbed, out)
            seen.add(victim.parent.name)
        crashes.finish(kept)
        assert_as_undisturbed(undisturbed, kept)
        for folder in (out, kept, tmp_path / "salvaged"):
            shutil.rmtree(folder, ignore_errors=True)
    assert "checkpoints" in seen


def _problems(out: Path) -> list[str]:
    try:
        return [finding.problem for finding in inspect_folder(out) if finding.problem]
    except UserError as error:
        return [str(error)]


@pytest.mark.parametrize("part", range(5))
def test_killed_at_any_instant(part: int, undisturbed: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    crashes.finish(tmp_path / "whole")
    duration = time.monotonic() - started
    chosen = random.Random(100 + part)
    killed = 0
    for _ in range(10):
        out = tmp_path / "cut"
        process = crashes.start(out)
        process.join(chosen.uniform(0, duration))
        process.kill()
        process.join()
        killed += process.exitcode == -9
        assert_finished_as_undisturbed(undisturbed, out)
        crashes.finish(out)
        assert_as_undisturbed(undisturbed, out)
        shutil.rmtree(out)
    assert killed
