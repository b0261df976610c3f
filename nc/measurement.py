"""NC0–NC4 of features and logits that are added batch by batch, in one process or several."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ncollapse.nearest_counts import NearestCounts
from ncollapse.process_group import told_by_all
from ncollapse.result import HEAD_METRICS, OF_HEAD, OF_LAYER
from ncollapse.stats import ClassStats, Moment

# Of features this many times as wide as there are classes the second moment costs less between the class means alone.
_FEW_CLASSES = 4
# The metrics are a thousand operations, each of which costs a launch on a GPU. If their products take up to so many
# multiplications, a CPU is quicker.
_SMALL = 2**22


class Measurement:
    """Gather batches and compute NC0–NC4, for one model or R stacked runs.

    For NC4 the features are kept until the class means are known; if they take more than `keep_bytes`, it needs a
    second pass over the same data. With `previous` neither is needed. Nothing waits for a GPU before `end_pass`.

    As long as they are kept, and there are few classes, NC1 takes their second moment between the class means from
    them at the end, at the cost of N × d × K; else all of it is summed, at that of N × d × d, unless `moment` is
    "projected".

    Args:
        weight: W of the head, `[K, d]`, or `[R, K, d]` of stacked runs. `*` below is R or nothing.
        names: the metrics to compute, of `HEAD_METRICS`.
        moment: "full" keeps d × d values for the head and each layer, if it must. "projected" keeps at most K × K, for
            wide layers; NC1 needs a second pass unless the features are kept until then.
        previous: `[*, K, d]` float64, class means of an earlier measurement, which NC4 then takes for the nearest mean.
        by_layer: whether to look for the nearest mean in each further layer too, as NC4 does in the head's features.
        previous_of_layers: name -> `[*, K, d']`, the means that it then takes. If there are `previous` ones, layers
            without theirs are left out.
        keep_bytes: the most that all kept features of a run may take, on their device.
        group: a `torch.distributed` process group of which each process adds its share of the data. The results are
            those of all of it, in every process; each must call `end_pass` and `finish`, and have added at least one
            batch, which may be empty.
        nan_policy, name, dtype: as in `ClassStats`.

    Raises:
        ValueError: unknown names, fewer than two classes.

    Attributes:
        stats, layers: the statistics of the head's features, and name -> those of a further layer.
        means, means_of_layers: all class means, once the first pass has ended.
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
        moment: Literal["full", "projected"] = "full", previous: Tensor | None = None, by_layer: bool = False,
        previous_of_layers: Mapping[str, Tensor] | None = None, keep_bytes: int = 2**30,
        group: Any = None, nan_policy: Literal["raise", "propagate"] = "raise", name: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if not set(names) <= set(HEAD_METRICS):
            raise ValueError(f"Measurement: metrics are {', '.join(HEAD_METRICS)}; got {', '.join(names)}")
        self._weight, self._names, self._moment = weight.detach(), names, moment
        self._group, self._nan_policy, self._dtype = group, nan_policy, dtype
        self.layers: dict[str, ClassStats] = {}
        self.means: Tensor | None = None
        self.means_of_layers: dict[str, Tensor] = {}
        self._first_pass = True
        self._second: list[ClassStats] = []  # gathered in a second pass
        self.samples = 0
        runs = weight.shape[:-2]
        self._correct = torch.zeros(runs, dtype=torch.int64, device=weight.device)
        self._bytes_left = keep_bytes * runs.numel()
        self._nearest = self._counts(weight.device, previous) if "nc4" in names else None
        first = self._first_moment(weight.shape[-1], self._nearest)
        self.stats = self._statistics(weight.shape[-1], name, weight.device, first)
        self._nearest_of_layers: dict[str, NearestCounts] = {}
        self._by_layer = by_layer and "nc4" in names
        self._previous_of_layers = {} if previous_of_layers is None else previous_of_layers
        self._leave_out_layers = previous is not None  # those without means

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
        gathered = [(self.stats, features)]
        for name, h in (layers or {}).items():
            if name not in self.layers:
                self._begin_layer(name, h)
            gathered.append((self.layers[name], h))
        for stats, h in gathered:
            if self._first_pass or stats in self._second:
                stats.update(h, labels.to(h.device))
        if self._first_pass:
            self.samples += len(labels)
        if logits is None or not needs_logits:
            return
        predicted = logits.argmax(-1)
        if self._first_pass:
            self._correct += (predicted == labels.to(predicted.device)).sum(-1)
        if self._nearest is None:
            return
        compared = [(self._nearest, features)]
        compared += [(self._nearest_of_layers[k], h) for k, h in (layers or {}).items() if k in self._nearest_of_layers]
        for nearest, h in compared:
            self._bytes_left -= nearest.add(h, labels.to(h.device), predicted.to(h.device))
        if self._bytes_left < 0:
            self._keep_no_more()

    def end_pass(self) -> bool:
        """End the first pass over the data; return whether a second is needed, in which the same batches are added."""
        self._first_pass = False
        keeps = all(nearest.keeps for nearest in self._all_nearest())
        if not (keeps if self._group is None else all(told_by_all(keeps, self._group))):
            self._keep_no_more()
        self._reduce_statistics()
        self.means = self.stats.means
        self.means_of_layers = {name: stats.means for name, stats in self.layers.items()}
        self.stats = self._with_moment(self.stats, self._nearest)
        self.layers = {
            name: self._with_moment(stats, self._nearest_of_layers.get(name)) for name, stats in self.layers.items()
        }
        again = bool(self._second)
        if self._nearest is not None:
            again |= self._nearest.end_pass(self.means)
        for name, nearest in self._nearest_of_layers.items():
            again |= nearest.end_pass(self.means_of_layers[name])
        return again if self._group is None else any(told_by_all(again, self._group))

    def finish(self, *, on_cpu: bool = False) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Compute the metrics.

        Args:
            on_cpu: move the statistics to the CPU before, if they are small enough to be quicker there.

        Returns:
            name -> value `[*]` of each metric of the head, and for each further layer the same of its features. NC4 is
            NaN if it needed a second pass that was not made (in every process of the group).

        Raises:
            ValueError: samples of fewer than two classes, batches that were refused.
        """
        if self._first_pass:
            self.end_pass()
        if self._group is not None:
            for stats in self._second:
                stats.all_reduce(self._group)
            nearest = self._all_nearest()
            counts = self._correct.new_tensor([self.samples, *(each.compared for each in nearest)])
            for tensor in (counts, self._correct, *(each.counts for each in nearest)):
                dist.all_reduce(tensor, group=self._group)
            self.samples, *compared = counts.tolist()
            for each, samples in zip(nearest, compared, strict=True):
                each.compared = samples
            self._group = None  # from here on all processes have all
        if on_cpu and all(map(_is_small, (self.stats, *self.layers.values()))):
            self._to_cpu()
        values = {name: of(self.stats) for name, of in OF_LAYER.items() if name in self._names}
        values |= {name: of(self._weight, self.stats) for name, of in OF_HEAD.items() if name in self._names}
        if self._nearest is not None and self.means is not None:
            known = self._usable(self.means) & (self._nearest.compared >= self.samples)
            differ = self._nearest.counts[..., 2].sum(-1)
            values["nc4"] = (differ.double() / self.samples).masked_fill(~known, float("nan"))
        if "train_accuracy" in self._names:
            values["train_accuracy"] = self._correct.double() / self.samples
        layers = {key: {name: of(stats) for name, of in OF_LAYER.items()} for key, stats in self.layers.items()}
        return values, layers

    def agreement(self, layer: str | None = None) -> Tensor | None:
        """Return the counts of `metrics.agreement`, `[*, K, 3]`, of the head's features or a layer's, after `finish`.

        None where they were not asked for, or a second pass was not made; zeros where the means are not finite.
        """
        nearest = self._nearest if layer is None else self._nearest_of_layers.get(layer)
        means = self.means if layer is None else self.means_of_layers.get(layer)
        if nearest is None or means is None or nearest.compared < self.samples:
            return None
        return nearest.counts.masked_fill(~self._usable(means)[..., None, None], 0)

    def _to_cpu(self) -> None:
        for stats in (self.stats, *self.layers.values()):
            stats.to("cpu")
        self._weight, self._correct = self._weight.cpu(), self._correct.cpu()
        self.means = None if self.means is None else self.means.cpu()
        self.means_of_layers = {name: means.cpu() for name, means in self.means_of_layers.items()}
        for nearest in self._all_nearest():
            nearest.counts = nearest.counts.cpu()

    def _usable(self, means: Tensor) -> Tensor:
        """Return whether the means of the classes with samples are finite, `[*]` bool; else nothing is near."""
        return means[..., self.stats.present, :].isfinite().flatten(-2).all(-1)

    def _begin_layer(self, name: str, features: Tensor) -> None:
        means = self._previous_of_layers.get(name)
        nearest = None
        if self._by_layer and not (self._leave_out_layers and means is None):
            nearest = self._nearest_of_layers[name] = self._counts(features.device, means)
        first = self._first_moment(features.shape[-1], nearest)
        self.layers[name] = self._statistics(features.shape[-1], name, features.device, first)

    def _counts(self, device: torch.device, means: Tensor | None) -> NearestCounts:
        # With means, "full" sums the whole second moment.
        keep = self._bytes_left > 0 and (means is None or self._moment == "projected")
        return NearestCounts(self._weight.shape[:-1], device, means, keep=keep)

    def _all_nearest(self) -> list[NearestCounts]:
        return [*([] if self._nearest is None else [self._nearest]), *self._nearest_of_layers.values()]

    def _statistics(self, dim: int, name: str, device: torch.device, moment: Moment) -> ClassStats:
        *runs, classes, _ = self._weight.shape
        return ClassStats(
            classes, dim, moment=moment, runs=runs[0] if runs else None, nan_policy=self._nan_policy, name=name,
            device=device, dtype=self._dtype,
        )  # fmt: skip

    def _first_moment(self, dim: int, nearest: NearestCounts | None) -> Moment:
        """Return what the first pass sums: all of the second moment, or its trace if the rest can come later."""
        later = nearest is not None and nearest.keeps and _FEW_CLASSES * self._weight.shape[-2] <= dim
        return "trace" if later or self._moment == "projected" else "full"

    def _keep_no_more(self) -> None:
        """Sum the whole second moment of what was kept, and of what comes; leave the nearest means to a second pass."""
        if self._moment == "full":
            self.stats = self._whole(self.stats, self._nearest)
            self.layers = {name: self._whole(h, self._nearest_of_layers.get(name)) for name, h in self.layers.items()}
        for nearest in self._all_nearest():
            nearest.drop()

    def _whole(self, stats: ClassStats, nearest: NearestCounts | None) -> ClassStats:
        if stats.moment != "trace" or nearest is None:
            return stats
        whole = self._statistics(stats.dim, stats.name, stats.device, "full")
        for features, labels, _ in nearest.kept():
            whole.update(features, labels)
        return whole

    def _with_moment(self, stats: ClassStats, nearest: NearestCounts | None) -> ClassStats:
        """Return statistics with the second moment between the class means, from the kept features or a second pass."""
        if stats.moment != "trace":
            return stats
        projected = stats.projected()
        if nearest is None or not nearest.keeps:
            self._second.append(projected)
            return projected
        for features, labels, _ in nearest.kept():
            projected.update(features, labels)
        if self._group is not None:
            projected.all_reduce(self._group)
        return projected

    def _reduce_statistics(self) -> None:
        if self._group is not None:
            for stats in (self.stats, *self.layers.values()):
                stats.all_reduce(self._group)


def _is_small(stats: ClassStats) -> bool:
    squared = stats.dim if stats.moment == "full" else stats.num_classes
    return (stats.runs or 1) * stats.num_classes * stats.dim * squared <= _SMALL


def to_numbers(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert values `[*]` to numbers, or to lists of the stacked runs, with one wait for the device."""
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
