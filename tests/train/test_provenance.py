"""Provenance: the commit is that of the source, never of another repository."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ncollapse.train.results import provenance

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@needs_git
def test_the_commit_is_that_of_the_source() -> None:
    commit = provenance.describe_machine("cpu")["commit"]
    folder = Path(provenance.__file__).parent
    head = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if head:
        assert re.fullmatch(head[:12] + "(-dirty)?", commit)
    else:
        assert commit is None  # a source archive


@needs_git
def test_a_copy_inside_another_repository_has_no_commit(tmp_path: Path) -> None:
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    shutil.copy(provenance.__file__, tmp_path)
    code = "import provenance; print(provenance._commit())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_versions_are_none_for_missing_packages() -> None:
    versions = provenance.describe_machine("cpu")["versions"]
    assert {"python", "ncollapse", "torch", "numpy"} <= versions.keys()
    assert provenance.package_version("no-such-package") is None
