"""Data of the user's, or of ncollapse's, as raw values: checked, and made into a `Dataset`."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ncollapse.train.data.arrays import samples_of
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.labels import check_labels
from ncollapse.train.errors import UserError
from ncollapse.train.limits import available_memory

#: Bytes per value of padded images: as bytes, in float32, and standardised.
_BYTES = 9


class Data:
    """Samples and labels to train and to test on.

    The type of the samples decides what is done with them. Bytes (uint8) and uint16, which is scaled to bytes, are
    standardised by the training samples' mean and standard deviation, per channel; vectors of bytes by one of each.
    Floats are taken as they are, in float32: normalise them yourself. Other integers are tokens and stay integers,
    int64.

    Bytes `[N, H, W]` are grey images. Bytes and floats of four axes are images `[N, C, H, W]` or `[N, H, W, C]`: the
    channels are the axis of at most 4; where neither or both are, the last one if the other two are equal and it
    differs, and both are longer than 4, else the first. All other shapes stay: vectors `[N, d]`, tokens `[N, T]`,
    floats `[N, T, d]`.

    Args:
        x, x_test: samples `[N, …]`: tensors or arrays (NumPy, or anything with `__array__`), both of one type.
        y, y_test: labels in `[0, K)`, integers `[N]` or one-hot `[N, K]`: tensors, arrays or lists.
        classes: names of the K classes, some of which may have no samples; None: K is one more than the largest label.

    Attributes:
        x, x_test: uint8, float32 or int64, on the CPU; images `[N, C, H, W]`.
        y, y_test: `[N]` int64.
        classes: K names.
        notes: sentences for the user about the data.

    Raises:
        UserError: something else; values that are not finite; lengths, shapes or types that disagree; no samples.
    """

    def __init__(self, x: Any, y: Any, x_test: Any, y_test: Any, classes: Sequence[str] | None = None) -> None:
        self.x, self.x_test = samples_of(x, "x"), samples_of(x_test, "x_test")
        labels = check_labels(y, y_test, classes, ("y", "y_test"), (len(self.x), len(self.x_test)))
        self.y, self.y_test, self.classes, self.notes = *labels, labels.notes
        if self.x.shape[1:] != self.x_test.shape[1:]:
            raise UserError(f"x has samples {list(self.x.shape[1:])}, x_test has {list(self.x_test.shape[1:])}")
        if self.x.dtype != self.x_test.dtype:
            raise UserError(f"x has values of the type {self.x.dtype}, x_test of {self.x_test.dtype}; give both alike")

    def dataset(self, device: torch.device, what: str, pad: int = 0) -> Dataset:
        """Return what the network takes, on a device.

        Args:
            pad: pixels of black border that images of bytes get on every side, before they are standardised. Mean and
                standard deviation are those of the padded images, as in scripts with torchvision's `Pad`, `ToTensor`
                and a `Normalize` of what these give. The fingerprint is that of the images without it.

        Raises:
            UserError: bytes with a constant channel, a border for other samples than images of bytes, or one with which
                they do not fit in memory; the message begins with `what`.
        """
        train_x, val_x = (_padded(x, pad, what) if pad else x for x in (self.x, self.x_test))
        if train_x.dtype == torch.uint8:
            axes = (0, *range(2, train_x.dim())) if train_x.dim() > 2 else (0, 1)
            mean = train_x.double().mean(axes, keepdim=True)
            std = train_x.double().std(axes, keepdim=True, correction=0)
            if not bool((std > 0).all()):
                raise UserError(f"{what}: a channel of the training images is constant, so it cannot be normalised")
            mean, std = mean.float().to(device), std.float().to(device)
            train_x, val_x = ((x.to(device).float() - mean) / std for x in (train_x, val_x))
        return Dataset(
            train_x.to(device), self.y.to(device), val_x.to(device), self.y_test.to(device), self.classes,
            self._fingerprint(), self.notes,
        )  # fmt: skip

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.x, self.y, self.x_test, self.y_test):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        if self.x.dtype != torch.uint8:  # images have no type in theirs, as it always was
            digest.update(str(self.x.dtype).encode())
        if len(self.classes) > 1 + int(self.y.max()):  # the labels do not tell how many there are
            digest.update(str(len(self.classes)).encode())
        return digest.hexdigest()[:16]


def _padded(x: Tensor, pad: int, what: str) -> Tensor:
    """Return images with a black border."""
    if x.dim() != 4 or x.dtype != torch.uint8:
        hint = "; pad them yourself, with the value that black has in them" if x.dim() == 4 else ""
        raise UserError(
            f"{what}: pad = {pad} is a black border of images [C, H, W] of bytes; samples are {list(x.shape[1:])} of "
            f"{x.dtype}{hint}"
        )
    samples, channels, height, width = x.shape
    needed, free = samples * channels * (height + 2 * pad) * (width + 2 * pad) * _BYTES, available_memory()
    if needed > free:
        raise UserError(
            f"{what}: {samples:,} images with pad = {pad} need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        )
    return F.pad(x, (pad,) * 4)
