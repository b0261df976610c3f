"""The report's page in a browser: Debian's chromium, headless."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from ncollapse.formatting import number
from ncollapse.train.report.best import main_table
from ncollapse.train.report.page.write import parts_of, write_report
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.reader import load_runs
from ncollapse.train.results.schema import FILE

ALL = Selection(threshold=0.0)
CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")

#: A page with the report in a frame of a given width; its title becomes the message that the report sends.
FRAME = """<!doctype html><title>waiting</title><body style="margin:0">
<script>addEventListener("message", (event) => { document.title = JSON.stringify(event.data); });</script>
<iframe src="probed.html" style="width:WIDTHpx;height:900px;border:0"></iframe>"""
WIDTH = (
    "(() => { const page = document.documentElement; const scrolled = '.scroll, pre, #tip, script'; "
    "const wide = [...document.body.querySelectorAll('*')].filter((element) => !element.closest(scrolled) && "
    "element.getBoundingClientRect().right > page.clientWidth + 1).map((element) => element.outerHTML.slice(0, 60)); "
    "return {width: innerWidth, overflow: page.scrollWidth - page.clientWidth, wide: wide}; })()"
)
SORT = (
    "(() => { const table = document.querySelector('.scroll table'); const titles = [...table.tHead.rows[0].cells]; "
    "const at = titles.findIndex((cell) => cell.textContent === 'NC1'); "
    "const column = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[at].dataset.value)); "
    "const press = () => titles[at].firstElementChild.click(); "
    "press(); const up = [column(), titles[at].getAttribute('aria-sort')]; "
    "press(); return [up, [column(), titles[at].getAttribute('aria-sort')]]; })()"
)
POINT = (
    "(() => { const group = document.querySelector('[data-runs]'); "
    "const point = [...group.querySelectorAll('use')].at(-1); "
    "point.scrollIntoView(); "
    "point.dispatchEvent(new PointerEvent('pointerover', {bubbles: true})); "
    "const tip = document.getElementById('tip'); const box = tip.getBoundingClientRect(); "
    "return {run: Number(group.dataset.runs.split(' ').at(-1)), text: tip.textContent, hidden: tip.hidden, "
    "inside: box.left >= 0 && box.right <= innerWidth}; })()"
)
#: Sizes are observed at a frame, which may be late: the browser's own clock waits for it.
HINTS = (
    "(async () => { const hints = () => [...document.querySelectorAll('.scroll')].map((box) => { "
    "const hint = box.previousElementSibling; "
    "return {hint: hint.textContent, shown: !hint.hidden, wide: box.scrollWidth > box.clientWidth + 1}; }); "
    "for (let i = 0; i < 50 && hints().some((one) => one.shown !== one.wide); i++) "
    "await new Promise((done) => setTimeout(done, 50)); return hints(); })()"
)
FINDINGS = (
    "[...document.querySelectorAll('.claims tbody tr')].map((row) => { const verdict = row.querySelector('.verdict'); "
    "const look = getComputedStyle(verdict); return {mark: verdict.firstElementChild.textContent, "
    "verdict: verdict.classList[1], text: verdict.textContent.trim().slice(2), "
    "border: look.borderTopStyle, filled: look.backgroundColor !== 'rgba(0, 0, 0, 0)', "
    "stacked: row.cells[1].getBoundingClientRect().top > verdict.getBoundingClientRect().bottom - 1}; })"
)
COLOURS = (
    "({ground: getComputedStyle(document.body).backgroundColor, "
    "text: getComputedStyle(document.querySelector('.plot text')).fill})"
)


@pytest.fixture(scope="module")
def folder(swept: Path, tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Path:
    """The small grid's results with their report."""
    folder = tmp_path_factory.mktemp("shown")
    shutil.copy(swept / FILE, folder)
    write_report(folder, ALL, quiet)
    return folder


def show(page: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """Return the page after its scripts have run, and the lines that it wrote to the console."""
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={profile}", *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(folder: Path, profile: Path, expression: str, width: int, *options: str) -> object:
    """Evaluate a JavaScript expression in the page, at a width in pixels."""
    # The page is in a frame, because chromium's window is at least 500 pixels wide.
    send = f"async () => parent.postMessage(await {expression}, '*')"
    script = f"<script>addEventListener('load', {send});</script></body>"
    page = (folder / "report.html").read_text("utf-8").replace("</body>", script)
    (folder / "probed.html").write_text(page, "utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), "utf-8")
    text, console = show(folder / "frame.html", profile, f"--window-size={max(width, 500)},1000", *options)
    assert console == []
    title = re.search(r"<title>(.*?)</title>", text)
    assert title
    return json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_page_shows_the_stores_numbers_and_no_error(folder: Path, tmp_path: Path) -> None:
    text, console = show(folder / "report.html", tmp_path)
    assert console == []
    table = main_table(load_runs(folder), ALL)
    shown = re.search(r'<table id="table-best-mlp-digits"[^>]*>.*?</table>', text, re.S)
    assert shown
    rows = re.findall(r"<tr>(.*?)</tr>", shown[0], re.S)[1:]
    assert len(rows) == len(table)
    for row, (_, run) in zip(rows, table.iterrows(), strict=True):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)
        names = ("nc0", "nc0_predicted", "nc1", "nc2", "nc3", "nc3_difference", "nc4")
        for place, name in enumerate(names, 1):
            assert cells[place].partition("<small>")[0] == number(run[name])


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_is_not_wider_than_its_window(folder: Path, tmp_path: Path, width: int) -> None:
    assert probe(folder, tmp_path, WIDTH, width) == {"width": width, "overflow": 0, "wide": []}


@pytest.mark.parametrize("width", [400, 1400])
def test_what_scrolls_says_so(folder: Path, tmp_path: Path, width: int) -> None:
    found = probe(folder, tmp_path, HINTS, width)
    assert isinstance(found, list)
    assert {one["hint"] for one in found} == {"scrolls →"}
    assert all(one["shown"] == one["wide"] for one in found)
    assert any(one["wide"] for one in found) == (width == 400)


@pytest.mark.parametrize("width", [400, 1400])
def test_verdicts_are_told_apart_without_colours(folder: Path, tmp_path: Path, width: int) -> None:
    found = probe(folder, tmp_path, FINDINGS, width)
    assert isinstance(found, list)
    kept = json.loads((folder / "findings.json").read_text("utf-8"))
    assert [one["text"] for one in found] == [claim["verdict"] for part in kept.values() for claim in part]
    looks = {"holds": ("✓", "solid", True), "fails": ("✗", "solid", False), "not-enough": ("?", "dashed", False)}
    for one in found:
        assert (one["mark"], one["border"], one["filled"]) == looks[one["verdict"]]
        assert one["stacked"] == (width == 400)


def test_a_click_on_a_title_sorts_the_table(folder: Path, tmp_path: Path) -> None:
    values = sorted(main_table(load_runs(folder), ALL).nc1)
    assert probe(folder, tmp_path, SORT, 1400) == [[values, "ascending"], [values[::-1], "descending"]]


@pytest.mark.parametrize("width", [400, 1400])
def test_a_tooltip_describes_the_run_of_a_point(folder: Path, tmp_path: Path, width: int) -> None:
    found = probe(folder, tmp_path, POINT, width)
    assert isinstance(found, dict)
    drawings = [d for part in parts_of(read_results(folder), ALL) for s in part.sections() for d in s.drawings]
    numbered = list(dict.fromkeys(run for d in drawings for group in d.runs.values() for run in group))
    run = load_runs(folder).set_index("id", drop=False).loc[numbered[found["run"]]]
    assert found["text"].endswith(f"run {run.id}")
    assert f"λ={run.weight_decay:g}" in found["text"]
    assert f"NC0 {number(run.nc0)}" in found["text"]
    assert (found["hidden"], found["inside"]) == (False, True)


def test_light_and_dark(folder: Path, tmp_path: Path) -> None:
    scheme = "--blink-settings=preferredColorScheme="
    dark = probe(folder, tmp_path / "dark", COLOURS, 1400, f"{scheme}0")
    light = probe(folder, tmp_path / "light", COLOURS, 1400, f"{scheme}1")
    assert light == {"ground": "rgb(255, 255, 255)", "text": "rgb(27, 27, 27)"}
    assert dark == {"ground": "rgb(18, 20, 22)", "text": "rgb(230, 232, 234)"}


def test_what_is_said_below_settings_does_not_make_rows_high(folder: Path, tmp_path: Path, quiet: Console) -> None:
    shutil.copy(folder / FILE, tmp_path)
    write_report(tmp_path, Selection(threshold=1.0), quiet)  # which is missed
    rows = (
        "[...document.querySelectorAll('.scroll td.words small')].map((said) => "
        "[said.textContent, said.closest('tr').offsetHeight / parseFloat(getComputedStyle(said).lineHeight)])"
    )
    found = probe(tmp_path, tmp_path / "profile", rows, 700)
    assert isinstance(found, list)
    assert found
    assert all("missed 100 %" in text and lines < 6 for text, lines in found), found
