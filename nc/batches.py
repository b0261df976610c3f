"""Read inputs and labels from whatever a loader yields."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

#: An iterable of batches, or one pair of tensors (inputs, labels).
Loader = Iterable[Any] | tuple[Tensor, Tensor]


def labelled_batches(loader: Loader, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield the inputs and labels of each batch; a pair of tensors is cut into batches of `batch_size`.

    Raises:
        ValueError: a pair of tensors of different lengths, a batch that is neither a pair nor a mapping with "labels".
    """
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[0], Tensor):
        inputs, labels = loader
        if len(inputs) != len(labels):
            raise ValueError(f"measure: {len(inputs)} inputs and {len(labels)} labels")
        loader = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    for batch in loader:
        if isinstance(batch, Mapping) and "labels" in batch:
            yield {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
        elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
            yield batch[0], batch[1]
        else:
            raise ValueError(
                "measure: a batch must be a pair (inputs, labels) or a mapping with 'labels'; "
                f"the loader gave a {type(batch).__name__}"
            )
