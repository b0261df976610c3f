"""The rules of the house: imports run one way, heavy libraries stay where they belong, files fit in one head."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("kernels", "nc", "train") for p in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    forbidden = {"kernels": ("nc",), "nc": ("nc.train",), "train": ()}[folder]
    allowed = {"kernels": ("nc.kernels",)}.get(folder, ())
    for name in imported(path):
        assert not name.startswith(("tests", "bench", "kernels", "train."))
        bad = any(name == f or name.startswith(f + ".") for f in forbidden)
        assert not bad or name.startswith(allowed or ("\0",)), f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [("matplotlib", ["figures.py"]), ("ray", ["cluster.py", "connect.py"]), ("tensorboard", ["tensorboard.py"])],
)
def test_a_heavy_library_is_imported_where_it_belongs(library: str, homes: list[str]) -> None:
    users = [p.name for p in SOURCES if any(n.split(".")[0] == library for n in imported(p))]
    assert users == homes


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_fit_in_one_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


def test_every_folder_is_a_listed_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.relative_to(ROOT).parent.parts) for p in SOURCES if p.name == "__init__.py"}
    assert listed == {name if name.split(".")[0] == "nc" else f"nc.{name}" for name in found}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import nc", ("torch", "torchvision", "matplotlib", "pandas", "tyro", "sklearn", "triton")),
        ("import nc.optim, nc.stats, nc.metrics", ("torchvision", "matplotlib", "pandas", "tyro", "sklearn", "rich")),
        ("import nc.optim, nc.train.engine.sweep", ("torch._dynamo", "torchvision", "matplotlib", "pandas", "ray")),
        ("import nc.train.cli", ("torch", "torchvision", "matplotlib", "pandas", "sklearn")),
    ],
)
def test_import_is_quick(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"
