"""Versions of code of the user's: equal where the code is, whatever this process has imported; else different."""

import functools
import linecache
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ncollapse.train.plugins import Plugins
from ncollapse.train.results.code_version import files_of, installed_as, of_given


def cell(text: str, *, with_source: bool) -> dict[str, Any]:
    """Run a cell of a notebook; its names."""
    main = types.ModuleType("__main__")
    name = f"<cell {hash(text)}>" if with_source else "<stdin>"
    if with_source:
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), main.__dict__)
    return main.__dict__


NET = """
def scale():
    return {number}

class Block:
    wide = {attribute}
    def __call__(self):
        return scale()

class Net:
    def __init__(self, depth=2):
        self.blocks = [Block() for _ in range(depth)]
"""


@pytest.mark.parametrize("with_source", [True, False])
def test_a_class_of_a_notebook_is_known_by_what_it_does(with_source: bool) -> None:
    def version(number: int, attribute: int) -> str:
        return of_given(cell(NET.format(number=number, attribute=attribute), with_source=with_source)["Net"]).version

    assert version(3, 4) == version(3, 4)
    assert len({version(3, 4), version(5, 4), version(3, 5)}) == 3


class Factory:
    def __init__(self, depth: int, weights: torch.Tensor | None = None) -> None:
        self.depth, self.weights = depth, weights

    def __call__(self, num_classes: int) -> int:
        return self.depth * num_classes

    def other(self) -> int:
        return 0


def closure(depth: int) -> Callable[[], int]:
    return lambda: depth


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (functools.partial(Factory, 3), functools.partial(Factory, 5)),
        (functools.partial(Factory, depth=3), functools.partial(Factory, 3)),
        (Factory(3), Factory(5)),
        (Factory(3, torch.zeros(2)), Factory(3, torch.ones(2))),
        (Factory(3).other, Factory(5).other),
        (closure(3), closure(5)),
        (Factory, closure),
        (torch.nn.Linear, torch.nn.Bilinear),
    ],
)
def test_arguments_are_part_of_a_version(first: Any, second: Any) -> None:
    assert of_given(first) == of_given(first)
    assert of_given(first).version != of_given(second).version


def test_a_value_that_holds_itself_has_a_version() -> None:
    factory = Factory(1)
    factory.weights = factory  # type: ignore[assignment]
    assert of_given(factory).version


def test_names_of_different_kinds_are_kept_apart() -> None:
    plugins = Plugins(given={"model": {"mine": Factory}, "optimizer": {"mine": closure}})
    both = plugins.code_of({"model": "mine", "optimizer": "mine"})
    assert both.startswith("model mine=")
    assert "; optimizer mine=" in both


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder in ("x", "y"):
        (tmp_path / folder / "pkg").mkdir(parents=True)
        (tmp_path / folder / "mine.py").write_text(
            "import os.path, helper_of_test\nfrom pkg.deep import f\n\ndef g():\n    return helper_of_test.NAME\n"
        )
        (tmp_path / folder / "helper_of_test.py").write_text(f"NAME = {folder!r}\n")
        (tmp_path / folder / "pkg" / "__init__.py").write_text("")
        (tmp_path / folder / "pkg" / "deep.py").write_text("from . import other\nfrom .other import f\n")
        (tmp_path / folder / "pkg" / "other.py").write_text("def f():\n    return 1\n")
        (tmp_path / folder / "unrelated.py").write_text("")
    yield tmp_path  # type: ignore[misc]
    for name in ("helper_of_test", "pkg", "pkg.deep", "pkg.other"):
        sys.modules.pop(name, None)


def test_what_a_file_imports_beside_it_is_found_in_its_text(folder: Path) -> None:
    names = files_of(folder / "x" / "mine.py", folder / "x")
    assert next(iter(names)) == "mine.py"
    assert set(names) == {"mine.py", "helper_of_test.py", "pkg/__init__.py", "pkg/deep.py", "pkg/other.py"}


def test_a_version_does_not_depend_on_what_was_imported_before(folder: Path) -> None:
    first = Plugins(folder / "x").code_of({"model": "mine.py:g"})
    assert Plugins(folder / "x").code_of({"model": "mine.py:g"}) == first
    assert Plugins(folder / "y").code_of({"model": "mine.py:g"}) != first


def test_files_of_two_folders_have_their_own_helpers(folder: Path) -> None:
    found = [Plugins(folder / name).find("model", "mine.py:g")() for name in ("x", "y", "x")]
    assert found == ["x", "y", "x"]
    (folder / "x" / "helper_of_test.py").write_text("NAME = 'changed'\n")
    assert Plugins(folder / "x").find("model", "mine.py:g")() == "changed"


def test_a_local_package_is_known_by_its_text(folder: Path) -> None:
    def versions() -> list[tuple[str, Any]]:
        return Plugins(folder / "x").versions("loss", "pkg.other:f") + Plugins(folder / "x").versions(
            "model", "pkg.deep:f"
        )

    (first, of_first), (second, of_second) = versions()
    assert (first, second) == ("pkg.other", "pkg.deep")
    (folder / "x" / "pkg" / "other.py").write_text("def f():\n    return 2\n")
    changed = dict(versions())
    assert changed[first] != of_first
    assert changed[second] != of_second


def test_an_editable_package_is_not_known_by_its_version() -> None:
    assert installed_as("sklearn") == "scikit-learn"
    assert installed_as("no_such_module") == ""
