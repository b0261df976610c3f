"""Sentences of documents that hold numbers of records: they must occur, and benchmarks.md has no others."""

import re

from bench.tables import sweeps
from bench.tables.markdown import read

#: In benchmarks.md: names with a digit, which are no measurement.
_NAMES = re.compile(r"\b(?:H100|H200|NC[0-4]|ResNet9|VGG9|sm_90|float32|float64|bfloat16|tf32|two-)\b")
_SHOWN = (
    re.compile(r"^(`{3}).*?^\1$", re.DOTALL | re.MULTILINE),  # commands and output
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^\|.*$", re.MULTILINE),  # tables
    re.compile(r"\]\([^)]*\)"),  # addresses of links
)


def of_documents() -> dict[str, list[str]]:
    """Document -> what it must say."""
    findings = read("findings-cpu.json")
    minutes = findings["seconds_of_command"] / 60
    return {
        "README.md": [
            sweeps.demo_seconds(),
            f"{findings['runs']} runs in {minutes:.0f} minutes on two cores",
        ],
        "docs/benchmarks.md": [],
    }


def flat(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def missing(text: str, sentences: list[str]) -> list[str]:
    """The sentences that a document lacks."""
    return [sentence for sentence in sentences if flat(sentence) not in flat(text)]


def unfounded(text: str, sentences: list[str]) -> list[str]:
    """Numbers in a document's prose that stand in none of its sentences, with the words about them."""
    for shown in _SHOWN:
        text = shown.sub("", text)
    text = flat(text)
    for sentence in map(flat, sentences):
        text = text.replace(sentence, "")
    text = _NAMES.sub("", text)
    return [found[0].strip() for found in re.finditer(r".{0,30}\d[\d.,]*.{0,20}", text)]
