"""The passes of a model over data, in one process or several, while its heads are measured."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ncollapse.batches import Batch, Loader, batch_count, inputs_and_labels, is_array, is_pair, labelled_batches
from ncollapse.heads import HeadCall
from ncollapse.hooks import Forward
from ncollapse.kernels.tensors import tensor_of
from ncollapse.measurement import Measurement
from ncollapse.process_group import in_step, run_in_all, told_by_all
from ncollapse.progress import tracked
from ncollapse.samples import Pool, Selected, select_samples


class Samples(NamedTuple):
    """A batch as one head sees it: features `[N, d]`, logits `[N, K]`, labels `[N]`, name -> features of each layer."""

    features: Tensor
    logits: Tensor
    labels: Tensor
    layers: dict[str, Tensor]


@dataclasses.dataclass
class MeasuredHead:
    """A head that was seen to run, and its measurement; `bias` `[K]` is None where it is unknown."""

    name: str
    weight: Tensor
    bias: Tensor | None
    measurement: Measurement


#: Begins the measurement of a head, of its key, its name and its weight.
Start = Callable[[str, str, Tensor], Measurement]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """What is the same in every pass; options as in `ncollapse.measure`.

    Attributes:
        run: the forward pass of `watch`.
        keys: of the heads, in its order.
        together: whether the processes of the group must run the model at the same time.
    """

    run: Callable[[Any], Forward]
    keys: tuple[str, ...]
    pool: Pool | None
    batch: Batch | None
    ignore_index: int | None
    batch_size: int
    progress: bool | None
    group: Any
    together: bool
    device: torch.device

    def measure(self, loader: Loader, what: str, start: Start) -> dict[str, MeasuredHead]:
        """Measure the heads on all data, in a second pass too if it is needed and possible.

        Returns:
            key -> head; with NC4 unknown if there was to be a second pass over an iterator.

        Raises:
            ValueError: no samples; what the models and measurements raise.
        """
        heads: dict[str, MeasuredHead] = {}

        def add() -> None:
            for key, name, call, samples in self._samples(loader, what):
                if key not in heads:
                    heads[key] = MeasuredHead(name, call.weight, call.bias, start(key, name, call.weight))
                heads[key].measurement.add(*samples)

        run_in_all(add, self.group)
        if not sum(self._told(sum(head.measurement.samples for head in heads.values()))):
            raise ValueError(f"measure: the loader gave no samples{what and f' of {what}'}")
        self._join_without_data(heads, start)
        # Of all measurements: each speaks with those of the other processes.
        again = [head.measurement.end_pass() for head in heads.values()]
        if any(again) and any(self._told(isinstance(loader, Iterator))):
            warnings.warn(
                "measure: NC4 is unknown (NaN): the features take more than keep_bytes, and an iterator cannot be read "
                "twice; give a loader, a previous result or more keep_bytes",
                stacklevel=3,
            )
        elif any(again):
            run_in_all(add, self.group)
        return heads

    def mean(self, loader: Loader, heads: Mapping[str, MeasuredHead], what: str) -> dict[str, Tensor]:
        """Compute key -> mean `[d]` float64 of the head's features; labels are not used, and may be missing.

        Raises:
            ValueError: no samples.
        """
        # The last value is the number of samples.
        sums = {k: head.weight.new_zeros(head.weight.shape[1] + 1, dtype=torch.float64) for k, head in heads.items()}

        def add() -> None:
            for key, _, _, samples in self._samples(loader, what, without_labels=True):
                features = samples.features.double()
                sums[key] += torch.nn.functional.pad(features, (0, 1), value=1.0).sum(0)

        run_in_all(add, self.group)
        for total in sums.values():
            if self.group is not None:
                dist.all_reduce(total, group=self.group)
            if not total[-1]:
                raise ValueError(f"measure: the loader gave no samples of {what}")
        return {key: total[:-1] / total[-1] for key, total in sums.items()}

    def _samples(
        self, loader: Loader, what: str, *, without_labels: bool = False
    ) -> Iterator[tuple[str, str, HeadCall, Samples]]:
        """Run the model over the data; yield key, name and call of each head with the samples of each batch.

        Where a GPU must tell which samples are used, a batch comes one late: the GPU computes the next one meanwhile.
        """
        late: list[tuple[str, str, HeadCall, Selected]] = []
        batch = self.batch
        if without_labels:
            batch = batch or _inputs_and_perhaps_labels
            if is_array(loader):  # the inputs alone
                loader = (loader, np.zeros(len(loader), dtype=int))
            elif is_pair(loader) and loader[0].ndim > 1 and loader[0].shape[1:] == loader[1].shape[1:]:
                loader = [(inputs,) for inputs in loader]  # two batches
        parts = labelled_batches(loader, self.batch_size, batch)
        show = self.progress if self.group is None or dist.get_rank(self.group) == 0 else False
        parts = tracked(parts, batch_count(loader, self.batch_size), show, f"measure{what and f', {what}'}")
        steps: Iterable[Any] = in_step(parts, self.group) if self.together else ((part, True) for part in parts)
        for (inputs, labels), is_new in steps:
            forward = self.run(inputs)
            if not is_new:
                continue
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            new: list[tuple[str, str, HeadCall, Selected]] = []
            for key, (name, call) in zip(self.keys, forward.heads, strict=True):
                of_head = labels.get(key) if isinstance(labels, Mapping) else labels
                if without_labels:
                    of_head = _any_labels(of_head, call, self.ignore_index)
                elif of_head is None:
                    raise ValueError(
                        f"measure: a batch has labels of {', '.join(labels)}, and none of the head {key!r}"
                    )
                selected = select_samples(
                    call, forward.output, of_head, forward.layers,
                    pool=self.pool, mask=mask, ignore_index=self.ignore_index,
                )  # fmt: skip
                new.append((key, name, call, selected))
            ready, late = (late, new) if any(each.waits for *_, each in new) else (late + new, [])
            for key, name, call, selected in ready:
                yield key, name, call, Samples(*selected.samples())
        for key, name, call, selected in late:
            yield key, name, call, Samples(*selected.samples())

    def _told(self, mine: int) -> list[int]:
        return [mine] if self.group is None else told_by_all(mine, self.group)

    def _join_without_data(self, heads: dict[str, MeasuredHead], start: Start) -> None:
        """Begin the measurements of a process that had no batch, as others have begun them."""
        if self.group is None:
            return
        told = told_by_all(bool(heads), self.group)
        if all(told):
            return
        mine = None
        if dist.get_rank(self.group) == told.index(True):
            mine = {
                key: (
                    head.name, head.weight.cpu(), None if head.bias is None else head.bias.cpu(),
                    {name: stats.dim for name, stats in head.measurement.layers.items()},
                )
                for key, head in heads.items()
            }  # fmt: skip
        begun = next(each for each in told_by_all(mine, self.group) if each is not None)
        if heads:
            return
        for key, (name, weight, bias, layers) in begun.items():
            weight = weight.to(self.device)
            bias = None if bias is None else bias.to(self.device)
            heads[key] = MeasuredHead(name, weight, bias, start(key, name, weight))
            nothing = {layer: weight.new_zeros(0, dim) for layer, dim in layers.items()}
            labels = torch.zeros(0, dtype=torch.int64, device=self.device)
            heads[key].measurement.add(weight[:0], weight.new_zeros(0, len(weight)), labels, nothing)


def _inputs_and_perhaps_labels(batch: Any) -> tuple[Any, Any]:
    """Divide a batch as `inputs_and_labels`, or take all of it for the inputs."""
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if is_array(batch):
        return batch, np.zeros(len(batch), dtype=int)
    if isinstance(batch, Mapping) and not {"labels", "label"} & set(batch):
        return batch, np.zeros(1, dtype=int)
    return inputs_and_labels(batch)


def _any_labels(labels: Any, call: HeadCall, ignore_index: int | None) -> Tensor:
    """Return labels `[B]` of some class, or `[B, *P]` where each token has one, in which those to ignore remain."""
    shape = call.features.shape[:-1]
    if np.shape(labels) == tuple(shape):
        labels = tensor_of(labels)
        return labels.masked_fill(labels != ignore_index, 0) if ignore_index is not None else torch.zeros_like(labels)
    return torch.zeros(shape[:1], dtype=torch.int64, device="cpu")
