"""The examples run, and what they show is so; those of a package that is absent are skipped."""

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ncollapse import measure

EXAMPLES = Path(__file__).parents[2] / "examples"

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run an example in an empty folder and return its names."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: threads would only wait for each other
    yield lambda name: runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    torch.set_num_threads(threads)


def test_the_table_has_every_example() -> None:
    table = re.findall(r"^\| \[([\w.]+)\]\(([\w./]+)\)", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    found = {p.name for p in EXAMPLES.iterdir() if p.name not in ("README.md", "__pycache__")}
    assert {name for name, _ in table} == found
    assert all((EXAMPLES / target).is_file() for _, target in table)


def test_drop_in_optimizer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("drop_in_optimizer.py")
    assert names["difference"] < 1e-5
    start, decoupled, half, coupled = map(float, re.findall(r"(?:start:|NC0 =) (\S+)", capsys.readouterr().out))
    assert coupled < start < decoupled
    assert coupled < half < decoupled


def test_measure_torchvision(run: Run) -> None:
    result = run("measure_torchvision.py")["result"]
    layers = [result.layers[f"layer{i}"].nc1 for i in range(1, 5)]
    assert layers[-1] < layers[0]
    assert result.train_accuracy > 0.6
    assert result.test.train_accuracy > 0.6
    assert 0 < result.nc5 < 1


@pytest.mark.filterwarnings("ignore")  # those of the library
def test_lightning_callback(run: Run) -> None:
    pytest.importorskip("lightning")
    names = run("lightning_callback.py")
    history = names["probe"].history
    assert len(history) == 4
    assert history[-1].nc1 < history[0].nc1
    logged = names["trainer"].callback_metrics
    assert float(logged["nc/nc1"]) == pytest.approx(history[-1].nc1)
    again = measure(names["model"], (names["x"].float() / 16, names["y"]), head="net.2")
    assert history[-1].nc0 == pytest.approx(again.nc0)
    assert history[-1].train_accuracy == pytest.approx(again.train_accuracy)


@pytest.mark.filterwarnings("ignore")  # those of the library
def test_hugging_face(run: Run) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names = run("hugging_face.py")
    history = names["probe"].history
    assert len(history) == 4
    assert history[-1].nc1 < history[0].nc1
    again = measure(names["model"], names["make_data"](), head="classifier")
    assert history[-1].nc1 == pytest.approx(again.nc1, rel=1e-3)
    assert history[-1].train_accuracy == pytest.approx(again.train_accuracy)
