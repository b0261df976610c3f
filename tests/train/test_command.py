"""The command on other terminals and in other environments: encodings, closed pipes, notebooks, missing libraries."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ncollapse.train.results.schema import FILE

COMMAND = [sys.executable, "-m", "ncollapse.train"]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *args], env=os.environ | env, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_greek_letters_loses_nothing(encoding: str, swept: Path, tmp_path: Path) -> None:
    shutil.copy(swept / FILE, tmp_path)
    done = run("report", str(tmp_path), PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "β" in (tmp_path / "report.html").read_text("utf-8")
    assert run("run", "--help", PYTHONIOENCODING=encoding).returncode == 0


def test_the_backend_of_a_notebook_does_not_reach_the_figures(swept: Path, tmp_path: Path) -> None:
    shutil.copy(swept / FILE, tmp_path)
    done = run("report", str(tmp_path), MPLBACKEND="module://backend_that_is_not_there")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_no_color_is_heeded_on_a_terminal() -> None:
    def shown(**env: str) -> bytes:
        ours, theirs = os.openpty()
        with os.fdopen(ours, "rb", 0) as terminal:
            process = subprocess.Popen(
                [*COMMAND, "doctor", "--help"], env=os.environ | {"TERM": "xterm"} | env, stdout=theirs
            )
            os.close(theirs)
            text = b""
            with contextlib.suppress(OSError):  # EIO, at the end on Linux
                while part := terminal.read(4096):
                    text += part
            assert process.wait() == 0
        return text

    assert b"\x1b[" in shown(NO_COLOR="")
    assert b"\x1b[" not in shown(NO_COLOR="1")


def test_a_closed_pipe_is_no_traceback() -> None:
    with subprocess.Popen([*COMMAND, "sweep", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Error" not in process.stderr.read()


def test_a_missing_library_is_named_with_what_installs_it() -> None:
    code = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'tyro' else find(name, *rest); "
        "from ncollapse.train.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, "ncollapse: the command needs tyro: pip install 'ncollapse[train]'\n",
    )  # fmt: skip
