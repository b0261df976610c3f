"""The explorer in a browser, Debian's chromium, headless: choices are made with the pointer and the keyboard."""

import json
import math
import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest

from ncollapse.formatting import number, percentage
from ncollapse.train.config import RunConfig
from ncollapse.train.report.explorer.page import write_explorer
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.reader import load_metrics, load_runs
from ncollapse.train.results.schema import FILE
from planted import plant

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")

HOSTILE = "</script><img src=x onerror=\"console.log('broken out')\"><b>&amp;'"
SOAP = "pytorch_optimizer:SOAP"

#: A page with the explorer in a frame of a given width, as chromium's window is at least 500 pixels wide.
FRAME = """<!doctype html><title>waiting</title><body style="margin:0">
<script>addEventListener("message", (event) => { document.title = JSON.stringify(event.data); });</script>
<iframe src="probed.htmlHASH" style="width:WIDTHpx;height:2500px;border:0"></iframe>"""
#: Waits for the page, evaluates the body of a function, and sends what it returns. `pause` is the browser's own clock,
#: which runs as fast as the page has nothing to do.
PROBE = """<script>(async () => {
const pause = (ms = 300) => new Promise((done) => setTimeout(done, ms));
while (!document.documentElement.dataset.ready) await pause(50);
const shown = () => [...document.querySelectorAll("#runs tbody tr")].map((row) => row.lastChild.textContent);
const drawn = (id) => [...new Set(document.getElementById(id).data.filter((trace) => trace.hoverinfo === "none")
  .flatMap((trace) => trace.customdata).map((i) => page.ids[i]))];
const seen = () => ({ table: shown(), scatter: drawn("scatter"), curves: drawn("curves"), hash: location.hash,
  count: document.getElementById("count").textContent, filters: document.getElementById("filters").textContent });
const all = (selector) => [...document.querySelectorAll(selector)];
const axis = (name) => all("#parallel > svg > g")[parallel.columns.findIndex((column) => column.name === name)];
const brush = async (name, from, to) => {
  const hit = axis(name).querySelector(".hit");
  const box = hit.getBoundingClientRect();
  const at = (kind, share, on) => on.dispatchEvent(new PointerEvent(kind, {
    bubbles: true, clientX: box.left + 12, clientY: box.top + share * box.height,
  }));
  at("pointerdown", from, hit);
  for (const share of [(from + to) / 2, to]) at("pointermove", share, window);
  at("pointerup", to, window);
  await pause();
};
let found;
try { found = await (async () => { BODY })(); } catch (error) { found = String(error.stack); }
parent.postMessage(found, "*");
})();</script></body>"""


def value(run: RunConfig, name: str, epoch: int) -> float:
    """Metrics of runs that differ; some are missing, infinite or zero."""
    if name == "margin":
        return math.nan if run.seed == 1 else -1.5 - run.seed
    if name in ("train_accuracy", "val_accuracy"):
        return 1 - 0.01 * run.seed
    if name == "nc0" and epoch and run.seed == 2 and run.optimizer == "sgd":
        return 0.0
    if name == "nc2" and epoch and run.weight_decay > 1:
        return math.inf
    scale = {"nc0": 300.0, "nc1": 1.3, "nc3": 0.7}.get(name, 0.5)
    return 0.0 if name == "degenerate" else scale * (1 + run.weight_decay) * (1 + run.seed) ** 2 / (1 + epoch * run.lr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 runs of four optimizers, one with hostile options, and metrics of the user's; one has diverged."""
    folder = tmp_path_factory.mktemp("explored")
    runs = [
        RunConfig(**optimizer, seed=seed, weight_decay=decay, lr=0.05 * (1 + seed), epochs=4)
        for optimizer in (
            {"optimizer": "sgd"},
            {"optimizer": "adamw"},
            {"optimizer": SOAP, "optimizer_options": {"note": HOSTILE}, "code": "x=1"},
            {"optimizer": SOAP, "optimizer_options": {"note": "b"}, "code": "x=1"},
        )
        for seed in range(3)
        for decay in (0.0, 5.0)
    ]
    plant(folder, runs, {"margin": f"smallest margin {HOSTILE}"}, value=value)
    with closing(sqlite3.connect(folder / FILE)) as store, store:
        store.execute("UPDATE meta SET value = ? WHERE key IN ('grid', 'description')", (HOSTILE,))
        lost = "(SELECT id FROM runs WHERE position = 3)"
        store.execute(f"UPDATE runs SET status = 'diverged' WHERE id = {lost}")
        store.execute(f"UPDATE metrics SET nc1 = NULL, nc3 = NULL, train_loss = NULL WHERE run = {lost} AND epoch > 0")
    write_explorer(read_results(folder), Selection(threshold=0.985), folder / "explore.html")
    return folder


def probe(folder: Path, tmp: Path, body: str, width: int = 1400, hash_: str = "", *options: str) -> Any:
    """Return what the body of an asynchronous JavaScript function returns in the page; no line is on the console."""
    assert CHROMIUM
    page = (folder / "explore.html").read_text("utf-8")
    (tmp / "probed.html").write_text(page.replace("</body>", PROBE.replace("BODY", body)), "utf-8")
    (tmp / "frame.html").write_text(FRAME.replace("WIDTH", str(width)).replace("HASH", hash_), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=30000"]
    command = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={tmp / 'profile'}",
        f"--window-size={max(width, 500)},2500",
        *options,
    ]
    command += ["--dump-dom", (tmp / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    return json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def agree(seen: dict[str, Any], runs: pd.DataFrame, every: int) -> None:
    """Check that all charts show these runs and no others."""
    ids = set(runs.id)
    assert set(seen["table"]) == ids
    assert set(seen["curves"]) == ids
    assert set(seen["scatter"]) == ids
    assert seen["count"] == f"{len(runs)} of {every} runs chosen"


def test_the_table_has_the_stores_numbers_and_sorts_and_the_curves_are_the_stores(folder: Path, tmp_path: Path) -> None:
    body = """
    const sort = document.querySelector("[aria-sort]");
    const first = [sort.textContent, sort.getAttribute("aria-sort")];
    const titles = all("#runs th").map((cell) => cell.textContent);
    const press = async (title) => { all("#runs th button")[titles.indexOf(title)].click(); await pause(); };
    const rows = all("#runs tbody tr").map((row) => [...row.cells].map((cell) => cell.textContent));
    await press("NC3"); const up = shown();
    await press("NC3"); const down = shown();
    const curves = document.getElementById("curves").data.filter((trace) => trace.hoverinfo === "none")
      .flatMap(({ x, y, customdata }) => x.map((epoch, k) => [page.ids[customdata[k]], epoch, y[k]]))
      .filter(([, epoch]) => epoch !== null);
    return { first, titles, rows, up, down, curves, sparks: all("#runs .spark path").length, title: document.title,
      broken: all("img, b").length, head: document.querySelector("h1").textContent,
      about: page.byName.get("margin").about, labels: page.byName.get("optimizer").words };
    """
    found = probe(folder, tmp_path, body, 1400, f"#{quote(json.dumps({'sort': ['nc1', False]}))}")
    runs = load_runs(folder).set_index("id", drop=False)
    assert len(found["rows"]) == len(runs)
    for cells in found["rows"]:
        row, run = dict(zip(found["titles"], cells, strict=True)), runs.loc[cells[-1]]
        for name in ("nc0", "nc1", "nc2", "nc3", "nc4"):
            assert row[name.upper()] == ("inf" if run[name] == math.inf else number(run[name]))
        assert row["margin"] == number(run.margin)
        assert row["val accuracy"] == percentage(run.val_accuracy)
        assert (row["lr"], row["weight decay λ"]) == (f"{run.lr:g}", f"{run.weight_decay:g}")
        assert row["status"] == run.status
    values = [float(runs.nc3[run]) for run in found["up"]]
    assert math.isnan(values.pop())  # missing numbers stand last
    assert values == sorted(values)
    values = [float(runs.nc3[run]) for run in found["down"]]
    assert math.isnan(values.pop())
    assert values == sorted(values, reverse=True)
    assert found["first"] == ["NC1", "descending"]
    stored = load_metrics(folder).set_index(["run", "epoch"]).nc0
    assert len(found["curves"]) == len(stored)
    for run, epoch, height in found["curves"]:
        np.testing.assert_allclose(height, stored[run, epoch], rtol=3e-4)
    assert found["sparks"] > 80
    assert (found["broken"], found["head"], found["title"]) == (0, HOSTILE, f"{HOSTILE} – ncollapse explorer")
    assert HOSTILE in found["about"]
    assert len(set(found["labels"])) == 4


@pytest.mark.parametrize("width", [400, 1400])
def test_a_choice_in_one_chart_is_one_in_all_and_the_page_is_not_wider_than_its_window(
    folder: Path, tmp_path: Path, width: int
) -> None:
    body = """
    const whole = document.documentElement;
    const wide = all("body *").filter((one) => !one.closest(".scroll, #filters, #tip, script, .js-plotly-plot"))
      .filter((one) => one.getBoundingClientRect().right > whole.clientWidth + 1)
      .map((one) => one.outerHTML.slice(0, 80));
    const overflow = whole.scrollWidth - whole.clientWidth;
    const before = axis("nc1").getBoundingClientRect().top;
    await brush("nc1", 0.3, 0.75);
    const moved = Math.round(axis("nc1").getBoundingClientRect().top - before);
    const brushed = { ...seen(), range: state.ranges.nc1 };
    document.getElementById("reset").click();
    await pause();
    const drag = document.querySelector("#scatter .nsewdrag");
    const box = drag.getBoundingClientRect();
    const mouse = (kind, x, y, on) => on.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, buttons: 1, clientX: box.left + x * box.width, clientY: box.top + y * box.height,
    }));
    mouse("mousedown", 0.02, 0.35, drag);
    for (const [kind, x, y] of [["mousemove", 0.5, 0.6], ["mousemove", 0.8, 0.97], ["mouseup", 0.8, 0.97]]) {
      mouse(kind, x, y, document);
    }
    await pause();
    const boxed = { ...seen(), region: state.region };
    document.querySelector("#filters button").click();
    await pause();
    const freed = seen();
    const { left, top } = document.querySelector("#scatter .point:last-child").getBoundingClientRect();
    const event = { clientX: left, clientY: top };
    document.getElementById("scatter").emit("plotly_hover", { points: [{ customdata: 5 }], event });
    const tip = document.getElementById("tip");
    const place = tip.getBoundingClientRect();
    const told = { text: tip.textContent, hidden: tip.hidden, run: page.ids[5],
      inside: place.left >= 0 && place.right <= innerWidth };
    return { wide, overflow, inner: innerWidth, moved, brushed, boxed, freed, told };
    """
    found = probe(folder, tmp_path, body, width)
    assert (found["wide"], found["overflow"], found["inner"], found["moved"]) == ([], 0, width, 0)
    runs = load_runs(folder)
    low, high = found["brushed"]["range"]
    chosen = runs[np.log10(runs.nc1).between(low, high)]
    assert 0 < len(chosen) < len(runs)
    positive = chosen[chosen.nc0 > 0]  # on a logarithmic axis
    assert set(found["brushed"]["table"]) == set(found["brushed"]["curves"]) == set(chosen.id)
    assert set(found["brushed"]["scatter"]) >= set(positive.id)
    assert found["brushed"]["count"] == f"{len(chosen)} of {len(runs)} runs chosen"
    assert found["brushed"]["filters"].startswith("NC1: ")
    region = found["boxed"]["region"]
    chosen = runs[runs.nc0.between(min(region["xs"]), max(region["xs"])) & (runs.nc0 > 0)]
    chosen = chosen[chosen.nc3.between(min(region["ys"]), max(region["ys"]))]
    assert 0 < len(chosen) < len(runs)
    agree(found["boxed"], chosen, len(runs))
    assert found["freed"]["count"] == f"{len(runs)} of {len(runs)} runs chosen"
    assert found["freed"]["hash"] == ""
    told = found["told"]
    run = runs.set_index("id").loc[told["run"]]
    assert (told["hidden"], told["inside"]) == (False, True)
    assert f"NC1 {number(run.nc1)}" in told["text"]
    assert f"weight decay λ {run.weight_decay:g}" in told["text"]
    assert told["text"].endswith(f"run {told['run']}")


def test_keys_and_ticks_choose_and_the_address_keeps_the_choice_also_on_dark_ground(
    folder: Path, tmp_path: Path
) -> None:
    body = """
    const key = async (name, pressed) => {
      axis(name).focus();
      axis(name).dispatchEvent(new KeyboardEvent("keydown", { key: pressed, bubbles: true }));
      await pause();
    };
    const tick = async (selector) => { document.querySelector(selector).click(); await pause(); };
    const ink = document.querySelector("#scatter .xtick text").style.fill;
    const ground = getComputedStyle(document.body).backgroundColor;
    await key("weight_decay", "ArrowUp");
    const upper = seen();
    const focused = document.activeElement === axis("weight_decay");
    await key("weight_decay", "Delete");
    const deleted = seen().count;
    await tick("#fit");
    const fit = seen();
    await tick('[data-column="optimizer"][data-key="sgd"]');
    await tick('[data-column="status"][data-key="diverged"]');
    const left = seen();
    let copied;
    navigator.clipboard.writeText = (text) => { copied = text; return Promise.resolve(); };
    await copyIds();
    await tick("#reset");
    const go = async (hash) => { location.hash = hash; await pause(); return seen(); };
    const again = await go(left.hash);
    const odd = [];
    for (const hash of ODD) odd.push((await go(hash)).count);
    await go(encodeURIComponent('{"ranges": {"nc0": [1000, 2000]}}'));
    const none = { ...seen(), place: document.getElementById("place").textContent };
    return { ink, ground, upper, focused, deleted, fit, left, copied, again, odd, none };
    """
    odd = [
        "%", "null", "[1]", "7", '{"ranges": {"nope": [0, 1], "nc1": "x", "nc2": [null, 1]}}',
        '{"ranges": 3, "logs": 4}',
        '{"without": 3, "sort": ["x"], "x": 7, "axes": [1]}', '{"region": {"x": "nc0"}, "without": {"status": [null]}}',
        '{"region": null, "without": null, "ranges": null, "logs": null, "axes": null, "sort": null, "first": -1}',
    ]  # fmt: skip
    addresses = json.dumps([text if text == "%" else quote(text) for text in odd])
    dark = "--blink-settings=preferredColorScheme=0"
    found = probe(folder, tmp_path, body.replace("ODD", addresses), 1400, "", dark)
    assert (found["ground"], found["ink"]) == ("rgb(18, 20, 22)", "rgb(230, 232, 234)")
    runs = load_runs(folder)
    assert set(found["upper"]["table"]) == set(runs.id[runs.weight_decay > 1])
    assert (found["focused"], found["deleted"]) == (True, f"{len(runs)} of {len(runs)} runs chosen")
    fit = runs[(runs.train_accuracy >= 0.985) & (runs.status == "done")]
    assert set(found["fit"]["table"]) == set(fit.id)
    left = fit[fit.optimizer != "sgd"]
    assert set(found["left"]["table"]) == set(left.id)
    assert found["copied"].splitlines() == found["left"]["table"]
    assert found["again"] == found["left"]
    assert set(found["odd"]) == {f"{len(runs)} of {len(runs)} runs chosen"}
    assert (found["none"]["place"], found["none"]["count"]) == ("no runs chosen", f"0 of {len(runs)} runs chosen")
    assert found["none"]["scatter"] == found["none"]["curves"] == []


def test_a_page_of_runs_without_any_number_says_so(tmp_path: Path) -> None:
    plant(tmp_path, [RunConfig(seed=seed, epochs=2) for seed in range(3)], value=lambda run, name, epoch: math.nan)
    write_explorer(read_results(tmp_path), Selection(), tmp_path / "explore.html")
    body = """
    await brush("seed", 0.6, 1);
    const notes = all("#scatter-note, #curves-note").map((note) => note.textContent);
    return { count: document.getElementById("count").textContent, rows: all("#runs tbody tr").length,
      failed: document.getElementById("failed").hidden, notes };
    """
    found = probe(tmp_path, tmp_path, body)
    assert (found["count"], found["rows"], found["failed"]) == ("1 of 3 runs chosen", 1, True)
    assert [note.partition(":")[0] for note in found["notes"]] == ["No points", "No curves"]


def test_no_optimizer_covers_the_others(folder: Path, tmp_path: Path) -> None:
    body = "const order = []; parallel.line = (_, i) => order.push(codeOf(i)); parallel.drawLines(); return order;"
    order = probe(folder, tmp_path, body)
    assert sorted(order) == [code for code in range(4) for _ in range(6)]
    assert all(len(set(order[i : i + 8])) >= 3 for i in range(len(order) - 7))
