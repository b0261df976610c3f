"""docs/kernels.md: its excerpts stand in the sources, and in what Triton compiles; the tests that it names exist."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text("utf-8")
BLOCK = r":?\n+```\w+\n(.*?)^```$"
#: Below a link to the file that they are from; compiled code below its stage and the fields of its kernel's record.
SOURCES = re.findall(r"^\[([\w/]+\.\w+)\]\(\.\./\1\)" + BLOCK, PAGE, re.MULTILINE | re.DOTALL)
COMPILED = [
    (stage, words.split(), text)
    for stage, words, text in re.findall(r"^<!-- (ptx|sass) ([^\n]*) -->" + BLOCK, PAGE, re.MULTILINE | re.DOTALL)
]
PINNED = re.findall(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def has_pinned_triton() -> bool:
    """Whether Triton is installed, and the version that the excerpts were compiled by: others write other code."""
    if find_spec("triton") is None:
        return False
    import triton

    return triton.__version__ in PINNED


def plain(text: str) -> str:
    return "".join(text.split())


def instructions(text: str) -> list[str]:
    """One for each line, without comments, addresses and the numbers of registers."""
    lines = (re.sub(r"//.*|/\*.*?\*/", "", line) for line in text.splitlines())
    # %r12 and %rd3 in PTX; R12, UR3 and P0 in SASS.
    numbered = (re.sub(r"(%\w*?|\b(?:U?R|P))\d+\b", r"\1", line) for line in lines)
    return [line for line in map(plain, numbered) if line]


def test_every_excerpt_is_marked() -> None:
    """A block of another file's code that is not run must be compared with that file."""
    skipped = re.findall(r"^<!--- skip: next --->$", PAGE, re.MULTILINE)
    cpp, ptx = (re.findall(rf"^```{language}$", PAGE, re.MULTILINE) for language in ("cpp", "ptx"))
    assert len(skipped) > 8
    assert len(skipped) + len(cpp) == len(SOURCES)
    assert [stage for stage, *_ in COMPILED] == ["ptx"] * len(ptx) + ["sass"]


@pytest.mark.parametrize(("name", "text"), SOURCES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SOURCES)])
def test_excerpts_of_sources(name: str, text: str) -> None:
    """White space aside; a comment … leaves out any number of lines."""
    source, at = plain((ROOT / name).read_text("utf-8")), 0
    for part in re.split(r"^ *(?:#|//) …$", text, flags=re.MULTILINE):
        found = source.find(plain(part), at)
        assert found >= 0, f"{name} does not hold, after what comes before it:\n{part}"
        at = found + len(plain(part))


@pytest.mark.skipif(not has_pinned_triton(), reason="needs the version of Triton of constraints.txt")
@pytest.mark.parametrize(("stage", "words", "text"), COMPILED, ids=[stage for stage, *_ in COMPILED])
def test_excerpts_of_compiled_code(stage: str, words: list[str], text: str) -> None:
    """For sm_90, in this order; between two lines there may be others."""
    # In a separate process: this one may run Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "kernels" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script, "sm_90", *words, "--show", stage],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code = iter(instructions(done.stdout))
    for line in instructions(text):
        assert line in code, f"not in the {stage}, after what comes before it: {line}"  # `in` consumes what it passes
    if stage == "ptx":
        assert "fma.rn.f32" not in done.stdout  # as the page says


def test_the_tests_that_it_names_exist() -> None:
    named, source = 0, ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", PAGE):
        source = (ROOT / path).read_text("utf-8") if path else source
        if name:
            assert f"def {name}(" in source, name
            named += 1
    assert named > 8
