"""Data sets: the embedded one, torchvision's files, image folders, and faults in them."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ncollapse.train.data import sets as data_module
from ncollapse.train.data.sets import check_files, data_folder, load
from ncollapse.train.errors import UserError

CPU = torch.device("cpu")


def write_idx(folder: Path, count: int) -> None:
    """Write files in MNIST's format with a few images."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def write_images(folder: Path, size: int = 8, mode: str = "RGB") -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / split / name / f"{i}.png")


def test_digits_are_normalised_and_split_the_same_every_time() -> None:
    data = load("digits", data_dir=None, download=False, device=CPU)
    assert data.train_x.shape == (1437, 1, 8, 8)
    assert data.val_x.shape == (360, 1, 8, 8)
    assert (data.channels, data.size, len(data.classes)) == (1, 8, 10)
    assert data.train_x.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_x.std().item() == pytest.approx(1, abs=1e-3)
    assert data.train_y.bincount().min() >= 139
    torch.manual_seed(5)
    again = load("digits", data_dir=None, download=False, device=CPU)
    assert again.fingerprint == data.fingerprint == "518a1841460a94ca"
    assert torch.equal(again.train_y, data.train_y)


def test_limit_takes_the_first_samples() -> None:
    data = load("digits", data_dir=None, download=False, device=CPU)
    assert torch.equal(data.limited(100).train_x, data.train_x[:100])
    assert len(data.limited(100).val_y) == 360
    assert data.limited(None) is data
    assert data.limited(10**6) is data


def test_torchvision_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, 20)
    published = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in raw.iterdir()}
    monkeypatch.setitem(data_module._MD5, "mnist", published)
    data = load("mnist", data_dir=tmp_path, download=False, device=CPU)
    assert data.train_x.shape == (20, 1, 28, 28)
    assert data.train_y.tolist() == [*range(10), *range(10)]
    assert check_files("mnist", tmp_path) == "complete, checksums match"
    assert "missing" in check_files("fashion-mnist", tmp_path)
    assert "missing" in check_files("cifar10", tmp_path)


def test_corrupt_files_are_named(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw, 20)  # complete files, but not the published ones
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte is corrupt: the MD5 .* delete it.* --download"):
        load("fashion-mnist", data_dir=tmp_path, download=False, device=CPU)
    assert check_files("fashion-mnist", tmp_path).startswith(f"corrupt: {raw}/train-images-idx3-ubyte, ")
    (raw / "train-images-idx3-ubyte").unlink()
    assert "missing" in check_files("fashion-mnist", tmp_path)


def test_known_checksums_have_torchvisions_file_names() -> None:
    """The files with known checksums are those that torchvision reads."""
    import torchvision

    for name, files in data_module._MD5.items():
        source = getattr(torchvision.datasets, data_module._TORCHVISION[name])
        assert {file.removesuffix(".gz") for file, _ in source.resources} == set(files)


def test_cifar_images_are_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    rows = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 4]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    with pytest.raises(UserError, match=r"cifar10: .*data_batch_1.* corrupt"):
        load("cifar10", data_dir=tmp_path, download=False, device=CPU)
    monkeypatch.setattr(data_module, "_corrupt", lambda files: [])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
    data = load("cifar10", data_dir=tmp_path, download=False, device=CPU)
    assert data.train_x.shape == (10, 3, 32, 32)
    restored = data.train_x[0] * 255  # any increasing map keeps the order of the pixels within a channel
    assert restored[0].flatten().argsort().tolist() == torch.from_numpy(rows[0, :1024].copy()).argsort().tolist()
    assert data.val_y.tolist() == [3, 4]


def test_the_error_for_missing_data_names_the_folder_and_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"fashion-mnist not found in {tmp_path}: .*--data-dir.*--download"):
        load("fashion-mnist", data_dir=tmp_path, download=False, device=CPU)
    monkeypatch.setenv("NCOLLAPSE_DATA", str(tmp_path))
    assert data_folder(None) == tmp_path
    assert data_folder(Path("x")) == Path("x")
    monkeypatch.delenv("NCOLLAPSE_DATA")
    assert data_folder(None) == Path("data")


@pytest.mark.parametrize(("mode", "size"), [("RGB", 8), ("L", 12)])
def test_image_folder(tmp_path: Path, mode: str, size: int) -> None:
    write_images(tmp_path, size, mode)
    data = load("imagefolder", data_dir=tmp_path, download=False, device=CPU)
    assert data.train_x.shape == (6, 3, size, size)
    assert data.train_y.bincount().tolist() == [3, 3]
    assert data.train_y.tolist() != sorted(data.train_y.tolist())  # shuffled, for --limit
    again = load("imagefolder", data_dir=tmp_path, download=False, device=CPU)
    assert again.fingerprint == data.fingerprint
    assert data.classes == ("cat", "dog")


def test_image_folder_faults_are_named(tmp_path: Path) -> None:
    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load("imagefolder", data_dir=tmp_path, download=False, device=CPU)

    fails("no folder .*train; --data-dir must hold")
    write_images(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    fails("bird")  # a class without images
    (tmp_path / "train" / "bird").rmdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "cat" / "9.png")
    fails(r"square and all of one size; found \['8×8', '9×9'\]")
    (tmp_path / "train" / "cat" / "9.png").write_bytes(b"not an image")
    fails("cannot identify")
    (tmp_path / "train" / "cat" / "9.png").unlink()
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    fails(r"train/ has the classes \('cat', 'dog'\), test/ has \('cat', 'wolf'\)")


def damaged(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load("imagefolder", data_dir=folder, download=False, device=CPU)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    """Pillow's conversion would make all above 255 white."""
    write_images(tmp_path / "eight", mode="L")
    for path in sorted((tmp_path / "eight").rglob("*.png")):
        other = tmp_path / "sixteen" / path.relative_to(tmp_path / "eight").with_suffix(suffix)
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 257).save(other)
    eight, sixteen = (
        load("imagefolder", data_dir=tmp_path / name, download=False, device=CPU) for name in ("eight", "sixteen")
    )
    assert torch.equal(eight.train_x, sixteen.train_x)
    assert eight.fingerprint == sixteen.fingerprint


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, size=32)
    path = tmp_path / "train" / "cat" / "1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cat/1.png cannot be read: " in damaged(tmp_path)
    path.write_bytes(b"")
    assert "cat/1.png cannot be read: " in damaged(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert damaged(tmp_path).endswith("cat/1.png is not a file")
    path.unlink()
    path.symlink_to(path.name)
    assert "cat/1.png" in damaged(tmp_path)
    path.unlink()
    path.with_suffix(".ppm").write_bytes(b"P6 70000 70000 255\n" + bytes(100))
    assert "70000×70000 pixels, more than" in damaged(tmp_path) or "1.ppm cannot be read" in damaged(tmp_path)
    path.with_suffix(".ppm").write_bytes(b"P6 5000 5000 255\n" + bytes(100))
    assert "1.ppm has 5000×5000 pixels, more than 16,777,216" in damaged(tmp_path)
    path.with_suffix(".ppm").unlink()
    Image.fromarray(np.full((32, 32), 1e5, np.float32)).save(path.with_suffix(".tiff"))
    assert "1.tiff has values outside 0 to 65,535" in damaged(tmp_path)


def test_a_loop_of_links_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "test" / "dog" / "again").symlink_to("..")
    assert "test/dog/again is a symbolic link to a folder that it lies in" in damaged(tmp_path)
    (tmp_path / "test" / "dog" / "again").unlink()
    (tmp_path / "test" / "dog").rename(tmp_path / "elsewhere")
    (tmp_path / "test" / "dog").symlink_to("../elsewhere")  # a class may lie elsewhere
    assert load("imagefolder", data_dir=tmp_path, download=False, device=CPU).classes == ("cat", "dog")


def test_images_beyond_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    assert "6 images of 8×8 take 0.0 GiB" in damaged(tmp_path)
