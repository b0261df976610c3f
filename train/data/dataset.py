"""A data set as whole tensors on the device, so that the training loop runs no Python per sample."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ncollapse.train.errors import UserError

Split = Literal["train", "val"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and validation samples as the network takes them.

    Attributes:
        train_x, val_x: samples `[N, …]`, all of one shape: images `[N, C, H, W]` and vectors `[N, d]` float32, tokens
            `[N, T]` int64.
        train_y, val_y: labels `[N]` int64.
        classes: their names.
        fingerprint: a hash of the raw values and labels; a resumed sweep must have the same data.
        notes: sentences for the user about the data.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample: `[C, H, W]` of images."""
        return tuple(self.train_x.shape[1:])

    @property
    def input_dtype(self) -> torch.dtype:
        """The type of the samples: float32, int64 of tokens."""
        return self.train_x.dtype

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """C of images `[C, H, W]`, d of vectors `[d]`.

        Raises:
            UserError: samples of another shape.
        """
        return self._of_images_or_vectors("channels")[0]

    @property
    def size(self) -> int:
        """Height H of images `[C, H, W]`, which most networks need to be their width too; 1 of vectors `[d]`.

        Raises:
            UserError: samples of another shape.
        """
        return (*self._of_images_or_vectors("size"), 1)[1]

    def _of_images_or_vectors(self, what: str) -> tuple[int, ...]:
        if len(self.input_shape) not in (1, 3):
            raise UserError(
                f"samples of shape {list(self.input_shape)} have no {what}: they are no images [C, H, W] or vectors [d]"
            )
        return self.input_shape

    def limited(self, limit: int | None) -> "Dataset":
        """Return the data set with only the first `limit` training samples."""
        if limit is None or limit >= len(self.train_y):
            return self
        return dataclasses.replace(self, train_x=self.train_x[:limit], train_y=self.train_y[:limit])

    def to(self, device: torch.device) -> "Dataset":
        """Return the data set on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "val_x", "val_y")}
        return dataclasses.replace(self, **tensors)

    def evaluation_batches(
        self, split: Split, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples and labels of a split in their order, in batches; the last one may be smaller."""
        x, y = (self.train_x, self.train_y) if split == "train" else (self.val_x, self.val_y)
        for samples, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            yield samples.to(device), labels.to(device)
