"""Data sets by their names: those that come with ncollapse, and the user's own."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncollapse.train.config import is_own
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.image_files import read_images
from ncollapse.train.data.own import Data
from ncollapse.train.data.sources import find_own
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.errors import UserError
from ncollapse.train.plugins import Plugins

__all__ = ["Dataset", "check_files", "data_folder", "load"]

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


def load(
    name: str, device: torch.device, *, data_dir: Path | None, download: bool, options: str = "",
    plugins: Plugins | None = None, in_memory: bool = True, pad: int = 0,
) -> Dataset:  # fmt: skip
    """Load one of `DATA_SETS`, or data of the user's, onto a device.

    Args:
        data_dir: see `data_folder`; torchvision's `root`, or for imagefolder the folder that holds train/ and test/.
        download: let torchvision download missing files.
        options: arguments of data of the user's, as JSON.
        plugins: the user's code.
        in_memory: False: stream data of the user's, see `Streamed`.
        pad: of images in memory, see `Data.dataset`.

    Raises:
        UserError: data that is missing, corrupt or unreadable, images of different sizes or with a constant channel;
            data of the user's that cannot be used, see `Data`.
        OwnCodeError: the user's code raises an error.
    """
    if is_own("data", name):
        found, what = find_own(name, options, plugins or Plugins(), in_memory=in_memory)
        if not isinstance(found, Streamed):
            return found.dataset(device, what, pad)
        if pad:
            raise UserError(
                f"{what}: pad = {pad} needs data in memory; of streamed data the transform does it, as "
                f"torchvision.transforms.Pad({pad})"
            )
        return found.to(device)
    if not in_memory:
        raise UserError(f"data set {name} is read into memory; in_memory = false goes with data of your own")
    folder = data_folder(data_dir)
    if name == "digits":
        raw = _digits()
    elif name == "imagefolder":
        raw = _image_folder(folder)
    else:
        raw = _torchvision(name, folder, download)
    try:
        data = Data(*raw)
    except UserError as error:
        raise UserError(f"data set {name}: {error}") from None
    return data.dataset(device, f"data set {name}", pad)


#: Images, labels, those of the validation, and the names of the classes, as `Data` takes them.
_Raw = tuple[Any, Any, Any, Any, tuple[str, ...]]


def _digits() -> _Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = images.astype(np.uint8).reshape(-1, 8, 8)
    # The split is part of the data set, so it does not depend on a run's seed.
    train, val = train_test_split(range(len(x)), test_size=0.2, stratify=labels, random_state=0)
    return x[train], labels[train], x[val], labels[val], tuple(str(k) for k in range(10))


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
    train, val = sets
    return train.data, train.targets, val.data, val.targets, tuple(train.classes)


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
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0), device="cpu")
    return torch.stack(tensors)[order], torch.tensor(targets)[order], classes


def _shape(image: Tensor) -> str:
    return "×".join(str(n) for n in image.shape[-2:])
