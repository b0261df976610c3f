"""Data sets as whole tensors on the device, so that the training loop runs no Python per image."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncollapse.train.data.image_files import read_images
from ncollapse.train.errors import UserError

# Data set name -> class in torchvision.datasets.
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
# File -> MD5 of the published file, unpacked: torchvision checks only those of its downloads and of CIFAR-10.
_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and validation images, normalised by the training images' mean and standard deviation per channel.

    Attributes:
        train_x, val_x: images `[N, C, H, W]` float32, H = W.
        train_y, val_y: labels `[N]` int64.
        classes: their names.
        fingerprint: a hash of the raw images and labels; a resumed sweep must have the same data.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def channels(self) -> int:
        """C."""
        return self.train_x.shape[1]

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.train_x.shape[2]

    def limited(self, limit: int | None) -> "Dataset":
        """Return the data set with only the first `limit` training samples."""
        if limit is None or limit >= len(self.train_y):
            return self
        return dataclasses.replace(self, train_x=self.train_x[:limit], train_y=self.train_y[:limit])

    def to(self, device: torch.device) -> "Dataset":
        """Return the data set on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "val_x", "val_y")}
        return dataclasses.replace(self, **tensors)


def data_folder(data_dir: Path | None) -> Path:
    """Return the folder of the data sets: the argument, else $NCOLLAPSE_DATA, else ./data."""
    return data_dir or Path(os.environ.get("NCOLLAPSE_DATA") or "data")


def check_files(name: str, folder: Path) -> str:
    """Check whether a data set's files exist and match their MD5; return the result in words."""
    if name == "digits":
        return "comes with scikit-learn"
    if name == "imagefolder":
        exist = all((folder / split).is_dir() for split in ("train", "test"))
        return "train/ and test/ exist" if exist else "no train/ and test/ in the data folder"
    files = _files(name, folder)
    if not all(path.is_file() for path in files):
        return "missing; use --data-dir or --download"
    bad = _corrupt(files)
    return f"corrupt: {bad}" if bad else "complete, checksums match"


def _files(name: str, folder: Path) -> dict[Path, str]:
    """Return the files of a torchvision data set and their MD5."""
    if name in _MD5:
        return {folder / _TORCHVISION[name] / "raw" / file: md5 for file, md5 in _MD5[name].items()}
    from torchvision.datasets import CIFAR10

    return {folder / CIFAR10.base_folder / file: md5 for file, md5 in CIFAR10.train_list + CIFAR10.test_list}


def _corrupt(files: dict[Path, str]) -> str:
    """List the existing files whose MD5 differs from the published one."""
    existing = {path: md5 for path, md5 in files.items() if path.is_file()}
    return ", ".join(str(path) for path, md5 in existing.items() if hashlib.md5(path.read_bytes()).hexdigest() != md5)


def load(name: str, device: torch.device, *, data_dir: Path | None, download: bool) -> Dataset:
    """Load one of `DATA_SETS` onto a device.

    Args:
        data_dir: see `data_folder`; torchvision's `root`, or for imagefolder the folder that holds train/ and test/.
        download: let torchvision download missing files.

    Raises:
        UserError: data that is missing, corrupt or unreadable, images of different sizes or with a constant channel.
    """
    folder = data_folder(data_dir)
    if name == "digits":
        train_x, train_y, val_x, val_y, classes = _digits()
    elif name == "imagefolder":
        train_x, train_y, val_x, val_y, classes = _image_folder(folder)
    else:
        train_x, train_y, val_x, val_y, classes = _torchvision(name, folder, download)
    digest = hashlib.sha256()
    for tensor in (train_x, train_y, val_x, val_y):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    mean = train_x.double().mean((0, 2, 3), keepdim=True)
    std = train_x.double().std((0, 2, 3), keepdim=True, correction=0)
    if not bool((std > 0).all()):
        raise UserError(f"data set {name}: a channel of the training images is constant, so it cannot be normalised")
    mean, std = mean.float().to(device), std.float().to(device)
    train_x, val_x = ((x.to(device).float() - mean) / std for x in (train_x, val_x))
    return Dataset(train_x, train_y.to(device), val_x, val_y.to(device), classes, digest.hexdigest()[:16])


_Raw = tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]


def _digits() -> _Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    # The split is part of the data set, so it does not depend on a run's seed.
    train, val = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=0)
    return x[train], y[train], x[val], y[val], tuple(str(k) for k in range(10))


def _torchvision(name: str, folder: Path, download: bool) -> _Raw:
    import torchvision

    source = getattr(torchvision.datasets, _TORCHVISION[name])
    if bad := _corrupt(_files(name, folder)):
        raise UserError(
            f"data set {name}: {bad} is corrupt: the MD5 differs from that of the published file; delete it, then copy "
            "it again or fetch it with --download"
        )
    try:
        sets = [source(root=folder, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        hint = "give its folder with --data-dir or NCOLLAPSE_DATA, or fetch it with --download"
        raise UserError(f"data set {name} not found in {folder.resolve()}: {hint} ({error})") from None
    except OSError as error:
        raise UserError(f"data set {name}: {error}; check the network and the folder {folder.resolve()}") from None
    (train_x, train_y), (val_x, val_y) = (_images(s.data, s.targets) for s in sets)
    return train_x, train_y, val_x, val_y, tuple(sets[0].classes)


def _images(data: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Convert bytes `[N, H, W]` or `[N, H, W, C]` to `[N, C, H, W]`, and labels to int64."""
    x = torch.as_tensor(data)
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.as_tensor(targets, dtype=torch.int64)


def _image_folder(folder: Path) -> _Raw:
    (train_x, train_y, classes), (val_x, val_y, val_classes) = (_read_split(folder / s) for s in ("train", "test"))
    if classes != val_classes:
        raise UserError(f"imagefolder: train/ has the classes {classes}, test/ has {val_classes}")
    if train_x.shape[1:] != val_x.shape[1:]:
        raise UserError(f"imagefolder: train/ has {_shape(train_x)} images, test/ {_shape(val_x)}")
    return train_x, train_y, val_x, val_y, classes


def _read_split(folder: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    if not folder.is_dir():
        raise UserError(f"imagefolder: no folder {folder}; --data-dir must hold train/CLASS/* and test/CLASS/*")
    tensors, targets, classes = read_images(folder)
    shapes = {_shape(t) for t in tensors}
    if len(shapes) > 1 or tensors[0].shape[1] != tensors[0].shape[2]:
        raise UserError(f"imagefolder {folder}: images must be square and all of one size; found {sorted(shapes)[:5]}")
    # Folders are read class by class, and --limit would take the first class alone: shuffle, with a fixed seed.
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0))
    return torch.stack(tensors)[order], torch.tensor(targets)[order], classes


def _shape(image: Tensor) -> str:
    return "×".join(str(n) for n in image.shape[-2:])
