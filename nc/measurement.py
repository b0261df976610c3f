"""NC0–NC4 of features and logits that are added batch by batch, in one process or several."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ncollapse import metrics
from ncollapse.process_group import told_by_all
from ncollapse.result import HEAD_METRICS, OF_HEAD, OF_LAYER
from ncollapse.stats import ClassStats

# Bytes of kept features that are compared with the class means in one call: on a GPU a call costs more than the copy
# that joins batches, on a CPU only that of small batches does.
_BYTES_PER_CALL = {"cpu": 2**20, "cuda": 2**26}


class Measurement:
    """Gather batches and compute NC0–NC4, for one model or R stacked runs.

    For NC4 the features are kept until the class means are known; if they take more than `keep_bytes`, it needs a
    second pass over the same data. With `previous` neither is needed. Nothing waits for a GPU before `end_pass`.

    Args:
        weight: W of the head, `[K, d]`, or `[R, K, d]` of stacked runs. `*` below is R or nothing.
        names: the metrics to compute, of `HEAD_METRICS`.
        moment: "full" keeps d × d values for the head and each layer. "projected" keeps at most K × K, for wide layers,
            and needs a second pass.
        previous: `[*, K, d]` float64, class means of an earlier measurement, which NC4 then takes for the nearest mean.
        keep_bytes: the most that the kept features of a run may take, on their device.
        group: a `torch.distributed` process group of which each process adds its share of the data. The results are
            those of all of it, in every process; each must call `end_pass` and `finish`, and have added at least one
            batch, which may be empty.
        nan_policy, name, dtype: as in `ClassStats`.

    Raises:
        ValueError: unknown names, fewer than two classes.

    Attributes:
        stats: the statistics of the head's features.
        samples: how many were added in the first pass.

    Example:
        >>> measurement = Measurement(model.fc.weight)
        >>> for x, y in loader:
        ...     features = model.features(x)
        ...     measurement.add(features, model.fc(features), y)
        >>> values, _ = measurement.finish()
        >>> values["nc1"]
    """

    def __init__(
        self, weight: Tensor, names: Collection[str] = HEAD_METRICS, *,
        moment: Literal["full", "projected"] = "full", previous: Tensor | None = None, keep_bytes: int = 2**30,
        group: Any = None, nan_policy: Literal["raise", "propagate"] = "raise", name: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not set(names) <= set(HEAD_METRICS):
            raise ValueError(f"Measurement: metrics are {', '.join(HEAD_METRICS)}; got {', '.join(names)}")
        self._weight, self._names, self._moment = weight.detach(), names, moment
        self._group, self._nan_policy, self._dtype = group, nan_policy, dtype
        self.stats = self._statistics(weight.shape[-1], name, weight.device)
        self._layers: dict[str, ClassStats] = {}
        self._first_pass = True
        self._means: Tensor | None = None  # for NC4, once the first pass has ended
        self.samples = self._compared = 0
        runs = weight.shape[:-2]
        self._correct = torch.zeros(runs, dtype=torch.int64, device=weight.device)
        self._differ = torch.zeros_like(self._correct)
        # For NC4, a batch is compared with `_centres` at once if there are any; else it goes into `_kept` if that is a
        # list; else NC4 is left to the second pass.
        self._centres = previous.to(weight.device) if previous is not None and "nc4" in names else None
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        if self._centres is None and "nc4" in names and moment == "full" and keep_bytes > 0:
            self._kept = []
        self._bytes_left = keep_bytes * runs.numel()

    def add(
        self, features: Tensor, logits: Tensor | None, labels: Tensor, layers: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add a batch.

        Args:
            features, labels: of the head's input, as in `ClassStats.update`.
            logits: `[*, B, K]`, bias included; may be None if neither NC4 nor the accuracy is among the names.
            layers: name -> features `[*, B, d']` of further layers; in every batch the same names.

        Raises:
            ValueError, TypeError: what `ClassStats.update` refuses.
        """
        needs_logits = not {"nc4", "train_accuracy"}.isdisjoint(self._names)
        if needs_logits and logits is None:
            raise ValueError("Measurement.add: NC4 and the accuracy need logits")
        if self._first_pass or self._moment == "projected":
            self.stats.update(features, labels.to(features.device))
            for name, h in (layers or {}).items():
                if name not in self._layers:
                    self._layers[name] = self._statistics(h.shape[-1], name, h.device)
                self._layers[name].update(h, labels.to(h.device))
        if self._first_pass:
            self.samples += len(labels)
        if logits is None or not needs_logits:
            return
        predicted = logits.argmax(-1)
        if self._first_pass:
            self._correct += (predicted == labels.to(predicted.device)).sum(-1)
        if self._centres is not None:
            self._compare(features, predicted, self._centres)
        elif self._kept is not None:
            features = features.detach()
            # A view, such as the first token of a sequence, would keep the whole tensor alive.
            if features.untyped_storage().nbytes() > features.nbytes:
                features = features.clone()
            self._bytes_left -= features.nbytes
            if self._bytes_left < 0:
                self._kept = None
            else:
                self._kept.append((features, predicted))

    def end_pass(self) -> bool:
        """End the first pass over the data; return whether a second is needed, in which the same batches are added."""
        kept, compared = self._kept, self._centres is not None
        self._first_pass, self._kept, self._centres = False, None, None
        self._reduce_statistics()
        if "nc4" in self._names:
            self._means = self.stats.means
            if kept is not None:
                for features, predicted in _joined(kept):
                    self._compare(features, predicted, self._means)
            elif not compared:
                self._centres = self._means
        if self._moment == "projected":
            self.stats = self.stats.projected()
            self._layers = {name: stats.projected() for name, stats in self._layers.items()}
        again = self._centres is not None or self._moment == "projected"
        return again if self._group is None else any(told_by_all(again, self._group))

    def finish(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Compute the metrics.

        Returns:
            name -> value `[*]` of each metric of the head, and for each further layer the same of its features. NC4 is
            NaN if it needed a second pass that was not made (in every process of the group).

        Raises:
            ValueError: samples of fewer than two classes, batches that were refused.
        """
        if self._first_pass:
            self.end_pass()
        if self._group is not None:
            if self._moment == "projected":
                self._reduce_statistics()
            counts = self._correct.new_tensor([self.samples, self._compared])
            for tensor in (counts, self._correct, self._differ):
                dist.all_reduce(tensor, group=self._group)
            self.samples, self._compared = counts.tolist()
            self._group = None  # from here on all processes have all
        values = {name: of(self.stats) for name, of in OF_LAYER.items() if name in self._names}
        values |= {name: of(self._weight, self.stats) for name, of in OF_HEAD.items() if name in self._names}
        if self._means is not None:
            finite = self._means[..., self.stats.present, :].isfinite().flatten(-2).all(-1)  # else nothing is near
            known = finite & (self._compared >= self.samples)
            values["nc4"] = (self._differ.double() / self.samples).masked_fill(~known, float("nan"))
        if "train_accuracy" in self._names:
            values["train_accuracy"] = self._correct.double() / self.samples
        layers = {key: {name: of(stats) for name, of in OF_LAYER.items()} for key, stats in self._layers.items()}
        return values, layers

    def blank(self) -> tuple[Tensor, dict[str, int], dict[str, Any]]:
        """Return W on the CPU, the dimensions of the layers by name, and the options of this measurement alone."""
        dims = {name: stats.dim for name, stats in self._layers.items()}
        return self._weight.cpu(), dims, {"name": self.stats.name, "dtype": self._dtype}

    def _statistics(self, dim: int, name: str, device: torch.device) -> ClassStats:
        *runs, classes, _ = self._weight.shape
        return ClassStats(
            classes, dim, moment="full" if self._moment == "full" else "trace", runs=runs[0] if runs else None,
            nan_policy=self._nan_policy, name=name, device=device, dtype=self._dtype,
        )  # fmt: skip

    def _reduce_statistics(self) -> None:
        if self._group is not None:
            for stats in (self.stats, *self._layers.values()):
                stats.all_reduce(self._group)

    def _compare(self, features: Tensor, predicted: Tensor, means: Tensor) -> None:
        """Count the samples whose predicted class is not that of the nearest mean."""
        self._differ += (predicted != metrics.nearest_class(features, means)).sum(-1)
        self._compared += features.shape[-2]


def _joined(kept: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Join batches of features `[*, B, d]` and predictions `[*, B]` into fewer."""
    if not kept:
        return
    features, _ = kept[0]
    count = max(1, _BYTES_PER_CALL.get(features.device.type, 0) // max(1, features.nbytes))
    for start in range(0, len(kept), count):
        some = kept[start : start + count]
        yield some[0] if len(some) == 1 else (torch.cat([h for h, _ in some], -2), torch.cat([p for _, p in some], -1))


def to_numbers(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert values `[*]` to numbers, or to lists of the stacked runs, with one wait for the device."""
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
