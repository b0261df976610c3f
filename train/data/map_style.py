"""Samples and labels of map-style data sets, as those of torchvision: read, checked, and the same at every reading.

Transforms that draw at random draw the same for the same sample and seed, in every process.
"""

import contextlib
import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from ncollapse.progress import tracked
from ncollapse.train.data.arrays import as_tensor, eight_bits
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.limits import available_memory

#: Attributes in which data sets keep the labels of all samples.
_TARGETS = ("targets", "labels")
#: Bytes per byte of the samples while they are read: as they are stored, and normalised in float32.
_BYTES = 5


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Have the generators of this process afterwards be as before: `sample` seeds those that transforms draw from."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def is_map_style(value: Any) -> bool:
    """Return whether it is a data set of samples by their number, as torchvision's are."""
    kind = type(value)
    sized = hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    return sized and not isinstance(value, Tensor | np.ndarray | list | tuple | dict | str | bytes | IterableDataset)


def count(dataset: Any, what: str) -> int:
    """Return the number of its samples, at least 1."""
    try:
        samples = len(dataset)
    except (Exception, SystemExit) as error:
        raise OwnCodeError.of(f"{what}: its length", error) from None
    if not samples:
        raise UserError(f"{what} is empty")
    return samples


def class_names(train: Any, test: Any, what: str) -> list[str] | None:
    """Return the `classes` of two data sets, None where neither has any.

    Raises:
        UserError: they differ.
    """
    named = [list(map(str, names)) for of in (train, test) if isinstance(names := _classes(of), list | tuple)]
    if len(named) == 2 and named[0] != named[1]:
        raise UserError(f"{what}: the training data have the classes {named[0][:5]} …, the test data {named[1][:5]} …")
    return named[0] if named else None


def _classes(dataset: Any) -> Any:
    return _classes(dataset.dataset) if isinstance(dataset, Subset) else getattr(dataset, "classes", None)


def sample(dataset: Any, i: int, seed: int, what: str) -> tuple[Any, Any]:
    """Return sample i, a tensor or an array, and its label; call it within `generators_kept`.

    Args:
        seed: of the transforms that draw at random.

    Raises:
        OwnCodeError: the data set raises an error.
        UserError: it is no pair (x, label).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would be that of GPUs too
    try:
        item = dataset[i]
    except (Exception, SystemExit) as error:
        raise OwnCodeError.of(f"{what}: sample {i}", error) from None
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"{what}: sample {i} is a {type(item).__name__}; samples are pairs (x, label)")
    x, label = item
    if hasattr(x, "convert") and hasattr(x, "mode"):  # Pillow's images
        x = _pixels(x, f"{what}: sample {i}")
    return x, label


def _pixels(image: Any, what: str) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":
        return eight_bits(np.asarray(image), what)
    return np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))


@generators_kept()
def read_all(dataset: Any, what: str) -> tuple[Tensor, list[Any]]:
    """Read all samples `[N, …]` and labels into memory; with a progress bar, on a terminal, where it takes long.

    Raises:
        OwnCodeError: the data set raises an error.
        UserError: samples of different shapes or types, more than fit in memory.
    """
    samples = count(dataset, what)
    x, label = sample(dataset, 0, 0, what)
    first = as_tensor(x, f"{what}: x of sample 0")
    needed, free = samples * first.nbytes * (_BYTES if first.dtype == torch.uint8 else 2), available_memory()
    if needed > free:
        raise UserError(
            f"{what}: {samples:,} samples {list(first.shape)} take {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} "
            "that are free: stream them, with in_memory = false"
        )
    everything = torch.empty((samples, *first.shape), dtype=first.dtype, device="cpu")
    everything[0], labels = first, [label_of(label, f"{what}: the label of sample 0")]
    for i in tracked(range(1, samples), samples - 1, _bar(), f"reading {what}"):
        x, label = sample(dataset, i, i, what)
        one = as_tensor(x, f"{what}: x of sample {i}")
        if one.shape != first.shape or one.dtype != first.dtype:
            raise UserError(
                f"{what}: sample {i} is {list(one.shape)} of {one.dtype}, sample 0 {list(first.shape)} of "
                f"{first.dtype}: make them alike in the transform"
            )
        everything[i] = one
        labels.append(label_of(label, f"{what}: the label of sample {i}"))
    return everything, labels


@generators_kept()
def labels_of(dataset: Any, what: str) -> Any:
    """Return the labels of all samples: its attribute `targets` or `labels`, else read with all samples.

    Raises:
        OwnCodeError: the data set raises an error.
        UserError: samples that are no pairs, labels that are no integers.
    """
    samples = count(dataset, what)
    known = _targets(dataset)
    if known is not None and len(known) == samples:
        return known
    numbers = tracked(range(samples), samples, _bar(), f"reading the labels of {what}")
    return [label_of(sample(dataset, i, i, what)[1], f"{what}: the label of sample {i}") for i in numbers]


def _targets(dataset: Any) -> Any:
    """Return the labels that a data set keeps; None where it keeps none, or changes them as it gives a sample."""
    if isinstance(dataset, Subset):
        known = _targets(dataset.dataset)
        return None if known is None else np.asarray(known)[np.asarray(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    found = (getattr(dataset, name, None) for name in _TARGETS)
    return next((value for value in found if isinstance(value, Tensor | np.ndarray | list | tuple)), None)


def label_of(label: Any, what: str) -> Any:
    """Return a label as an integer, or as an array of a one-hot one.

    Raises:
        UserError: it is neither.
    """
    try:
        values = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
    except Exception as error:  # of rows of different lengths, of whatever `__array__` raises
        raise UserError(f"{what} is no label: {error}") from None
    if values.dtype.kind not in ("biuf" if values.size > 1 else "biu") or not values.size:
        raise UserError(f"{what} is {values.dtype} {str(label)[:40]!r}; labels are integers, or one-hot")
    return int(values.item()) if values.size == 1 else values


def _bar() -> bool | None:
    """Say whether to show a progress bar: not in worker processes, which all read the same."""
    return False if multiprocessing.parent_process() else None
