"""Limits of containers and batch jobs: control groups of both versions, and a real one where it can be made."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ncollapse.train import limits

GB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 GB, 60 of them free, and 16 processors; its control groups are in the folder."""
    monkeypatch.setattr(limits, "_MOUNTED", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OWN", tmp_path / "own")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=60 * GB, total=64 * GB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return tmp_path


def group(machine: Path, folder: str, **files: object) -> None:
    path = machine / "cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(f"{content}\n")


def found(machine: Path, own: str) -> tuple[float, float | None, int]:
    (machine / "own").write_text(own)
    limit = limits.memory_limit()
    return limits.available_memory() / GB, limit and limit / GB, limits.processors()


def test_no_limits(machine: Path) -> None:
    assert found(machine, "") == (60.0, None, 16)
    group(machine, "", memory__max="max", memory__current=GB, cpu__max="max 100000")
    assert found(machine, "0::/\n") == (60.0, None, 16)


def test_a_container_of_version_2(machine: Path) -> None:
    group(
        machine, "", memory__max=3 * GB // 2, memory__current=GB,
        memory__stat=f"anon 5\ninactive_file {GB // 2}\nactive_file 7", cpu__max="250000 100000",
    )  # fmt: skip
    assert found(machine, "0::/\n") == (1.0, 1.5, 2)


def test_the_tightest_group_above_counts(machine: Path) -> None:
    group(machine, "job/step/task", memory__max="max", memory__current=GB, cpu__max="max 100000")
    group(
        machine, "job/step", memory__high=8 * GB, memory__current=2 * GB, memory__max=20 * GB, cpu__max="800000 100000"
    )
    group(machine, "job", memory__max=10 * GB, memory__current=9 * GB, cpu__max="400000 100000")
    assert found(machine, "0::/job/step/task\n") == (1.0, 8.0, 4)


@pytest.mark.parametrize("inside", [False, True], ids=["the machine's path", "mounted at the root"])
def test_a_container_of_version_1(machine: Path, inside: bool) -> None:
    place = "" if inside else "/docker/abc"
    group(
        machine, f"memory{place}", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {GB // 4}",
    )  # fmt: skip
    group(
        machine, "memory", **({} if inside else {"memory__limit_in_bytes": 2**63 - 4096, "memory__usage_in_bytes": GB})
    )
    group(machine, f"cpu,cpuacct{place}", cpu__cfs_quota_us=50_000, cpu__cfs_period_us=100_000)
    own = "11:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc\n"
    assert found(machine, own) == (1.25, 2.0, 1)


def test_no_quota_in_version_1(machine: Path) -> None:
    group(machine, "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert found(machine, "1:cpu:/\n")[2] == 16


@pytest.mark.parametrize("content", ["", "nonsense", "-5", "9" * 30])
def test_files_that_make_no_sense_limit_nothing(machine: Path, content: str) -> None:
    group(machine, "", memory__max=content, memory__current=content, cpu__max=content)
    assert found(machine, "0::/\nnonsense\n0::/../..\n")[2] == 16
    assert limits.memory_limit() is None


def test_more_is_used_than_is_allowed(machine: Path) -> None:
    group(machine, "", memory__max=GB, memory__current=2 * GB)
    assert found(machine, "0::/\n")[0] == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits all private memory")
def test_a_process_that_limits_itself_gets_an_error_instead_of_a_signal() -> None:
    code = (
        "from ncollapse.train.limits import limit_own_memory\n"
        "undo = limit_own_memory(50 * 2**20)\n"
        "small = bytearray(20 * 2**20)\n"
        "try:\n"
        "    large = bytearray(100 * 2**20)\n"
        "except MemoryError:\n"
        "    undo()\n"
        "    large = bytearray(100 * 2**20)\n"
        "    print('refused, then allowed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused, then allowed\n"


@contextlib.contextmanager
def real_group(limit: int) -> Iterator[Path]:
    """A control group that limits memory; the test is skipped where none can be made."""
    parents = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    for parent, name in zip(parents, ("memory.limit_in_bytes", "memory.max"), strict=True):
        path = parent / f"ncollapse-test-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            (path / name).write_text(str(limit))
            yield path
            return
        except OSError:
            continue
        finally:
            path.rmdir()
    pytest.skip("no control group can be made here")


#: Trains 32 runs, whose weights and their states alone take 0.7 GB, in one stack if there is room.
_SWEEP = """
import sys
from pathlib import Path
import torch
from rich.console import Console
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import load
from ncollapse.train.grid import Grid
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.scheduler import sweep
torch.set_num_threads(1)
load_data = lambda name, device: load(name, device, data_dir=None, download=False)
grid = Grid("wide", tuple(RunConfig(width=1024, limit=128, epochs=1, seed=seed) for seed in range(32)))
print(sweep(grid, Path(sys.argv[1]), load_data, torch.device("cpu"), Options(stack=32, workers=1), Console(quiet=True)))
"""


def test_a_sweep_in_a_container_fits_into_its_memory(tmp_path: Path) -> None:
    with real_group(700 * 2**20) as path:  # the libraries alone take 400
        done = subprocess.run(
            [sys.executable, "-c", _SWEEP, str(tmp_path)], capture_output=True, text=True, check=False,
            preexec_fn=lambda: (path / "cgroup.procs").write_text(str(os.getpid())),
        )  # fmt: skip
    assert done.returncode != -signal.SIGKILL
    assert (done.returncode, done.stdout) == (0, "32\n"), done.stderr
