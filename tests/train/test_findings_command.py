"""`ncollapse findings`: the table, one claim in detail, JSON, and what it says of folders that it cannot read."""

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from findings_store import planted_runs, product
from ncollapse.train.cli import main
from ncollapse.train.commands import findings as findings_command
from ncollapse.train.commands.findings import findings_json, print_findings
from ncollapse.train.findings.claim import Finding
from ncollapse.train.findings.registry import CLAIMS, THEORY, findings_of, findings_view
from ncollapse.train.report.queries import Results, read_results
from ncollapse.train.report.selection import Selection

RUNS = product(
    optimizer=["sgd", "sgdw", "signum", "signumw", "adam", "adamw"], lr=[0.01, 0.1, 0.2],
    weight_decay=[5e-4, 5e-3, 5e-2],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = {run: {"nc0": 0.2 if run.coupling == 1 else 4.0, "nc3": 0.3 if run.coupling == 1 else 0.5} for run in RUNS}
    odd = product(optimizer=["adam"], data_options='{"name": "\\u001b[31m[bold]"}', data="mine.py:data")
    return planted_runs(tmp_path_factory.mktemp("planted") / "a [b]", {**runs, **{run: {} for run in odd}})


@pytest.fixture(scope="module", autouse=True)
def _tested_once() -> Iterator[None]:
    """Each folder's claims are tested once."""
    found: dict[tuple[Path, Selection], list[tuple[str, list[Finding]]]] = {}

    def findings(results: Results, selection: Selection) -> list[tuple[str, list[Finding]]]:
        key = (results.folder, selection)
        return found.get(key) or found.setdefault(key, findings_of(results, selection))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings_command, "findings_of", findings)
        yield


def printed(folder: Path, claim: int | None = None, **selection: float) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    print_findings(folder, Selection(**selection), console, claim)
    return console.export_text()


def test_the_table_fits_a_terminal(folder: Path) -> None:
    text = printed(folder)
    table = [line for line in text.splitlines() if not line.startswith(("For claim", "How claim"))]
    assert max(map(len, table)) <= 80
    assert "mlp on digits" in text
    assert "\\x1b[31m[bold]" in text
    assert "\x1b" not in text
    assert text.count("NC0 of SGD and SGDW follows") == 2
    assert text.count("The theorems on NC0") == 1
    assert "ncollapse rerun" in text


def test_one_claim_in_detail(folder: Path) -> None:
    text = printed(folder, 3)
    words = " ".join(text.split())
    assert "NC3, Adam against" in words
    assert "share 1, p 0.00391, pairs 9" in words
    assert "The theorems" not in text
    assert "3.4" in printed(folder, 12)


def test_json_has_every_number_and_run(folder: Path) -> None:
    found = json.loads(findings_json(folder, Selection()), parse_constant=pytest.fail)
    assert list(found)[-1] == THEORY
    findings = {one["number"]: one for one in found["mlp on digits"]}
    assert list(findings) == [*CLAIMS]
    assert findings[3]["verdict"] == "fails"  # NC2 is the same in all
    parts = {part["name"]: part for part in findings[3]["parts"]}
    assert parts["NC3, SGD against SGDW"]["verdict"] == "holds"
    assert parts["NC3, SGD against SGDW"]["value"] == pytest.approx(0.6)
    assert set(findings[3]["runs"]) == {run.id for run in RUNS}


def test_the_view_has_a_row_per_claim(folder: Path) -> None:
    (_, findings), *_ = findings_of(read_results(folder), Selection())
    view = findings_view("mlp-digits", findings)
    assert list(view.frame.number) == [*CLAIMS]
    assert [row[4].text for row in view.rows()] == [one.verdict_text for one in findings]


def test_a_threshold_that_none_reaches_is_relaxed_visibly(tmp_path: Path) -> None:
    runs = {run: {"train_accuracy": 0.97, "nc0": 0.2 if run.coupling == 1 else 4.0} for run in RUNS[::3]}
    text = printed(planted_runs(tmp_path / "a", runs))
    assert "missed 99.9 %: 97.00 %, shown anyway" in " ".join(text.split())
    assert "Of the runs that fit the training data (96 %)" in " ".join(printed(tmp_path / "a", 2).split())


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["findings", str(folder), "--claim", "2"])
    assert "Tested: Of the runs that fit the training data (99.9 %)" in " ".join(capsys.readouterr().out.split())
    main(["findings", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["mlp on digits"]
    for args, message in (
        ([str(folder), "--claim", "13"], "--claim must lie between 1 and 12; got 13"),
        ([str(folder), "--threshold", "2"], "--threshold must lie in [0, 1]"),
        ([str(tmp_path)], "no results"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["findings", *args])
        assert ended.value.code == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_everything_diverged(tmp_path: Path) -> None:
    runs = {run: dict.fromkeys(("nc0", "train_accuracy"), math.nan) for run in RUNS[:4]}
    folder = planted_runs(tmp_path / "a", runs, status=dict.fromkeys(runs, "diverged"))
    (_, findings), *_ = findings_of(read_results(folder), Selection())
    assert {one.verdict for one in findings} == {"not enough"}
    assert all(one.lacks for one in findings)
