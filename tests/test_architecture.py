"""The rules of the house: imports run one way and in no circle, names are unique, files fit in one head."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"nc": "ncollapse", "kernels": "ncollapse.kernels", "train": "ncollapse.train"}
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((FOLDERS[folder], *(part for part in parts if part != "__init__")))


MODULES = {module_name(path): path for path in SOURCES}


def imported(path: Path) -> set[str]:
    """The names that a file imports, within functions and for type checkers too: `package.module.name`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def public(path: Path, *kinds: type[ast.stmt]) -> list[str]:
    """The public names that a file defines at its top level."""
    return [n.name for n in ast.parse(path.read_text()).body if isinstance(n, kinds) and not n.name.startswith("_")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    floors = ["kernels", "nc", "train"]
    above = [FOLDERS[f] for f in floors[floors.index(path.relative_to(ROOT).parts[0]) + 1 :]]
    for name in imported(path):
        assert name.split(".")[0] not in ("tests", "bench", "kernels", "train", "nc")
        if name.split(".")[0] != "ncollapse":
            continue
        home = max((f for f in FOLDERS.values() if f"{name}.".startswith(f"{f}.")), key=len)
        assert home not in above, f"{path.name} imports {name}"


def test_imports_make_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = imported(path)
        # `from package import module` imports the module; a name of a package is defined in the package.
        found = {name if name in MODULES else name.rpartition(".")[0] for name in names}
        arrows[module] = (found & MODULES.keys()) - {module}
    # A package that loads its parts on first use imports nothing when it is imported.
    arrows["ncollapse"], arrows["ncollapse.train"] = set(), set()
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def test_no_module_bears_the_name_of_a_public_function() -> None:
    stems = {path.stem for path in SOURCES}
    functions = {name: path for path in SOURCES for name in public(path, ast.FunctionDef)}
    assert {name: path.name for name, path in functions.items() if name in stems} == {}


def test_no_two_public_classes_share_a_name() -> None:
    classes = Counter(name for path in SOURCES for name in public(path, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("matplotlib", ["style.py"]),
        ("ray", ["ray_cluster.py", "ray_connect.py"]),
        ("tensorboard", ["tensorboard.py"]),
    ],
)
def test_a_heavy_library_is_imported_where_it_belongs(library: str, homes: list[str]) -> None:
    users = [p.name for p in SOURCES if any(n.split(".")[0] == library for n in imported(p))]
    assert users == homes


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_fit_in_one_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_the_trainer_has_few_rooms() -> None:
    assert len([p for p in (ROOT / "train").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]) <= 19


def test_an_optimizer_is_known_by_name_in_few_files() -> None:
    sources = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".j2")]
    for name in ("lion", "signum", "muon"):
        words = [name, f"{name}w", name.capitalize(), f"{name.capitalize()}W"]
        known = [str(p.relative_to(ROOT)) for p in sources if set(words) & set(_words(p.read_text()))]
        assert len(known) <= 6, f"{name}: {', '.join(known)}"


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in text).split()


def test_every_folder_is_a_listed_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {module_name(p) for p in SOURCES if p.name == "__init__.py"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ncollapse", ("torch", "torchvision", "matplotlib", "pandas", "tyro", "sklearn", "triton")),
        (
            "from ncollapse import optim, stats, metrics",
            ("torchvision", "matplotlib", "pandas", "tyro", "sklearn", "rich"),
        ),
        (
            "import ncollapse.train.engine.scheduler",
            ("torch._dynamo", "torchvision", "matplotlib", "pandas", "ray"),
        ),
        (
            "import ncollapse.train.report.page.write, ncollapse.plot.collapse_panels, ncollapse.snapshot",
            ("torch", "torchvision", "sklearn", "scipy", "matplotlib"),
        ),
        ("import ncollapse.train.cli", ("torch", "torchvision", "matplotlib", "pandas", "sklearn")),
    ],
)
def test_import_is_quick(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


#: What a user without the extra `train` does: steps, metrics in a loop and of a model, theory.
PLAIN_USE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import torch, ncollapse as nc
from ncollapse import metrics, optim, stats
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
x, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
for name in ("SGD", "SGDW", "Signum", "SignumW", "Adam", "AdamW", "Lion", "Muon"):
    opt = getattr(optim, name)([p for p in model.parameters() if name != "Muon" or p.dim() == 2], lr=1e-3)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
result = nc.measure(model, [(x, y)], head=model[2])
assert 0 < result.nc1 < float("inf") and result.as_dict()
nc.ufm.simulate("sgd", K=3, d=4, lr=0.1, steps=3)
for name in nc.__all__:
    getattr(nc, name)
try:
    nc.plot.geometry(result)
except ModuleNotFoundError as error:
    print(error.name)
"""


def test_optimizers_and_metrics_need_torch_and_numpy_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {requirement.split(">")[0].lower() for requirement in project["optional-dependencies"]["train"]}
    absent = {name for name, homes in packages_distributions().items() if extra & {home.lower() for home in homes}}
    assert {"pandas", "sklearn", "matplotlib", "plotly", "pydantic"} <= absent
    code = PLAIN_USE.replace("ABSENT", repr(sorted(absent | {"triton"})))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert (done.stdout.strip(), done.returncode) == ("matplotlib", 0), done.stderr


@pytest.mark.parametrize("package", ["ncollapse", "ncollapse.train"])
def test_dir_lists_the_public_names(package: str) -> None:
    code = (
        f"import {package} as p; print(set(p.__all__) <= set(dir(p)), [hasattr(p, n) for n in p.__all__].count(True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split()[0] == "True"


def test_contributing_names_files_that_exist() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text().split("`")[1::2]
    paths = [word for word in words if "/" in word and not set(" *~$") & set(word)]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
