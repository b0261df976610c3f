"""The report's geometry: which runs it shows, and the slider in a browser."""

import dataclasses
import json
import re
import shutil
import subprocess
from html import escape, unescape
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pytest
import torch

from ncollapse import ClassStats
from ncollapse.optimizer_table import row_of
from ncollapse.plot.looks import PAGE_COLOURS, shown
from ncollapse.plot.style import encode
from ncollapse.plot.three_classes import CENTRE, extent
from ncollapse.snapshot import Snapshot
from ncollapse.snapshot_taking import take_snapshots
from ncollapse.train.report.collapse import SLIDER_SCRIPT, collapse_drawings, simplex_slider
from ncollapse.train.report.page.inline_svg import inline

CHROMIUM = shutil.which("chromium")
EPOCHS = (0, 15, 30, 45, 60)


def snapshot_of(k: int, noise: float) -> Snapshot:
    """Class means and W at the corners of a simplex, but for noise; kept in a store and read again."""
    labels = torch.arange(10 * k) % k
    features = torch.eye(k)[labels] + noise * torch.randn(len(labels), k)
    stats = ClassStats(k, k, runs=1)
    stats.update(features[None], labels)
    weight = torch.eye(k) - 1 / k + noise * torch.randn(k, k)
    (snapshot,) = take_snapshots(weight[None], stats, features[None], labels)
    assert snapshot is not None
    return Snapshot.from_bytes(snapshot.to_bytes())


def history(k: int = 4, epochs: tuple[int, ...] = EPOCHS) -> dict[int, Snapshot]:
    return {epoch: snapshot_of(k, 1 / (2 + epoch)) for epoch in epochs}


def best_of(*optimizers: str, **settings: str) -> pd.DataFrame:
    """A row per optimizer; its run is named as it is."""
    return pd.DataFrame(
        [
            {
                "id": name, "optimizer": name, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3,
                "coupling": row_of(name).coupling,
            } | settings
            for name in optimizers
        ]
    ).astype({"coupling": float})  # fmt: skip


def runs_of(fragment: str) -> list[str]:
    return [unescape(label) for label in re.findall(r'<p class="run"><b>(.*?)</b>', fragment)]


@pytest.mark.parametrize(
    ("optimizers", "expected"),
    [
        (("sgd", "sgdw", "adam", "adamw"), ["SGD", "AdamW"]),
        (("sgd", "signumw", "adam"), ["SGD", "SignumW"]),
        (("sgdw", "adamw", "adam"), ["Adam", "SGDW"]),
        (("adam", "sgd"), ["Adam", "SGD"]),
        (("adamw",), ["AdamW"]),
        (("torch.optim:RAdam", "adamw"), ["RAdam", "AdamW"]),
    ],
)
def test_a_coupled_run_stands_beside_a_decoupled_one(optimizers: tuple[str, ...], expected: list[str]) -> None:
    best = best_of(*optimizers)
    snapshots = {name: {0: snapshot_of(3, 0.1)} for name in optimizers}
    assert runs_of(simplex_slider("a", best, snapshots)) == expected
    drawings = collapse_drawings("a", best, snapshots)
    assert [drawing.caption.split(",")[0] for drawing in drawings[: len(expected)]] == expected
    names = ["geometry-1-a", "geometry-2-a"][: len(expected)] + ["geometry-ends-a"] * (len(optimizers) > 2)
    assert [drawing.name for drawing in drawings] == names


def test_the_ends_of_all_optimizers() -> None:
    names = [f"mine.py:{'Optimizer' * 6}{i}" for i in range(12)]  # their labels are cut, so that they are the same
    best = best_of(*names)
    snapshots = {name: {0: snapshot_of(2, 1.0), 9: snapshot_of(2, 0.1)} for name in names}
    *_, ends = collapse_drawings("a", best, snapshots)
    assert "The first 10 of 12 optimizers are shown." in ends.caption
    images = [axes.images[0].get_array() for axes in ends.figure.axes if axes.images]
    for name, image in zip(names[:10], images[1::3], strict=False):
        np.testing.assert_array_equal(image, snapshots[name][9].weight)
    assert len(images) == 31


def test_runs_without_snapshots_are_left_out() -> None:
    best = best_of("sgd", "adam", "adamw")
    assert (collapse_drawings("a", best, {}), simplex_slider("a", best, {})) == ([], "")
    assert (collapse_drawings("a", best[:0], {}), simplex_slider("a", best[:0], {})) == ([], "")
    snapshots = {"sgd": {}, "adam": history(2), "adamw": history(3, (0, 7))}
    assert len(collapse_drawings("a", best, snapshots)) == 2
    assert runs_of(simplex_slider("a", best, snapshots)) == ["AdamW"]  # two classes have no plane
    assert 'type="range"' not in simplex_slider("a", best, {"adam": {4: snapshot_of(3, 0.1)}})


def test_a_run_that_ended_early_keeps_its_last_picture() -> None:
    fragment = simplex_slider("a", best_of("sgd", "adamw"), {"sgd": history(), "adamw": history(epochs=(0, 15, 20))})
    assert 'data-epochs="0 15 20 45 60"' in fragment
    sgd, adamw = (re.findall(r">epoch (\d+)</text>", part) for part in fragment.split('class="run"')[1:])
    assert (sgd, adamw) == (["0", "15", "15", "45", "60"], ["0", "15", "20", "20", "20"])


def test_names_are_escaped_and_ids_are_unique() -> None:
    name = 'mine.py:<img src=x onerror="alert(1)">'
    best = best_of(name, "sgd", loss="")
    best["loss"] = ["</style><script>alert(2)</script>", "cross_entropy"]
    snapshots = {name: history(), "sgd": history()}
    with shown([name, "sgd"]):
        fragments = [simplex_slider(slug, best, snapshots) for slug in ("mlp-digits", "cnn-digits")]
    for fragment in fragments:
        assert "<img" not in fragment
        assert "<script" not in fragment
        assert "&lt;script&gt;" in fragment
    ids = re.findall(r' id="([^"]*)"', "".join(fragments))
    assert len(set(ids)) == len(ids) == 6
    for fragment in fragments:
        assert set(re.findall(r' (?:for|aria-describedby)="([^"]*)"', fragment)) <= set(ids)
        assert not re.search(r"https?:|url\(", fragment)


@pytest.mark.parametrize(
    ("epochs", "said"),
    [((7,), "at epoch 7."), ((0, 4), "at epochs 0 and 4."), ((0, 1, 2, 3, 8), "at epochs 0, 2 and 8.")],
)
def test_the_caption_names_the_epochs_that_are_drawn(epochs: tuple[int, ...], said: str) -> None:
    (drawing,) = collapse_drawings("a", best_of("sgd"), {"sgd": history(epochs=epochs)})
    assert said in drawing.caption


def test_only_finite_values_are_drawn() -> None:
    snapshot = snapshot_of(4, 0.1)
    samples = snapshot.samples.copy()
    samples[0] = np.nan
    gaps = dataclasses.replace(
        snapshot, samples=samples, rows=np.full((3, 2), np.nan), means=np.full((4, 4), np.nan),
        singular_values=np.full(4, np.nan),
    )  # fmt: skip
    best, snapshots = best_of("sgd"), {"sgd": {0: snapshot, 1: gaps}}
    fragment = simplex_slider("a", best, snapshots)
    (drawing,) = collapse_drawings("a", best, snapshots)
    svg = inline(encode(drawing.figure)[1], drawing.name, drawing.caption, drawing.runs)
    for text in (fragment, svg):
        assert not re.search(r"\bnan\b|\binf\b", text, re.I)


def test_classes_that_are_not_kept_are_counted() -> None:
    (drawing,) = collapse_drawings("a", best_of("sgd"), {"sgd": {3: snapshot_of(20, 0.1)}})
    assert "Of 20 classes the first 16 are shown." in drawing.caption
    assert "−0.05 ± 0" in drawing.caption


PROBE = """(frame) => {
  const doc = frame.contentDocument, win = frame.contentWindow, page = doc.documentElement;
  const seen = () => [...doc.querySelectorAll(".frames")].map(
    (frames) => [...frames.children].map((svg) => win.getComputedStyle(svg).display !== "none"));
  const slider = doc.querySelector("input"), control = win.getComputedStyle(slider.parentElement).display;
  const steps = [seen()], texts = [], means = [];
  for (const step of [0, 2]) {
    slider.value = step;
    slider.dispatchEvent(new win.Event("input"));
    steps.push(seen());
    texts.push([doc.querySelector("output").textContent, slider.getAttribute("aria-valuetext")]);
    means.push([...doc.querySelectorAll("svg.shown")].map((svg) => [...svg.querySelectorAll("circle")].map(
      (mean) => [Number(mean.getAttribute("cx")), Number(mean.getAttribute("cy"))])));
  }
  slider.focus();
  return {width: win.innerWidth, overflow: page.scrollWidth - page.clientWidth, control: control, steps: steps,
    texts: texts, means: means, label: slider.labels[0].textContent, focused: doc.activeElement === slider,
    beside: new Set([...doc.querySelectorAll("svg.shown")].map((svg) => svg.getBoundingClientRect().top)).size};
}"""


def in_browser(
    folder: Path, page: str, frames: list[tuple[str, str, str]]
) -> tuple[list[dict[str, object]], list[str]]:
    """Probe the page in frames (attributes, text that is replaced, what by); also return what the console says."""
    assert CHROMIUM
    shown_in = "".join(
        f'<iframe style="border:0;height:900px" {attributes} srcdoc="{escape(page.replace(old, new))}"></iframe>'
        for attributes, old, new in frames
    )
    (folder / "frames.html").write_text(
        f"<!doctype html><title>waiting</title><body>{shown_in}<script>addEventListener('load', () => {{ "
        f"document.title = JSON.stringify([...document.querySelectorAll('iframe')].map({PROBE})); }});</script>",
        "utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    return json.loads(unescape(title[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_the_slider_in_a_browser(tmp_path: Path) -> None:
    snapshots = {"sgd": history(), "adamw": history()}
    fragment = simplex_slider("mlp-digits", best_of("sgd", "adamw"), snapshots)
    source = (files("ncollapse.train.report.page") / "style.css.j2").read_text("utf-8")
    css = jinja2.Template(source).render(lines={}, families=PAGE_COLOURS)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        f'<!doctype html><html lang="en"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{css}</style><body>{fragment}<script>{SLIDER_SCRIPT}</script></body></html>"
    )
    frames = [
        ('width="400"', "", ""),
        ('width="1400"', "", ""),
        ('width="1400" sandbox="allow-same-origin"', f"<script>{SLIDER_SCRIPT}</script>", ""),  # without script
        ('width="700"', "@media print", "@media all"),
    ]
    (narrow, wide, still, paper), console = in_browser(tmp_path, page, frames)
    assert console == []
    none = [False] * 5
    last, first, third = ([[*none[:place], True, *none[place + 1 :]]] * 2 for place in (4, 0, 2))
    half = extent([snapshots[name][epoch] for name in snapshots for epoch in EPOCHS])
    means = [
        [np.round((snapshots[name][epoch].corners - CENTRE) / half * 150 * (1, -1) + 150, 1) for name in snapshots]
        for epoch in (0, 30)
    ]
    for found, width in ((narrow, 400), (wide, 1400)):
        assert (found["width"], found["overflow"], found["control"]) == (width, 0, "flex")
        assert found["steps"] == [last, first, third]
        assert found["texts"] == [["epoch 0", "epoch 0"], ["epoch 30", "epoch 30"]]
        assert (found["label"], found["focused"], found["beside"]) == ("Epoch", True, 1)
        np.testing.assert_allclose(np.array(found["means"]), np.array(means), atol=0.051)
    assert (still["control"], still["steps"]) == ("none", [last] * 3)
    assert (paper["control"], paper["steps"], paper["overflow"]) == ("none", [[[True] * 5] * 2] * 3, 0)
