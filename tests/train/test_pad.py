"""The border of images: torchvision's Pad and Normalize, wherever data come from; ids, stacks and folders."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from ncollapse.train import load_metrics, load_runs, train
from ncollapse.train.config import RunConfig, split_data_key, unpadded
from ncollapse.train.data import own, sets
from ncollapse.train.data.own import Data
from ncollapse.train.data.sets import load
from ncollapse.train.engine.grouping import StackKey, make_stacks
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.planning import loader
from ncollapse.train.engine.preview import print_preview
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.engine.throughput import DataFacts
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid, load_grid, run_settings
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.merging import merge_folders
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
GREY, COLOURS = (RNG.integers(0, 256, shape, np.uint8) for shape in ((12, 9, 9), (12, 9, 9, 3)))
Y = np.arange(12) % 3


def as_torchvision(images: np.ndarray, pad: int) -> torch.Tensor:
    """Pad, ToTensor, and Normalize with what these give."""
    first = v2.Compose([v2.Pad(pad), v2.ToImage(), v2.ToDtype(torch.float64, scale=True)])
    x = torch.stack([first(Image.fromarray(image)) for image in images])
    normalize = v2.Normalize(x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3), correction=0).tolist())
    return torch.stack([normalize(image) for image in x])


@pytest.mark.parametrize("images", [GREY, COLOURS], ids=["grey", "colours"])
@pytest.mark.parametrize("pad", [0, 1, 2, 5])
def test_images_are_those_of_torchvision(images: np.ndarray, pad: int) -> None:
    plain = Data(images, Y, images[:4], Y[:4]).dataset(CPU, "mine")
    data = Data(images, Y, images[:4], Y[:4]).dataset(CPU, "mine", pad)
    expected = as_torchvision(images, pad)
    assert data.input_shape == (images[0].size // 81, 9 + 2 * pad, 9 + 2 * pad)
    torch.testing.assert_close(data.train_x.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(data.val_x.double(), expected[:4], rtol=0, atol=2e-6)
    assert data.fingerprint == plain.fingerprint  # the same data were read


def test_of_data_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(name: str, pad: int) -> Any:
        return load(name, CPU, data_dir=tmp_path, download=False, pad=pad)

    digits, wide = loaded("digits", 0), loaded("digits", 2)
    assert (digits.input_shape, wide.input_shape) == ((1, 8, 8), (1, 12, 12))
    raw = torch.from_numpy(load_digits().images)
    assert wide.train_x.std().item() == pytest.approx(1, abs=1e-3)
    assert wide.train_x.min().item() == pytest.approx(-float(raw.mean()) * 64 / 144 / (
        float((raw**2).mean()) * 64 / 144 - (float(raw.mean()) * 64 / 144) ** 2) ** 0.5, rel=0.02)  # fmt: skip
    for split in ("train", "test"):
        for i in range(3):
            for k, name in enumerate(("cat", "dog")):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(COLOURS[2 * i + k]).save(tmp_path / split / name / f"{i}.png")
    folder = loaded("imagefolder", 3)
    assert folder.input_shape == (3, 15, 15)
    expected = as_torchvision(COLOURS[:6], 3)
    torch.testing.assert_close(
        *(x.double().flatten(1).sort(0).values for x in (folder.train_x, expected)), rtol=0, atol=2e-6
    )
    monkeypatch.setattr(sets, "_torchvision", lambda *args: (GREY, Y, GREY, Y, ("a", "b", "c")))
    torch.testing.assert_close(loaded("mnist", 2).train_x.double(), as_torchvision(GREY, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (RNG.normal(size=(12, 5)), r"pad = 2 is a black border of images \[C, H, W\] of bytes; samples are \[5\] of"),
        (GREY.reshape(12, -1), r"samples are \[81\] of torch.uint8"),
        (RNG.integers(0, 50, (12, 7)), r"samples are \[7\] of torch.int64"),
        (RNG.random((12, 9, 9, 3)), r"are \[3, 9, 9\] of torch.float32; pad them yourself, with the value that black"),
    ],
)
def test_other_samples_are_refused(x: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=f"mine: .*{message}"):
        Data(x, Y, x, Y).dataset(CPU, "mine", 2)


def test_streamed_data_and_more_than_fits_in_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = TensorDataset(torch.rand(6, 3, 8, 8), torch.arange(6) % 3)
    plugins = Plugins(given={"data": {"mine": lambda: (samples, samples)}})
    with pytest.raises(UserError, match=r"pad = 2 needs data in memory; .* as torchvision\.transforms\.Pad\(2\)"):
        load("mine", CPU, data_dir=None, download=False, plugins=plugins, in_memory=False, pad=2)
    monkeypatch.setattr(own, "available_memory", lambda: 10_000_000)
    Data(GREY, Y, GREY, Y).dataset(CPU, "mine", 2)
    with pytest.raises(UserError, match=r"12 images with pad = 1000 need 0\.4 GiB, 0\.0 are free"):
        Data(GREY, Y, GREY, Y).dataset(CPU, "mine", 1000)
    with pytest.raises(UserError, match="pad = -1: input should be greater than or equal to 0"):
        train("mlp", data="digits", pad=-1)


def test_ids_and_keys() -> None:
    """Without a border both are those of older versions."""
    assert RunConfig(pad=0).id == "fdb795d22450" != RunConfig(pad=2).id
    options = {"data_options": {"a": "{x} padded by 3"}}
    for run in (
        RunConfig(), RunConfig(data="x padded by 2.npz"), RunConfig(data="my own/padded by 2.py:f", **options),
        RunConfig(data="digits"),
    ):  # fmt: skip
        key = f"{run.data} {run.data_options}".rstrip()
        assert run.data_key == unpadded(key) == key
        padded = dataclasses.replace(run, pad=12)
        assert unpadded(padded.data_key) == key != padded.data_key
        assert split_data_key(padded.data_key) == (run.data, run.data_options, 12)
        assert split_data_key(key) == (run.data, run.data_options, 0)
        assert StackKey.of(padded) != StackKey.of(run)
    stacks = make_stacks([RunConfig(pad=pad, seed=seed) for pad in (0, 2) for seed in range(3)], lambda key: 6)
    assert sorted({run.pad for run in stack} for stack in stacks) == [{0}, {2}]


@pytest.fixture
def grid() -> Grid:
    settings: dict[str, Any] = {"model": "mlp", "epochs": 1, "limit": 200, "width": 10}
    return Grid("padded", tuple(RunConfig(pad=pad, lr=lr, **settings) for pad in (0, 2, 3) for lr in (0.1, 0.01)))


def test_borders_of_one_data_set_side_by_side(grid: Grid, tmp_path: Path) -> None:
    """In one sweep and one folder; each run has the numbers that it has when trained alone on its own images."""
    quiet, load_data = Console(quiet=True), loader(grid, None, False)
    options = Options(workers=1)
    assert sweep(grid, tmp_path / "all", load_data, CPU, options, quiet) == 6
    part = dataclasses.replace(grid, runs=grid.runs[:2])
    assert sweep(part, tmp_path / "parts", load_data, CPU, options, quiet) == 2
    print_preview(grid, tmp_path / "parts", load_data, CPU, options, quiet)
    assert sweep(grid, tmp_path / "parts", load_data, CPU, options, quiet) == 4
    one, other = (load_metrics(tmp_path / name) for name in ("all", "parts"))
    assert one.equals(other)
    runs = load_runs(tmp_path / "all")
    assert runs["pad"].tolist() == [0, 0, 2, 2, 3, 3]
    assert runs.groupby("stack")["pad"].nunique().max() == 1
    for run in grid.runs[::2]:
        data = load("digits", CPU, data_dir=None, download=False, pad=run.pad)
        *_, last, _ = Training([run], data, CPU)
        assert not isinstance(last, int)
        found = runs[runs.id == run.id].iloc[0]
        assert last.values["train_loss"][0] == pytest.approx(found.train_loss, rel=1e-5)
    assert merge_folders([tmp_path / "all", tmp_path / "parts"], tmp_path / "both").repeated == 6


def test_other_data_of_the_same_name_are_refused_with_any_border(grid: Grid, tmp_path: Path) -> None:
    quiet, load_data = Console(quiet=True), loader(grid, None, False)
    sweep(dataclasses.replace(grid, runs=grid.runs[:1]), tmp_path, load_data, CPU, Options(workers=1), quiet)

    def another(key: str, device: torch.device) -> Any:
        return dataclasses.replace(load_data(key, device), fingerprint="another")

    rest = dataclasses.replace(grid, runs=grid.runs[2:3])
    for act in (sweep, print_preview):
        with pytest.raises(UserError, match=r"the data set digits .*is not the one"):
            act(rest, tmp_path, another, CPU, Options(workers=1), quiet)


def test_augmentation_and_memory_see_the_padded_images() -> None:
    data = load("digits", CPU, data_dir=None, download=False, pad=2)
    run = RunConfig(model="cnn", augment="flip-crop", pad=2, epochs=1, limit=40, width=8)
    training = Training([run], data, CPU)
    list(training)
    facts = DataFacts.of(data)
    assert facts.input_shape == (1, 12, 12)
    assert training.data.input_shape == (1, 12, 12)


def test_train_takes_it() -> None:
    result = train("mlp", data="digits", width=16, pad=2, epochs=1, limit=100, progress=False)
    first = next(iter(result.model.parameters()))
    assert first.shape == (16, 144)


PRESETS = ("paper", "paper-table", "paper-coupling", "paper-momentum")


def test_the_papers_presets_pad_28_to_32(tmp_path: Path) -> None:
    for name in PRESETS:
        pads = Counter((run.data, run.pad) for run in load_grid(name).runs)
        assert pads.keys() <= {("fashion-mnist", 2), ("mnist", 2), ("cifar10", 0)}
        assert {run.pad for run in load_grid(name, {"data": ["cifar10"]}).runs} == {0}
        assert {run.pad for run in load_grid(name, {"pad": [0, 1]}).runs} == {0, 1}
    assert len(load_grid("paper", {"data": ["fashion-mnist"], "model": ["resnet9"]}).runs) == 648
    assert run_settings("paper", {})["pad"] == 2
    assert run_settings("paper", {"data": "cifar10"})["pad"] == 0
    assert run_settings("paper", {"pad": 1})["pad"] == 1


def test_a_table_of_borders(tmp_path: Path) -> None:
    def made(text: str) -> Any:
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return load_grid(str(path)).runs

    runs = made(
        'data = ["digits", "mnist"]\n[[grid]]\nlr = [0.1, 0.2]\n[[grid]]\nlr = 0.3\npad = 1\n[pad]\nmnist = 3\n'
    )
    assert [(run.data, run.pad) for run in runs] == [*[("digits", 0)] * 2, *[("mnist", 3)] * 2, ("digits", 1),
                                                     ("mnist", 1)]  # fmt: skip
    assert {run.pad for run in made("pad = [0, 2]\n")} == {0, 2}
    assert {run.pad for run in made("pad = {digits = 1}\n")} == {1}
    for text, message in (
        ("pad = {digit = 1}", "pad: unknown data set 'digit', did you mean 'digits'"),
        ("pad = {digits = [1, 2]}", r"pad = \[1, 2\]: one value is meant here"),
        ("pad = {digits = -1}", "pad = -1: input should be greater"),
        ("pad = {digits = {a = 1}}", "pad = "),
        ("pad = 5000", "pad = 5000: input should be less than"),
        ("pad = 1.5", "pad = 1.5: "),
    ):
        with pytest.raises(UserError, match=message):
            made(text + "\n")
