"""README and docs: their tables and the numbers of their sentences are those of bench/results."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the repository, for the documents alone."""
    monkeypatch.syspath_prepend(ROOT)
    from bench.tables import __main__ as tables

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_documents_have_the_numbers_of_the_records() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_another_number_in_a_table_is_found_and_mended(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.tables.__main__ import main

    page = documents / "docs" / "findings.md"
    right = (ROOT / "docs" / "findings.md").read_text("utf-8")
    start = right.index("<!-- table demo -->")
    page.write_text(right[:start] + right[start:].replace("0", "1", 1), "utf-8")
    assert main(["--check"]) == 1
    assert "docs/findings.md: a table is not of the records" in capsys.readouterr().err
    assert main([]) == 0
    assert page.read_text("utf-8") == right


def test_prose_says_what_records_say_and_no_other_number(documents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench.tables import sentences
    from bench.tables.__main__ import main

    *others, last = sentences.of_documents()["docs/benchmarks.md"]
    (documents / "docs" / "benchmarks.md").write_text(
        "\n\n".join(["The H100 and `7 ms` in code.", "| 7 |", *others, "What was measured once: a step takes 7 ms."]),
        "utf-8",
    )
    assert main(["--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"docs/benchmarks.md does not say “{last}”",
        "docs/benchmarks.md: no record says “s measured once: a step takes 7 ms.”",
    ]


def test_a_record_that_nobody_describes_is_named(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.tables import records

    (documents / "new.json").write_text("{}")
    monkeypatch.setattr(records, "RESULTS", documents)
    with pytest.raises(SystemExit, match=r"new\.json: say in HOLDS"):
        records.records()


def test_microbenchmarks_have_a_row_for_each_case(documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.tables import microbenchmarks

    def timed(group: str, name: str, seconds: float, **extra: float) -> dict[str, Any]:
        return {"group": group, "name": name, "stats": {"median": seconds, "iqr": seconds / 5}, "extra_info": extra}

    found = [
        timed("sgd", "nc", 1e-3, share_of_copy=0.9),
        timed("sgd", "torch fused", 2e-3),
        timed("norm", "torch", 3e-3),
    ]
    monkeypatch.setattr(microbenchmarks, "read", lambda name: {"benchmarks": found})
    assert microbenchmarks.on_cpu().splitlines()[2:] == [
        "| sgd | nc 1.00 ms (± 100 µs) | 90 % | torch fused 2.00 ms (± 200 µs) |",
        "| norm |  |  | torch 3.00 ms (± 300 µs) |",
    ]


@pytest.mark.parametrize(
    ("times", "cells"),
    [
        ([3.0, None, 4.0], ["**3.0**", "–", "4.0"]),
        ([3.0, 3.1], ["**3.0**", "**3.1**"]),  # as fast
        ([None, 3.0], ["–", "3.0"]),  # with nothing beside it
    ],
)
def test_bold_is_what_is_fastest_of_several(documents: Path, times: list[float | None], cells: list[str]) -> None:
    from bench.tables.markdown import fastest_bold

    assert fastest_bold(times, lambda value: f"{value:.1f}") == cells


@pytest.mark.parametrize(
    ("us", "text"),
    [(None, "–"), (5.346, "5.35 µs"), (999.7, "1,000 µs"), (1434.0, "1.43 ms"), (32_420_310.5, "32.4 s")],
)
def test_durations_have_three_digits(documents: Path, us: float | None, text: str) -> None:
    from bench.tables.markdown import duration

    assert duration(us) == text
