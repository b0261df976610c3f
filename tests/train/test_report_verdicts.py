"""The findings on the report's page, in its files and on the terminal; stores without geometry; full disks."""

import io
import json
import shutil
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from ncollapse.train.config import RunConfig
from ncollapse.train.errors import UserError
from ncollapse.train.findings.claim import Comparison, Finding
from ncollapse.train.report.page import verdicts as verdicts_module
from ncollapse.train.report.page import write as write_module
from ncollapse.train.report.page.verdicts import Verdicts, in_short
from ncollapse.train.report.page.write import parts_of, write_report
from ncollapse.train.report.queries import Results, read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.schema import FILE
from planted import plant

NAN = float("nan")
HOLDS = Finding(
    1, "NC0 <falls>.", "By counting.", "All of 2.", (Comparison("SGD", "share", 1.0, "holds", 2),), ("a", "b")
)
FAILS = Finding(
    3, "NC3 is lower.", "By pairs.", "Half of them.",
    (Comparison("Adam", "median ratio", 0.9, "holds", 4, "pairs", 0.8, 0.95, {"p": 0.03}),
     Comparison("SGD", "median ratio", 1.2, "fails", 3, "pairs"),
     Comparison("Lion", "median ratio", NAN, "not enough", 0)),
    ("a",),
)  # fmt: skip
LACKS = Finding(5, "All is smooth.", "By rank.", "", (), (), "five couplings", "ncollapse sweep coupling --out 'a b'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plant(tmp_path, [RunConfig(optimizer=name, epochs=2) for name in ("sgd", "adam")])
    return tmp_path


def test_the_page_shows_every_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("mlp on digits", [HOLDS, FAILS, LACKS])]
    monkeypatch.setattr(verdicts_module, "findings_of_runs", lambda results, selection: found)
    console = Console(record=True, width=100, file=io.StringIO())
    text = write_report(folder, Selection(), console).read_text("utf-8")
    shown = text.partition('<h2 id="findings">')[2].partition("<h2 id=")[0]
    for part in (
        "1. NC0 &lt;falls&gt;.", "By counting.", "All of 2.", "SGD: share 1, 2 runs: holds", "(1 of 3 hold, 1 open)",
        "Adam: median ratio 0.9 (0.8 to 0.95), 4 pairs, p 0.03: holds", "Lion: median ratio –, 0 runs: not enough",
        "Missing: five couplings", "ncollapse sweep coupling --out &#39;a b&#39;", "3 comparisons, 1 run<",
        "1 claim holds, 1 fails, 1 lacks runs.", 'href="tables/findings-mlp-digits.csv"',
    ):  # fmt: skip
        assert part in shown, part
    kept = json.loads((folder / "findings.json").read_text("utf-8"))
    assert [one["verdict"] for one in kept["mlp on digits"]] == ["holds", "fails", "not enough"]
    assert kept["mlp on digits"][1]["parts"][2]["value"] is None
    assert pd.read_csv(folder / "tables" / "findings-mlp-digits.csv").number.tolist() == [1, 3, 5]
    lines = console.export_text().splitlines()
    assert f"mlp on digits: 1 claim holds, 1 fails, 1 lacks runs: ncollapse findings {folder}" in lines


def test_in_short() -> None:
    assert in_short([], Path("x")) == []
    one = Verdicts("mlp on digits", "mlp-digits", [HOLDS, HOLDS, LACKS, LACKS])
    assert in_short([one], Path("a b")) == ["mlp on digits: 2 claims hold, 2 lack runs: ncollapse findings 'a b'"]
    lines = in_short([one] * 40, Path("x"))
    assert len(lines) == 12
    assert lines[-1] == "29 more models, data sets and losses: ncollapse findings x"
    assert Verdicts("", "", [FAILS, FAILS]).text == "2 claims fail"


def test_an_explorer_that_cannot_be_written_does_not_lose_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(results: Results, selection: Selection, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(write_module, "write_explorer", full)
    with pytest.raises(UserError, match=r"cannot write the report to .*No space left on device.*explore\.html"):
        write_report(folder, Selection(), Console(quiet=True))
    assert "Best setting of each optimizer" in (folder / "report.html").read_text("utf-8")


def test_a_store_from_before_geometry_was_kept_says_what_to_do(swept: Path, tmp_path: Path) -> None:
    shutil.copy(swept / FILE, tmp_path)
    results = read_results(tmp_path)
    (part,) = parts_of(results, Selection(threshold=0.0))
    section = next(section for section in part.sections() if section.key == "geometry")
    assert (section.lacks, len(section.fragments), bool(section.drawings)) == ([], 1, True)
    best = part.best.frame.run[0]
    assert set(results.snapshots([best])) == {best}
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("DELETE FROM geometry WHERE run = ?", [best])
    section = next(section for section in part.sections() if section.key == "geometry")
    assert section.lacks == ["The results folder holds no geometry of the best run of SGD."]
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("DROP TABLE geometry")
    section = next(section for section in part.sections() if section.key == "geometry")
    assert "trains these again" in section.lacks[0]
    assert not section.fragments
    assert not section.drawings
