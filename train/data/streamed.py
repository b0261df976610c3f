"""A data set that does not fit in memory: its samples come through a DataLoader, in the order that is asked for."""

import atexit
import contextlib
import dataclasses
import hashlib
import multiprocessing
import signal
import sys
import warnings
import weakref
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as MapStyle

from ncollapse.train.data.arrays import channels_are_last, check_finite
from ncollapse.train.data.dataset import Dataset, Split
from ncollapse.train.data.labels import check_labels
from ncollapse.train.data.map_style import class_names, count, generators_kept, label_of, labels_of, sample
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.limits import processors

#: Processes that read samples, and the processors below which they would only take those of the training.
_WORKERS, _PROCESSORS = 2, 4
#: Samples of each split whose values are in the fingerprint.
_SAMPLES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streamed(Dataset):
    """A data set whose samples are read whenever they are needed; `train_x` and `val_x` have none, but their shape.

    Without transforms that draw at random, its batches are bit for bit those of the data set read into memory. Such
    transforms draw from a seed that the order of the samples and the number of the sample make, so that a run sees the
    same samples with any number of processes, and after a resume; for an evaluation always the same.

    The fingerprint is a hash of the numbers of samples, all labels, the number of classes, and the values of up to 16
    samples of each split, evenly spread. It does not hold the user's code, which is in the id of every run.

    Attributes:
        train, val: map-style data sets of pairs (x, label), x a float tensor.
        what: their name, for messages.
    """

    train: Any
    val: Any
    what: str

    @staticmethod
    @generators_kept()
    def of(train: Any, val: Any, what: str) -> "Streamed":
        """Make the data set of two map-style ones; labels are read now, where they are not known.

        Raises:
            OwnCodeError: a data set raises an error.
            UserError: samples that are no float tensors or differ in their shapes, labels outside `[0, K)`, no samples.
        """
        names = (f"{what}, training data", f"{what}, test data")
        train_targets, val_targets = labels_of(train, names[0]), labels_of(val, names[1])
        classes = class_names(train, val, what)
        samples = (count(train, names[0]), count(val, names[1]))
        try:
            labels = check_labels(train_targets, val_targets, classes, ("training labels", "test labels"), samples)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
        digest = hashlib.sha256(f"{len(labels.train)} {len(labels.val)} {len(labels.classes)}".encode())
        shape: torch.Size | None = None
        for of, y, name in zip((train, val), labels[:2], names, strict=True):
            digest.update(y.numpy().data)
            for i in sorted(set(torch.linspace(0, len(y) - 1, _SAMPLES, device="cpu").long().tolist())):
                x = _read(of, i, i, y, shape, name)
                shape = x.shape
                digest.update(x.numpy().data)
        assert shape is not None
        none = torch.empty(0, *shape, device="cpu")
        return Streamed(
            none, labels.train, none, labels.val, labels.classes, digest.hexdigest()[:16], labels.notes,
            train=train, val=val, what=what,
        )  # fmt: skip

    def batches(self, order: Tensor, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training samples and labels in an order, in batches; the last one may be smaller.

        Args:
            order: numbers of the samples, `[N]` int64.

        Raises:
            OwnCodeError: the data set raises an error.
            UserError: a sample of another shape, type or label than when the data set was made.
        """
        order = order.cpu()
        seed = int.from_bytes(hashlib.sha256(order.numpy().data).digest()[:7])
        return self._pass("train", order, batch_size, device, seed)

    def evaluation_batches(
        self, split: Split, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Dataset`; raises what `batches` does."""
        labels = self.train_y if split == "train" else self.val_y
        return self._pass(split, torch.arange(len(labels), device="cpu"), batch_size, device, 0)

    def _pass(
        self, split: Split, order: Tensor, batch_size: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        of, labels = (self.train, self.train_y) if split == "train" else (self.val, self.val_y)
        labels = labels.cpu()
        samples = _Samples(of, labels, seed, self.input_shape, self.what)
        rest = list(order.split(batch_size))
        for workers in (_worker_count(), 0):
            try:
                with contextlib.closing(_loaded(samples, rest, workers, device)) as batches:
                    for x in batches:
                        if isinstance(x, _Fault):
                            raise x.error()
                        batch, rest = rest[0], rest[1:]
                        yield x.to(device, non_blocking=True), labels[batch].to(device)
                return
            except RuntimeError as error:  # a process has ended: killed for its memory, or without shared memory
                if not workers or not str(error).startswith("DataLoader worker"):
                    raise
                why = str(error).splitlines()[0]
                warnings.warn(f"{self.what}: {why}; this process reads the rest of the epoch alone", stacklevel=2)


@dataclasses.dataclass(frozen=True)
class _Fault:
    """An error in another process, which would lose its type and its line on the way."""

    text: str
    log: str | None

    def error(self) -> UserError:
        if self.log is None:
            return UserError(self.text)
        error = OwnCodeError(self.text)
        error.log = self.log
        return error


class _Samples(MapStyle[Any]):
    """The samples of a data set, checked, with transforms that draw from a seed."""

    def __init__(self, dataset: Any, labels: Tensor, seed: int, shape: Sequence[int], what: str) -> None:
        self._dataset, self._labels, self._seed, self._shape, self._what = dataset, labels, seed, shape, what

    @generators_kept()
    def __getitems__(self, numbers: Sequence[int]) -> list[Tensor] | _Fault:
        try:
            return [_read(self._dataset, i, self._seed + i, self._labels, self._shape, self._what) for i in numbers]
        except UserError as error:
            return _Fault(str(error), error.log if isinstance(error, OwnCodeError) else None)


def _read(dataset: Any, i: int, seed: int, labels: Tensor, shape: Sequence[int] | None, what: str) -> Tensor:
    x, label = sample(dataset, i, seed, what)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"{what}: x of sample {i} is a {kind}; streamed samples are float tensors: normalise them in the "
            "transform, as with torchvision.transforms' ToTensor and Normalize"
        )
    x = x.detach().cpu().float()
    x = (x.movedim(-1, 0) if channels_are_last(x.shape) else x).contiguous()
    if not x.numel() or (shape is not None and x.shape != tuple(shape)):
        raise UserError(f"{what}: sample {i} is {list(x.shape)}, others are {list(shape or ())}: make them alike")
    check_finite(x, f"{what}: x of sample {i}, ")
    value = label_of(label, f"{what}: the label of sample {i}")
    if int(np.argmax(value) if isinstance(value, np.ndarray) else value) != int(labels[i]):
        raise UserError(f"{what}: sample {i} has the label {value}, in the labels of all samples {int(labels[i])}")
    return x


class _Order:
    """The numbers of the samples of each batch, for a DataLoader."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _loaded(
    samples: _Samples, batches: Sequence[Tensor], workers: int, device: torch.device
) -> Generator[Any, None, None]:
    loader = DataLoader(
        samples, batch_sampler=_Order(batches), num_workers=workers, collate_fn=_collate,
        pin_memory=device.type == "cuda", worker_init_fn=_ignore_signals, generator=torch.Generator(),
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    passing = _iterate(loader)
    _passes.add(passing)
    return passing


def _iterate(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    with warnings.catch_warnings():
        # From Python 3.12 on: the processes neither use the GPU nor more than a thread, as DataLoader sees to.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        batches = iter(loader)
    yield from batches


#: Passes that have begun. Processes that ignore SIGTERM must have ended when Python ends, which would wait for them.
_passes: "weakref.WeakSet[Any]" = weakref.WeakSet()


@atexit.register
def _end_passes() -> None:
    for passing in list(_passes):
        with contextlib.suppress(ValueError):  # another thread is within it
            passing.close()


def _collate(samples: list[Tensor] | _Fault) -> Any:
    return samples if isinstance(samples, _Fault) else default_collate(samples)


def _worker_count() -> int:
    """Return how many processes read samples besides this one."""
    # Only a fork has the user's code; a daemonic process may have no children.
    may = sys.platform == "linux" and not multiprocessing.current_process().daemon
    return _WORKERS if may and processors() >= _PROCESSORS else 0


def _ignore_signals(worker: int) -> None:
    """Ignore the signals that reach all processes of a terminal or a batch job, but are for the training process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
