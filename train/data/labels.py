"""Labels and the names of their classes, checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncollapse.train.data.arrays import label_tensor
from ncollapse.train.errors import UserError


class Labels(NamedTuple):
    """Labels `[N]` int64 of the training and the test samples, and the names of the K classes."""

    train: Tensor
    val: Tensor
    classes: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence where classes have no training samples."""
        counts = self.train.bincount(minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts.tolist(), strict=True) if not count]
        if not empty:
            return ()
        named = ", ".join(empty[:5]) + (f" and {len(empty) - 5:,} more" if len(empty) > 5 else "")
        return (f"no training samples of {len(empty):,} of the {len(self.classes):,} classes: {named}",)


def check_labels(
    train: Any, val: Any, classes: Sequence[str] | None, names: tuple[str, str], samples: tuple[int, int]
) -> Labels:
    """Return labels and classes.

    Args:
        train, val: integers `[N]` or `[N, 1]`, or one-hot `[N, K]`; tensors, arrays, lists.
        classes: the names of the K classes; None: K is one more than the largest label, or that of one-hot labels.
        names: of the two, for messages.
        samples: how many there are of each.

    Raises:
        UserError: labels that are none of these, not one of each sample, or outside `[0, K)`; less than two classes,
            or more than samples where their names are not given.
    """
    (train_y, columns), (val_y, val_columns) = _indices(train, names[0]), _indices(val, names[1])
    for labels, name, count in zip((train_y, val_y), names, samples, strict=True):
        if len(labels) != count:
            raise UserError(f"{name} has {len(labels):,} labels of {count:,} samples")
    if columns and val_columns and columns != val_columns:
        raise UserError(f"{names[0]} is one-hot of {columns} classes, {names[1]} of {val_columns}")
    number = columns or val_columns
    if classes is not None:
        named = _class_names(classes)
        if number and number != len(named):
            raise UserError(f"classes are {len(named)} names, but the labels are one-hot of {number} classes")
    else:
        largest = max(int(train_y.max()), int(val_y.max()))
        if not number and largest >= max(len(train_y), 2):
            raise UserError(
                f"a label is {largest:,} of only {len(train_y):,} training samples: number the classes from 0, as "
                "np.unique(y, return_inverse=True) does, or give `classes`, their names"
            )
        named = tuple(str(k) for k in range(number or largest + 1))
    for labels, name in ((train_y, names[0]), (val_y, names[1])):
        outside = (labels < 0) | (labels >= len(named))
        if bool(outside.any()):
            i = int(outside.to(torch.uint8).argmax())
            raise UserError(
                f"{name}[{i}] is {int(labels[i])}; labels of {len(named)} classes are 0 to {len(named) - 1}"
            )
    if len(named) < 2:
        raise UserError(f"{names[0]} has a single class; a classifier needs two")
    return Labels(train_y, val_y, named)


def _class_names(classes: Any) -> tuple[str, ...]:
    try:
        names = tuple(str(name) for name in classes)
    except Exception:  # whatever an object raises that is iterated or written
        names = ()
    if not names or isinstance(classes, str | bytes):
        raise UserError(f"classes is a {type(classes).__name__}; give the names of the classes, as ['cat', 'dog']")
    return names


def _indices(value: Any, name: str) -> tuple[Tensor, int]:
    """Return labels `[N]`, and the number of classes of one-hot ones, else 0."""
    y = label_tensor(value, name)
    y = y if y.is_floating_point() else y.long()
    if y.dim() == 2 and y.shape[1] > 1:
        one = y == 1
        if not bool((one | (y == 0)).all() & (one.sum(1) == 1).all()):
            raise UserError(f"{name} has the shape {list(y.shape)}, but is not one-hot: labels are integers [N]")
        return one.to(torch.uint8).argmax(1), y.shape[1]
    if y.dim() not in (1, 2) or not y.numel():
        raise UserError(f"{name} has the shape {list(y.shape)}; labels are integers [N], one of each sample")
    if y.is_floating_point():
        raise UserError(f"{name} has values of the type {y.dtype}; labels are integers: convert them")
    return y.flatten(), 0
