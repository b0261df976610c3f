"""Data sets as whole tensors on the device: no per-image Python in the training loop."""

import dataclasses
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ncollapse.train.config import Data
from ncollapse.train.errors import UserError

DATA_SETS: tuple[str, ...] = get_args(Data)
#: data set name -> class in torchvision.datasets
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
#: MD5 of the published files, unpacked: torchvision looks at those of its downloads and of CIFAR-10 alone.
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

    `train_x`, `val_x` are `[N, C, H, W]` float32 with H = W, `train_y`, `val_y` `[N]` int64. `fingerprint` is a hash
    of the raw images and labels: what a resumed sweep must find again.
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
        """The same with only the first `limit` training samples."""
        if limit is None or limit >= len(self.train_y):
            return self
        return dataclasses.replace(self, train_x=self.train_x[:limit], train_y=self.train_y[:limit])

    def to(self, device: torch.device) -> "Dataset":
        """The same on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "val_x", "val_y")}
        return dataclasses.replace(self, **parts)


def data_folder(data_dir: Path | None) -> Path:
    """Where data sets lie: the argument, else $NCOLLAPSE_DATA, else ./data."""
    return data_dir or Path(os.environ.get("NCOLLAPSE_DATA") or "data")


def find(name: str, folder: Path) -> str:
    """Whether a data set is there and whole, in words."""
    if name == "digits":
        return "comes with scikit-learn"
    if name == "imagefolder":
        parts = [split for split in ("train", "test") if (folder / split).is_dir()]
        return "train/ and test/ are there" if len(parts) == 2 else "no train/ and test/ in the data folder"
    files = _files(name, folder)
    if not all(path.is_file() for path in files):
        return "missing; use --data-dir or --download"
    bad = _corrupt(files)
    return f"corrupt: {', '.join(str(path) for path in bad)}" if bad else "there, checksums right"


def _files(name: str, folder: Path) -> dict[Path, str]:
    """The files of a torchvision data set and their MD5."""
    if name in _MD5:
        return {folder / _TORCHVISION[name] / "raw" / file: md5 for file, md5 in _MD5[name].items()}
    from torchvision.datasets import CIFAR10

    return {folder / CIFAR10.base_folder / file: md5 for file, md5 in CIFAR10.train_list + CIFAR10.test_list}


def _corrupt(files: dict[Path, str]) -> list[Path]:
    """Those that are there and are not what was published."""
    bad = []
    for path, md5 in files.items():
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() != md5:
                    bad.append(path)
    return bad


def load(name: str, device: torch.device, *, data_dir: Path | None, download: bool) -> Dataset:
    """Load a data set onto the device.

    Args:
        name: digits, mnist, fashion-mnist, cifar10 or imagefolder.
        device: where to.
        data_dir: see `data_folder`; torchvision's `root`, or for imagefolder the folder that holds train/ and test/.
        download: let torchvision download what is missing.

    Raises:
        UserError: data that is missing, corrupt, unreadable, or not images of one size.
    """
    folder = data_folder(data_dir)
    if name == "digits":
        raw = _digits()
    elif name == "imagefolder":
        raw = _image_folder(folder)
    else:
        raw = _torchvision(name, folder, download)
    train_x, train_y, val_x, val_y, classes = raw
    digest = hashlib.sha256()
    for tensor in (train_x, train_y, val_x, val_y):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    mean = train_x.double().mean((0, 2, 3), keepdim=True)
    std = train_x.double().std((0, 2, 3), keepdim=True, correction=0)
    if not bool((std > 0).all()):
        raise UserError(f"data set {name}: a channel of the training images is constant, so it cannot be normalised")
    mean, std = mean.float().to(device), std.float().to(device)
    return Dataset(
        (train_x.to(device).float() - mean) / std,
        train_y.to(device),
        (val_x.to(device).float() - mean) / std,
        val_y.to(device),
        classes,
        digest.hexdigest()[:16],
    )


Raw = tuple[Tensor, Tensor, Tensor, Tensor, tuple[str, ...]]


def _digits() -> Raw:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    # The split is part of the data set: it does not move with a run's seed.
    train, val = train_test_split(range(len(y)), test_size=0.2, stratify=labels, random_state=0)
    return x[train], y[train], x[val], y[val], tuple(str(k) for k in range(10))


def _torchvision(name: str, folder: Path, download: bool) -> Raw:
    import torchvision

    source = getattr(torchvision.datasets, _TORCHVISION[name])
    if bad := _corrupt(_files(name, folder)):
        raise UserError(
            f"data set {name}: {', '.join(str(path) for path in bad)} is corrupt: the MD5 is not that of the published "
            "file; delete it, then put it there again or let it be fetched with --download"
        )
    try:
        sets = [source(root=folder, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        hint = "give its folder with --data-dir or NCOLLAPSE_DATA, or let it be fetched with --download"
        raise UserError(f"data set {name} not found in {folder.resolve()}: {hint} ({error})") from None
    except OSError as error:
        raise UserError(f"data set {name}: {error}; check the network and the folder {folder.resolve()}") from None
    (train_x, train_y), (val_x, val_y) = (_images(s.data, s.targets) for s in sets)
    return train_x, train_y, val_x, val_y, tuple(sets[0].classes)


def _images(data: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """`[N, H, W]` or `[N, H, W, C]` bytes as `[N, C, H, W]`, and the labels."""
    x = torch.as_tensor(data)
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.as_tensor(targets, dtype=torch.int64)


def _image_folder(folder: Path) -> Raw:
    splits = {}
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise UserError(
                f"imagefolder: no folder {folder / split}; --data-dir must hold train/CLASS/* and test/CLASS/*"
            )
        splits[split] = _read_split(folder / split)
    (train_x, train_y, classes), (val_x, val_y, val_classes) = splits["train"], splits["test"]
    if classes != val_classes:
        raise UserError(f"imagefolder: train/ has the classes {classes}, test/ has {val_classes}")
    if train_x.shape[1:] != val_x.shape[1:]:
        raise UserError(f"imagefolder: train/ has {_shape(train_x)} images, test/ {_shape(val_x)}")
    return train_x, train_y, val_x, val_y, classes


def _read_split(folder: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    import torchvision
    from torchvision.transforms.functional import pil_to_tensor

    try:
        images = torchvision.datasets.ImageFolder(str(folder))
        # PIL decodes outside Python's lock, so threads are enough.
        with ThreadPoolExecutor() as pool:
            tensors = list(pool.map(lambda i: pil_to_tensor(images[i][0]), range(len(images))))
    except OSError as error:  # no class folders, a class without images, an image that cannot be read
        raise UserError(f"imagefolder {folder}: {error}") from None
    shapes = {_shape(t) for t in tensors}
    if len(shapes) > 1 or tensors[0].shape[1] != tensors[0].shape[2]:
        raise UserError(f"imagefolder {folder}: images must be square and all of one size; found {sorted(shapes)[:5]}")
    # Folders come class by class, so that --limit would take the first class alone: shuffled, the same way every time.
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(0))
    return torch.stack(tensors)[order], torch.tensor(images.targets)[order], tuple(images.classes)


def _shape(image: Tensor) -> str:
    return "×".join(str(n) for n in image.shape[-2:])
