"""Versions of the user's code in a results folder: a changed one is refused with what differs, or accepted and kept."""

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ncollapse.train import load_runs
from ncollapse.train.config import RunConfig
from ncollapse.train.errors import DamageError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.plugins import CodeVersion
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.merging import merge_folders
from ncollapse.train.results.own_code import adopt_code, record_code
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.writer import Store
from planted import plant

OLD = CodeVersion("aaa", "import torch\n\ndef make(channels):\n    return 1\n")
NEW = CodeVersion("bbb", "import torch\n\ndef make(channels):\n    return \x1b[31m2\n")
NEWER = CodeVersion("ccc", "raise SystemExit\n")


def runs_of(version: str, count: int = 2, package: str = "") -> list[RunConfig]:
    code = f"mine.py={version}" + (f"; soap={package}" if package else "")
    return [RunConfig(model="mine.py:make", code=code, seed=seed, epochs=2) for seed in range(count)]


def train(folder: Path, runs: list[RunConfig], version: CodeVersion = OLD, *, accept: bool = False) -> list[RunConfig]:
    """Do what a sweep does, and return the runs as the folder has them."""
    versions = {"mine.py": version}
    adopted, _ = adopt_code(runs, versions, folder, accept)
    plant(folder, adopted)
    with Store(folder, Grid("again", tuple(adopted))) as store:
        record_code(store, versions, accept)
    return list(adopted)


def test_a_new_folder_takes_the_runs_as_they_are(tmp_path: Path) -> None:
    runs = runs_of("aaa")
    assert adopt_code(runs, {"mine.py": OLD}, tmp_path / "none", accept=False) == (tuple(runs), [])
    assert train(tmp_path, runs) == runs
    assert adopt_code(runs, {"mine.py": OLD}, tmp_path, accept=False) == (tuple(runs), [])


def test_a_changed_file_is_refused_with_the_difference(tmp_path: Path) -> None:
    train(tmp_path, runs_of("aaa"))
    with pytest.raises(UserError) as error:
        adopt_code(runs_of("bbb"), {"mine.py": NEW}, tmp_path, accept=False)
    message = str(error.value)
    assert "mine.py is not the one that its runs were made with (bbb now, aaa then)" in message
    assert r"from line 4 on: -    return 1 | +    return \x1b[31m2" in message
    assert "--accept-changes" in message
    assert "another --out" in message


def test_an_accepted_change_keeps_what_has_ended_and_goes_on(tmp_path: Path) -> None:
    train(tmp_path, runs_of("aaa"))
    adopted, notes = adopt_code(runs_of("bbb", 3), {"mine.py": NEW}, tmp_path, accept=True)
    assert [run.id for run in adopted] == [run.id for run in runs_of("aaa", 3)]
    assert len(notes) == 1
    assert "mine.py has changed since" in notes[0]
    before = load_runs(tmp_path)
    train(tmp_path, runs_of("bbb", 3), NEW, accept=True)
    after = load_runs(tmp_path)
    assert len(after) == 3
    assert after.head(2).drop(columns=["stack", "session"]).equals(before.drop(columns=["stack", "session"]))
    # From now on both count as one, and a third is compared with the last.
    for version, code in (("bbb", NEW), ("aaa", OLD)):
        assert adopt_code(runs_of(version, 3), {"mine.py": code}, tmp_path, accept=False) == (adopted, [])
    with pytest.raises(UserError, match=r"\(ccc now, bbb then\); from line 1 on: -import torch"):
        adopt_code(runs_of("ccc"), {"mine.py": NEWER}, tmp_path, accept=False)


def test_another_version_of_a_package_is_refused_too(tmp_path: Path) -> None:
    versions = {"mine.py": OLD, "soap": CodeVersion("1.0")}
    runs = runs_of("aaa", package="1.0")
    plant(tmp_path, runs)
    with Store(tmp_path, Grid("again", tuple(runs))) as store:
        record_code(store, versions, accept=False)
    versions["soap"] = CodeVersion("1.1")
    with pytest.raises(UserError, match=r"soap is not the one .* \(1\.1 now, 1\.0 then\)\. Its runs"):
        adopt_code(runs_of("aaa", package="1.1"), versions, tmp_path, accept=False)
    adopted, _ = adopt_code(runs_of("aaa", package="1.1"), versions, tmp_path, accept=True)
    assert list(adopted) == runs


def test_runs_without_the_code_are_left_as_they_are(tmp_path: Path) -> None:
    train(tmp_path, runs_of("aaa"))
    other = RunConfig(epochs=2)
    adopted, _ = adopt_code([other, *runs_of("bbb")], {"mine.py": NEW}, tmp_path, accept=True)
    assert adopted[0] is other


def test_a_long_source_is_not_kept(tmp_path: Path) -> None:
    train(tmp_path, runs_of("aaa"), dataclasses.replace(OLD, source="x" * (2**20 + 1)))
    assert (tmp_path / FILE).stat().st_size < 2**20
    with pytest.raises(UserError, match=r"\(bbb now, aaa then\)\. Its runs"):
        adopt_code(runs_of("bbb"), {"mine.py": NEW}, tmp_path, accept=False)


def test_folders_of_other_versions_are_not_merged(tmp_path: Path) -> None:
    train(tmp_path / "a", runs_of("aaa"))
    train(tmp_path / "b", runs_of("bbb"), NEW)
    with pytest.raises(UserError, match=r"made with another version of mine\.py than those of .*a \(bbb, not aaa\)"):
        merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    train(tmp_path / "d", runs_of("aaa")[:1])
    train(tmp_path / "d", runs_of("bbb"), NEW, accept=True)
    merge_folders([tmp_path / "a", tmp_path / "d"], tmp_path / "c")
    assert adopt_code(runs_of("bbb"), {"mine.py": NEW}, tmp_path / "c", accept=False)[0] == tuple(runs_of("aaa"))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1, "source": "", "accepted": []}', json.dumps({"version": "a"})]
)
def test_a_damaged_entry_is_one_sentence(tmp_path: Path, text: str) -> None:
    train(tmp_path / "a", runs_of("aaa"))
    with closing(sqlite3.connect(tmp_path / "a" / FILE)) as connection, connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'code mine.py'", (text,))
    with pytest.raises(DamageError, match=r"what it knows of 'mine\.py'"):
        adopt_code(runs_of("aaa"), {"mine.py": OLD}, tmp_path / "a", accept=False)
    assert [found.what for found in inspect_folder(tmp_path / "a") if found.problem] == ["'code mine.py'"]
    salvage_folder(tmp_path / "a", tmp_path / "b")
    assert not [found for found in inspect_folder(tmp_path / "b") if found.problem]
