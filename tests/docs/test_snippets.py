"""README and docs: every snippet runs, every command line is one that the command takes, every grid is a grid.

Python blocks of a document run in order, in one namespace, in a copy of examples/bring_your_own. A comment
`<!--- invisible-code-block: python … --->` holds what a reader has already: a model, data;
`<!--- skip: next if(CONDITION, reason="…") --->` leaves out a block whose package is absent.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from ncollapse.kernels.update.reference import RULES
from ncollapse.train import cli
from ncollapse.train.grid import load_grid

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "examples").glob("*.md"),
]
#: Languages of blocks that are shown and not run: output, and PTX.
SHOWN = {"text", "cpp", "ptx", "csv"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def run_grid(example: Example) -> None:
    """A grid is loaded, beside the examples' own code."""
    path = Path("grid.toml")
    path.write_text(example.parsed)
    assert load_grid(str(path)).runs


def run_shell(example: Example) -> None:
    """Shell syntax is right; each command of ours exists and takes these arguments. Nothing is trained."""
    script = example.parsed
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    for line in script.replace("\\\n", " ").splitlines():
        for words in commands(line):
            check_command(words)


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a line, without comments, redirections and what starts another program on it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;<>"):
            while words and (words[0] in ("srun", "time", "$") or re.fullmatch(r"\w+=.*", words[0])):
                words.pop(0)
            if words:
                yield words
            words = []
        else:
            words.append(word)


def check_command(words: list[str]) -> None:
    name, *rest = words
    if name == "ncollapse":
        if rest[-1] not in ("--help", "--version", "COMMAND"):
            cli.parse(rest)
    elif name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif name == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), words
    elif name == "python":
        assert (ROOT / rest[0]).is_file(), words
    elif name == "pip":
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(EXTRAS), words


SYBIL = Sybil(
    [
        PythonCodeBlockParser(),
        CodeBlockParser("toml", run_grid),
        CodeBlockParser("bash", run_shell),
        SkipParser(),
    ]
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_says_what_it_is(path: Path) -> None:
    """A block without a language would run in no test."""
    languages = re.findall(r"^ *```([^\n]*)\n.*?^ *```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert {language.split(" ")[0] for language in languages} <= {"python", "toml", "bash", *SHOWN}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples" / "bring_your_own", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(ROOT)  # for `python -m bench.…`, which a reader starts in a checkout
    torch.manual_seed(0)
    document = SYBIL.parse(path)
    document.namespace["__name__"] = "__main__"
    with mock.patch.dict(RULES):  # a document adds a rule of its own
        for example in document.examples():
            with contextlib.suppress(unittest.SkipTest):  # of this block, not of those after it
                example.evaluate()
