"""What the explorer's page holds: numbers as the store has them, at most 8 MB, and what is left out is said."""

import base64
import dataclasses
import gzip
import json
import math
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ncollapse.train.config import RunConfig
from ncollapse.train.report.explorer.packing import Pack, evenly, packed_curves, rounded
from ncollapse.train.report.explorer.page import write_explorer
from ncollapse.train.report.queries import read_results
from ncollapse.train.report.selection import Selection
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.schema import FILE
from planted import plant

ALL = Selection(threshold=0.0)


def unpacked(text: str) -> dict[str, Any]:
    """The header, with the arrays in it: what `decode.js` makes."""
    content = gzip.decompress(base64.b64decode(text))
    start = 4 + int.from_bytes(content[:4], "little")
    header: dict[str, Any] = json.loads(content[4:start])
    for name, about in header["arrays"].items():
        kind = np.dtype(about["kind"].removesuffix("Array").lower())
        size = about["length"] * kind.itemsize
        planes = np.frombuffer(content, np.uint8, size, start + about["at"]).reshape(kind.itemsize, about["length"])
        header["arrays"][name] = np.ascontiguousarray(planes.T).reshape(-1).view(kind)
    return header


def embedded(page: Path, name: str) -> dict[str, Any]:
    """What the page holds under a name."""
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page.read_text("utf-8"))
    assert found
    return unpacked(found[1])


@pytest.mark.parametrize("kind", ["float32", "float64", "uint8", "uint16", "uint32"])
def test_arrays_come_back_as_they_were(kind: str) -> None:
    pack = Pack()
    arrays = {name: np.arange(length).astype(kind) for name, length in (("none", 0), ("one", 1), ("many", 300))}
    for name, values in arrays.items():
        pack.add(name, values)
    found = unpacked(pack.text())["arrays"]
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)


def test_rounding_keeps_the_bits_that_it_is_told_to_and_what_is_not_finite() -> None:
    values = np.array([1.0, -3.14159265, 1e-30, 12345.678, 0.0, np.nan, np.inf, -np.inf, 1e300, 3.4e38])
    found = rounded(values, 11)
    np.testing.assert_allclose(found[:5], values[:5], rtol=2.0**-12)
    np.testing.assert_array_equal(found[5:9], [np.nan, np.inf, -np.inf, np.inf])
    assert not (found[:5].view(np.uint32) & 0xFFF).any()
    np.testing.assert_array_equal(rounded(values[:5], 23), values[:5].astype(np.float32))


def test_places_are_spread_evenly_with_the_first_and_the_last() -> None:
    assert list(evenly(5, 9)) == [0, 1, 2, 3, 4]
    assert list(evenly(101, 5)) == [0, 25, 50, 75, 100]
    assert list(evenly(0, 5)) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 runs, of 21 evaluations."""
    folder = tmp_path_factory.mktemp("four")
    plant(folder, [RunConfig(seed=seed, epochs=100) for seed in range(4)])
    multiply(folder, 4, 21)
    return folder


def multiply(folder: Path, runs: int, evaluations: int) -> None:
    """Make copies of a planted folder's first run, with other settings and noise for metrics."""
    noise = np.random.default_rng(0)
    with closing(sqlite3.connect(folder / FILE)) as store, store:
        found = store.execute("SELECT * FROM runs LIMIT 1")
        names = [column[0] for column in found.description]
        first = dict(zip(names, found.fetchone(), strict=True))
        for table in ("metrics", "runs"):
            store.execute(f"DELETE FROM {table}")
        ids = [noise.bytes(6).hex() for _ in range(runs)]
        values = [
            first | {"id": run, "position": i, "optimizer": ("sgd", "adamw")[i % 2], "lr": 0.1 / (1 + i % 9), "seed": i}
            for i, run in enumerate(ids)
        ]
        marks = ", ".join("?" * len(names))
        store.executemany(f"INSERT INTO runs VALUES ({marks})", (list(row.values()) for row in values))
        falling = np.exp(noise.normal(size=(runs, evaluations, len(METRICS))) * 0.1).cumprod(1).tolist()
        store.executemany(
            f"INSERT INTO metrics (run, epoch, {', '.join(METRICS)}) VALUES ({', '.join('?' * (2 + len(METRICS)))})",
            ((run, 5 * i, *row) for run, rows in zip(ids, falling, strict=True) for i, row in enumerate(rows)),
        )


def test_ends_and_curves_are_the_stores(folder: Path, tmp_path: Path) -> None:
    results = read_results(folder)
    write_explorer(results, ALL, tmp_path / "explore.html")
    ends, curves = (embedded(tmp_path / "explore.html", name) for name in ("data", "curve-data"))
    assert ends["ids"] == list(results.runs.id)
    for name in ("nc0", "nc3", "val_loss", "weight_norm"):
        np.testing.assert_array_equal(ends["arrays"][f"end {name}"], results.runs[name].to_numpy(np.float32))
        stored = [results.histories([run])[name] for run in ends["ids"]]
        np.testing.assert_allclose(curves["arrays"][f"curve {name}"], np.concatenate(stored), rtol=3e-4)
    assert list(curves["arrays"]["count"]) == [21] * 4
    assert list(curves["arrays"]["epoch"]) == [5 * i for i in range(21)] * 4
    assert "Curves have at most" not in (tmp_path / "explore.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("most", "evaluations", "metrics", "runs"),
    [(10**6, 21, 20, 4), (900, 21, 10, 4), (520, 14, 9, 4), (300, 12, 9, 2), (1, 12, 9, 1), (0, 0, 0, 0)],
)
def test_curves_lose_metrics_then_evaluations_then_runs(
    folder: Path, most: int, evaluations: int, metrics: int, runs: int
) -> None:
    header = unpacked(packed_curves(read_results(folder), list(METRICS), most).text())
    assert (max(header["arrays"]["count"]), len(header["metrics"]), header["runs"]) == (evaluations, metrics, runs)
    assert header["of"] == 4
    assert header["epochs"] == (0 if evaluations in (0, 21) else evaluations)
    for i in np.flatnonzero(header["arrays"]["count"]):
        first = header["arrays"]["count"][:i].sum()
        own = header["arrays"]["epoch"][first : first + evaluations]
        assert (own[0], own[-1]) == (0, 100)


def test_a_sweep_of_the_papers_size_fits(tmp_path: Path) -> None:
    plant(tmp_path, [RunConfig(epochs=100)])
    multiply(tmp_path, 3888, 21)
    write_explorer(read_results(tmp_path), ALL, tmp_path / "explore.html")
    assert (tmp_path / "explore.html").stat().st_size <= 8_000_000
    curves = embedded(tmp_path / "explore.html", "curve-data")
    assert (curves["runs"], curves["epochs"], set(curves["metrics"])) == (3888, 0, set(METRICS) - {"degenerate"})


def test_a_large_folder_is_cut_to_the_page_and_the_page_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, module = tmp_path / "explore.html", "ncollapse.train.report.explorer.page"
    write_explorer(read_results(folder), ALL, page)
    whole = page.stat().st_size
    monkeypatch.setattr(f"{module}._LARGEST", whole - 1_000)
    write_explorer(read_results(folder), ALL, page)
    assert page.stat().st_size <= whole - 1_000
    assert re.search(r"Curves have at most \d+ evaluations|\d+ of 19 metrics have curves", page.read_text("utf-8"))
    monkeypatch.setattr(f"{module}._LARGEST", 8_000_000)
    monkeypatch.setattr(f"{module}._MOST_RUNS", 3)
    write_explorer(read_results(folder), ALL, page)
    assert "3 of 4 runs are shown" in page.read_text("utf-8")
    assert len(embedded(page, "data")["ids"]) == 3


def test_runs_that_have_not_begun_are_left_out_and_a_folder_without_any_still_makes_a_page(
    folder: Path, tmp_path: Path
) -> None:
    results, page = read_results(folder), tmp_path / "explore.html"
    waiting = results.runs.copy()
    waiting.loc[1:, "status"] = "pending"
    waiting.loc[1:, list(METRICS)] = math.nan
    for runs, note in ((waiting, "3 of 4 runs"), (waiting.iloc[1:], "3 of 3 runs")):
        write_explorer(dataclasses.replace(results, runs=runs), ALL, page)
        assert f"{note} have no evaluation yet" in page.read_text("utf-8")
        assert len(embedded(page, "data")["ids"]) == len(runs) - 3
    write_explorer(dataclasses.replace(results, runs=waiting.iloc[:0]), ALL, page)
    assert embedded(page, "curve-data")["runs"] == 0


def test_a_link_is_replaced_and_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / "explore.html").symlink_to(tmp_path / "other")
    write_explorer(read_results(folder), ALL, tmp_path / "explore.html")
    assert (tmp_path / "other").read_text() == "kept"
    assert not (tmp_path / "explore.html").is_symlink()
