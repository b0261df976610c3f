"""Samples that are compared with the nearest class mean, at once or when the means are known."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ncollapse.nearest import NearestMean, count_kinds

# Bytes of kept features that are compared with the class means in one call: on a GPU a call costs more than the copy
# that joins batches, on a CPU only that of small batches does.
_BYTES_PER_CALL = {"cpu": 2**18, "cuda": 2**26}


class NearestCounts:
    """`metrics.agreement` of the features of one layer, of all batches.

    Args:
        shape, device: `(*, K)` and device of the counts.
        means: `[*, K, d]` float64, with which each batch is compared at once.
        keep: keep the features until `end_pass`, which gives the means; else, without means, batches are left to a
            second pass.

    Attributes:
        counts: `[*, K, 3]` int64.
        compared: how many samples were compared.
    """

    def __init__(self, shape: torch.Size, device: torch.device, means: Tensor | None, *, keep: bool) -> None:
        self.counts = torch.zeros(*shape, 3, dtype=torch.int64, device=device)
        self.compared = 0
        self._nearest: NearestMean | None = None
        self._means = None if means is None else means.to(device)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] | None = [] if keep else None

    def add(self, features: Tensor, labels: Tensor, predicted: Tensor) -> int:
        """Compare or keep a batch, as in `metrics.agreement`; return the bytes of features that are kept of it."""
        if self._means is not None:
            self._compare(features, labels, predicted, self._means)
        if self._kept is None:
            return 0
        # The next batch may be written into the same memory, as by a CUDA graph; and a view, such as the first token of
        # a sequence, would keep the whole tensor alive.
        features = features.detach().clone()
        self._kept.append((features, labels.clone(), predicted))
        return features.nbytes

    @property
    def keeps(self) -> bool:
        """Whether all features until now are kept."""
        return self._kept is not None

    def kept(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the features, labels and predictions that are kept, in few batches."""
        return _joined(self._kept or [])

    def drop(self) -> None:
        """Keep no features, now nor later."""
        self._kept = None

    def end_pass(self, means: Tensor) -> bool:
        """Compare what was kept; return whether a second pass is needed, which takes these means too.

        If each batch was compared at once, there is nothing to do.
        """
        kept, compared = self._kept, self._means is not None
        self._kept, self._means = None, None
        if not compared and kept is None:
            self._means = means.to(self.counts.device)
        elif not compared and kept is not None:
            for batch in _joined(kept):
                self._compare(*batch, means)
        return self._means is not None

    def _compare(self, features: Tensor, labels: Tensor, predicted: Tensor, means: Tensor) -> None:
        if self._nearest is None:
            self._nearest = NearestMean(means, features.dtype)
        classes = means.shape[-2]
        # On a GPU labels out of range are reported when the statistics are read, and must not be an index before.
        self.counts += count_kinds(self._nearest(features), labels.clamp(0, classes - 1), predicted, classes)
        self.compared += len(labels)


def _joined(kept: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Join batches of features `[*, B, d]`, labels `[B]` and predictions `[*, B]` into fewer."""
    if not kept:
        return
    features = kept[0][0]
    count = max(1, _BYTES_PER_CALL.get(features.device.type, 0) // max(1, features.nbytes))
    for start in range(0, len(kept), count):
        some = kept[start : start + count]
        h, y, predicted = zip(*some, strict=True)
        yield some[0] if len(some) == 1 else (torch.cat(h, -2), torch.cat(y), torch.cat(predicted, -1))
