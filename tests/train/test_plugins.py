"""Names of code of the user's: what they stand for, its version, and how it reaches other processes."""

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ncollapse.train.errors import OwnCodeError, UserError, blamed
from ncollapse.train.plugins import Plugins

MINE = """
    import helpers_of_mine
    from torch import nn

    NUMBER = 3

    class Net(nn.Linear):
        def __init__(self, depth=helpers_of_mine.DEPTH):
            super().__init__(depth, 2)

    def broken():
        raise ValueError("no\\nsecond line")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "helpers_of_mine.py").write_text("DEPTH = 5\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "helpers_of_mine", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_names_stand_for_files_modules_and_what_was_given(folder: Path) -> None:
    plugins = Plugins(folder, {"model": {"net": dict}})
    assert plugins.find("model", "net") is dict
    assert plugins.find("model", "mine.py:Net")().in_features == 5
    assert plugins.find("model", "mine.py:nn.Linear").__name__ == "Linear"
    assert plugins.find("optimizer", "torch.optim:NAdam").__name__ == "NAdam"
    assert plugins.where("model", "mine.py:Net") == "mine.py, line 7"
    assert plugins.where("model", "net") == "net"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:Nett", r"model mine.py:Nett: mine.py has no 'Nett'; it has Net, broken"),
        ("mine.py:NUMBER", "NUMBER is a int, not a function or a class"),
        ("other.py:Net", "no file other.py in "),
        ("no_such_package.x:Net", "there is no module 'no_such_package'; is its package installed"),
        ("net", "model 'net' was given in Python: train these runs from there"),
    ],
)
def test_a_wrong_name_is_explained(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Plugins(folder).find("model", name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "line 1: invalid syntax"),
        ("\nimport no_such_package_2\n", "line 2: ModuleNotFoundError: No module named"),
        ("x = 1\n\nx / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("\0", "no Python|null bytes"),
        ("#" * 2_000_000, "more than 1,048,576 bytes"),
        (b"\xff\xfe", "text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "bad.py").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=rf"bad\.py.*({message})"):
        Plugins(tmp_path).find("model", "bad.py:f")


def test_a_version_is_that_of_the_file_and_of_what_it_imports_beside_it(folder: Path) -> None:
    def code() -> str:
        sys.modules.pop("helpers_of_mine", None)
        return Plugins(folder).code_of({"model": "mine.py:Net", "optimizer": "torch.optim:NAdam"})

    first = code()
    assert first == code()
    assert first.startswith("mine.py=")
    (folder / "helpers_of_mine.py").write_text("DEPTH = 6\n")
    second = code()
    (folder / "mine.py").write_text((folder / "mine.py").read_text() + "\n# changed\n")
    assert len({first, second, code()}) == 3


def test_a_package_has_its_version(folder: Path) -> None:
    (key, version), *more = Plugins(folder).versions("loss", "sklearn.metrics:accuracy_score")
    assert (key, more) == ("scikit-learn", [])
    assert version.version[0].isdigit()


def test_given_code_is_told_apart_by_its_source() -> None:
    def first() -> int:
        return 1

    def second() -> int:
        return 2

    versions = {Plugins(given={"loss": {"mine": each}}).code_of({"loss": "mine"}) for each in (first, second, first)}
    assert len(versions) == 2


def test_names_of_ncollapse_cannot_be_given_another_meaning() -> None:
    with pytest.raises(UserError, match="optimizer 'adam' comes with ncollapse: give yours another name"):
        Plugins(given={"optimizer": {"adam": dict}})
    with pytest.raises(UserError, match="must be a function or a class; got 3"):
        Plugins(given={"loss": {"three": 3}})


def test_another_process_gets_the_code_even_where_the_file_is_not(folder: Path, tmp_path: Path) -> None:
    """As on another machine of a cluster: the process has neither the file nor the module beside it."""
    plugins = Plugins(folder, {"loss": {"half": lambda logits, labels: logits / 2}})
    plugins.find("model", "mine.py:Net")
    (tmp_path / "sent").write_bytes(pickle.dumps(plugins))
    for name in ("mine.py", "helpers_of_mine.py"):
        (folder / name).rename(folder / f"{name}.gone")
    code = (
        "import pickle, sys; plugins = pickle.load(open(sys.argv[1], 'rb'));"
        "print(plugins.find('model', 'mine.py:Net')().in_features, plugins.find('loss', 'half')(4, None))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout == "5 2.0\n"


def test_an_error_is_blamed_on_the_line_of_the_user(folder: Path) -> None:
    with pytest.raises(ValueError, match="no") as caught:
        Plugins(folder).find("model", "mine.py:broken")()
    assert blamed(caught.value) == "mine.py, line 12: ValueError: no"
    error = OwnCodeError.of("model mine.py:broken", caught.value)
    assert str(error) == "model mine.py:broken: mine.py, line 12: ValueError: no"
    assert "in broken" in error.log
