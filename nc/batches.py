"""Read inputs and labels from whatever a loader yields, and find the arguments of a model among the inputs."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ncollapse.kernels.tensors import tensor_of

#: An iterable of batches or of samples, a data set, or one pair of tensors or arrays (inputs, labels).
Loader = Iterable[Any] | Dataset[Any]
#: Makes (inputs, labels) of what a loader yields.
Batch = Callable[[Any], tuple[Any, Any]]
_LABELS = ("labels", "label")


def labelled_batches(loader: Loader, batch_size: int, batch: Batch | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs and labels of each batch, as in `measure`.

    Args:
        batch_size: of the batches that are made here, of a pair or of samples.
        batch: makes (inputs, labels) of what the loader yields; None: `inputs_and_labels`.

    Raises:
        ValueError: a pair of different lengths, a batch in which no labels are found.
    """
    split = batch or inputs_and_labels
    if is_pair(loader):
        inputs, labels = loader
        if len(inputs) != len(labels):
            raise ValueError(f"measure: {len(inputs)} inputs and {len(labels)} labels")
        # On the CPU it shows without a wait for a GPU whether labels are to be ignored.
        labels = tensor_of(labels).cpu()
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            yield split((inputs[rows], labels[rows]))
        return
    if isinstance(loader, Dataset):
        # An iterable data set may yield batches of its own.
        loader = DataLoader(loader, None if isinstance(loader, IterableDataset) else batch_size)
    items = iter(loader)
    for item in items:
        inputs, labels = split(item)
        if np.ndim(labels) == 0 and not isinstance(labels, Mapping):  # one sample
            inputs, labels = split(default_collate([item, *islice(items, batch_size - 1)]))
        yield inputs, labels


def is_pair(loader: Any) -> TypeGuard[tuple[Any, Any]]:
    """Whether it is one pair of tensors or arrays (inputs, labels)."""
    return isinstance(loader, tuple | list) and len(loader) == 2 and all(map(is_array, loader))


def batch_count(loader: Loader, batch_size: int) -> int | None:
    """Return how many batches `labelled_batches` will yield; None where that is unknown."""
    if is_pair(loader) or (isinstance(loader, Dataset) and hasattr(loader, "__len__")):
        samples = len(loader[0] if is_pair(loader) else loader)
        return -(-samples // batch_size)
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # a generator, a loader of a data set without length
        return None


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """Divide a batch into inputs and labels.

    Args:
        batch: a mapping with "labels" or "label", whose other entries are the inputs; or a tuple of inputs and labels,
            after which may follow what is not used, such as indices.

    Raises:
        ValueError: it is neither, or the second of more than two entries is not of integers.
    """
    if isinstance(batch, Mapping):
        found = [name for name in _LABELS if name in batch]
        if len(found) == 1:
            return {name: value for name, value in batch.items() if name not in found}, batch[found[0]]
        got = f"a mapping with {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list) and len(batch) >= 2 and _may_be_labels(batch[1], strict=len(batch) > 2):
        return batch[0], batch[1]
    elif isinstance(batch, tuple | list):
        got = f"a {type(batch).__name__} of {', '.join(map(_described, batch))}"
    else:
        got = f"a {type(batch).__name__}"
    raise ValueError(
        "measure: a batch must be a pair (inputs, labels), with what is not used after it, or a mapping with 'labels' "
        f"or 'label'; the loader gave {got}. For others give `batch`, a function of it that returns (inputs, labels)"
    )


def arguments_of(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments with which a model is called on inputs.

    Of a mapping the entries are left out that the model does not take. If it takes none of their names, the only tensor
    among them is passed alone.

    Raises:
        ValueError: a mapping in which there are no inputs of the model.
    """
    if not isinstance(inputs, Mapping):
        return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return (), dict(inputs)
    names = [p.name for p in parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    kwargs = {k: v for k, v in inputs.items() if k in names or (takes_any and is_array(v))}
    arrays = [value for value in inputs.values() if is_array(value)]
    if kwargs or not inputs:
        return (), kwargs
    if len(arrays) == 1:
        return (arrays[0],), {}
    raise ValueError(
        f"measure: a batch has {', '.join(map(repr, inputs))}, the model takes {', '.join(names)}; give `batch`, a "
        "function of a batch that returns (inputs, labels)"
    )


def is_array(value: Any) -> TypeGuard[Tensor | np.ndarray[Any, Any]]:
    """Whether it is a tensor or a NumPy array."""
    return isinstance(value, Tensor | np.ndarray)


def _may_be_labels(value: Any, *, strict: bool) -> bool:
    """Whether it can be labels. `strict`: integers only, where something else may be the labels."""
    if isinstance(value, int | np.integer) or is_array(value):
        return not strict or not (tensor_of(value).is_floating_point() and np.ndim(value) != 2)
    if isinstance(value, Mapping):  # of several heads
        return bool(value) and all(_may_be_labels(each, strict=strict) for each in value.values())
    return isinstance(value, list | tuple) and all(isinstance(each, int) for each in value)


def _described(value: Any) -> str:
    if is_array(value):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
