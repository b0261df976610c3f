"""`measure`: NC0–NC4 of any model on any data; `NCCallback`: the same every so often while it trains."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ncollapse import metrics
from ncollapse.hooks import Loader, Pool, Taps, batches, eval_mode, find
from ncollapse.stats import ClassStats

#: Bytes of kept features that are looked at together on a GPU, where a call costs more than laying batches together.
_TOGETHER = 2**26


def of_layer(stats: ClassStats) -> dict[str, Tensor]:
    """What can be said of a layer's features alone, by the names of `LayerResult`; tensors of shape `[*]`."""
    return {
        "nc1": metrics.nc1(stats),
        "nc1_trace_ratio": metrics.nc1(stats, kind="trace_ratio"),
        "nc1_cdnv": metrics.nc1(stats, kind="cdnv"),
        "nc2": metrics.nc2(stats),
        "nc2_equinorm": metrics.nc2(stats, kind="equinorm"),
        "nc2_equiangularity": metrics.nc2(stats, kind="equiangularity"),
    }


def of_head(weight: Tensor, stats: ClassStats) -> dict[str, Tensor]:
    """And of a classifier W `[*, K, d]` with the statistics of its input: `NCResult` without NC4 and the accuracy."""
    return of_layer(stats) | {
        "nc0": metrics.nc0(weight),
        "nc2_weight": metrics.nc2(weight),
        "nc2_weight_equinorm": metrics.nc2(weight, kind="equinorm"),
        "nc2_weight_equiangularity": metrics.nc2(weight, kind="equiangularity"),
        "nc3": metrics.nc3(weight, stats),
        "nc3_difference": metrics.nc3(weight, stats, kind="difference"),
        "degenerate": metrics.degenerate(weight, stats),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """Metrics of one layer's features; definitions in `ncollapse.metrics`."""

    nc1: float
    nc1_trace_ratio: float
    nc1_cdnv: float
    nc2: float
    nc2_equinorm: float
    nc2_equiangularity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class NCResult(LayerResult):
    """Metrics of one model; definitions in `ncollapse.metrics`.

    Attributes:
        degenerate: features or classifier have vanished: NC1–NC3 are undefined (NaN).
        layers: name -> metrics of that layer's features.
        means: class means of the head's input, `[K, d]` float64 on the CPU; NaN for a class without samples. What
            `measure(..., previous=result)` needs.
    """

    nc0: float
    nc2_weight: float
    nc2_weight_equinorm: float
    nc2_weight_equiangularity: float
    nc3: float
    nc3_difference: float
    nc4: float
    train_accuracy: float
    degenerate: bool
    layers: dict[str, LayerResult]
    means: Tensor = dataclasses.field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float]:
        """All numbers by name, those of layers as "layer2.nc1": what loggers take."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("layers", "means")}
        for name, layer in self.layers.items():
            own |= {f"{name}.{key}": value for key, value in dataclasses.asdict(layer).items()}
        return own


def measure(
    model: nn.Module,
    loader: Loader,
    *,
    head: str = "fc",
    layers: Sequence[str] = (),
    pool: Pool | None = None,
    moment: Literal["full", "projected"] = "full",
    previous: NCResult | None = None,
    keep_bytes: int = 2**30,
    nan_policy: Literal["raise", "propagate"] = "raise",
    batch_size: int = 1024,
) -> NCResult:
    """NC0–NC4 of a classifier on its training data.

    One forward pass in eval mode without gradients. NC4 asks which class mean is nearest, and the means are known after
    the pass only. By default it is exact: the head's inputs are kept (N × d values) and looked at again; where they
    would take more than `keep_bytes`, there is a second forward pass instead. With `previous` nothing is kept and there
    is no second pass: distances are to the means of that earlier result, which is near enough where they have hardly
    moved since. Two passes see the same data only if the loader gives it twice: leave random augmentation out.

    Args:
        model: any module; of a compiled one the original runs, since hooks are not part of compiled code.
        loader: batches, or one pair of tensors (inputs, labels), which is cut into `batch_size`. A batch is a pair
            (inputs, labels `[B]`), of which inputs are what the model takes: a tensor, a tuple (positional arguments)
            or a mapping (keyword arguments); or it is a mapping with "labels" in it.
        head: name of the last layer, an `nn.Linear` that gets features `[B, d]`, as in `model.named_modules()`.
        layers: names of further layers, of whose outputs NC1 and NC2 are taken.
        pool: makes features `[B, d]` of a layer's output. Default: outputs `[B, d]` as they are, of maps `[B, d, H, W]`
            (or with three dimensions of space) the mean over space, of a tuple the first entry.
        moment: "full" keeps d × d values for the head and each layer. "projected" keeps at most K × K, for wide layers,
            and takes a second forward pass.
        previous: of the same model, earlier.
        keep_bytes: most that NC4 may keep, on the head's device.
        nan_policy: of values that are NaN or infinite, as in `ClassStats`: an error, or metrics that are NaN.

    Raises:
        ValueError: no module of that name (near matches are listed), an empty loader, labels out of range, features
            that are NaN or not `[B, d]`, fewer than two classes.
        TypeError: the head is not linear, labels are not integers.

    Whatever happens the model's training modes and hooks are as before.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    layer = find(model, head)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"measure: the head must be an nn.Linear; {head!r} is a {type(layer).__name__}")
    if previous is not None and previous.means.shape != layer.weight.shape:
        raise ValueError(
            f"measure: previous has means {tuple(previous.means.shape)}; the head {head!r} has K × d = "
            f"{tuple(layer.weight.shape)}"
        )
    once = isinstance(loader, Iterator)
    if moment == "projected" and once:
        raise ValueError("measure: moment='projected' goes over the data twice, and an iterator gives it once")
    found = {name: find(model, name) for name in layers}
    stats: dict[str, ClassStats] = {}
    nearest = _Nearest(None if previous is None else previous.means, 0 if moment == "projected" else keep_bytes)
    right, seen = torch.zeros((), dtype=torch.int64), 0
    with eval_mode(model), torch.no_grad(), Taps(layer, found, pool) as taps:

        def each_batch() -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
            """Features by layer, logits, labels."""
            for inputs, labels in batches(loader, batch_size):
                features, logits = taps.forward(model, inputs)
                yield {head: features, **taps.features}, logits, labels.to(features.device)

        for features, logits, labels in each_batch():
            for name, h in features.items():
                if name not in stats:
                    stats[name] = ClassStats(
                        layer.out_features, h.shape[-1], moment="full" if moment == "full" else "trace", name=name,
                        nan_policy=nan_policy, device=h.device,
                    )  # fmt: skip
                stats[name].update(h, labels.to(h.device))
            predicted = logits.argmax(-1)
            right, seen = right.to(labels.device) + (predicted == labels).sum(), seen + len(labels)
            nearest.add(features[head], predicted)
        if not seen:
            raise ValueError("measure: the loader gave no samples")
        means = stats[head].means
        again = not nearest.finish(means)
        if moment == "projected" or (again and not once):
            if moment == "projected":
                stats = {name: first_pass.projected() for name, first_pass in stats.items()}
            for features, logits, labels in each_batch():
                if moment == "projected":
                    for name, h in features.items():
                        stats[name].update(h, labels.to(h.device))
                if again:
                    nearest.count(features[head], logits.argmax(-1), means)
        elif again:
            warnings.warn(
                f"measure: NC4 is unknown (NaN): the features take more than keep_bytes={keep_bytes}, and an iterator "
                "cannot be read twice; give a loader, a previous result or more keep_bytes",
                stacklevel=2,
            )
            nearest.differ.fill_(float("nan"))
        values = {name: value.item() for name, value in of_head(layer.weight, stats[head]).items()}
        others = {name: LayerResult(**{k: v.item() for k, v in of_layer(stats[name]).items()}) for name in found}
    if means[stats[head].present].isnan().any():  # nothing is near to them
        nearest.differ.fill_(float("nan"))
    return NCResult(
        **{name: value for name, value in values.items() if name != "degenerate"},
        degenerate=bool(values["degenerate"]),
        nc4=nearest.differ.item() / seen,
        train_accuracy=right.item() / seen,
        layers=others,
        means=means.cpu(),
    )


class _Nearest:
    """Counts the samples whose predicted class is not that of the nearest mean.

    Args:
        means: `[K, d]` of an earlier pass; None: features are kept until `finish` is told the means, if they take no
            more than `keep_bytes`.
    """

    def __init__(self, means: Tensor | None, keep_bytes: int) -> None:
        self.differ = torch.zeros((), dtype=torch.float64)
        self._means, self._left = means, keep_bytes
        self._kept: list[tuple[Tensor, Tensor]] | None = [] if keep_bytes > 0 else None

    def add(self, features: Tensor, predicted: Tensor) -> None:
        if self._means is not None:
            self._means = self._means.to(features.device)
            self.count(features, predicted, self._means)
        elif self._kept is not None:
            self._left -= features.nbytes
            self._kept.append((features, predicted))
            if self._left < 0:
                self._kept = None

    def finish(self, means: Tensor) -> bool:
        """Whether all samples were counted; if not, `count` them in a second pass."""
        kept = self._kept or []
        many = max(1, _TOGETHER // max(1, kept[0][0].nbytes)) if kept and kept[0][0].is_cuda else 1
        for start in range(0, len(kept), many):
            part = kept[start : start + many]
            features, predicted = part[0] if len(part) == 1 else map(torch.cat, zip(*part, strict=True))
            self.count(features, predicted, means)
        return self._means is not None or self._kept is not None

    def count(self, features: Tensor, predicted: Tensor, means: Tensor) -> None:
        differ = (predicted != metrics.nearest_class(features, means)).sum()
        self.differ = self.differ.to(differ.device) + differ


class NCCallback:
    """`measure` every so often: call it once in every step (or epoch) of a training loop.

    Args:
        model, loader, and all options: as for `measure`.
        every: measure at calls 0, every, 2 · every, …

    Attributes:
        history: pairs (number of the call, result).

    Example:
        >>> probe = NCCallback(model, loader, head="fc", every=10)
        >>> for epoch in range(100):
        ...     train_one_epoch()
        ...     if result := probe():
        ...         log(result.as_dict())
    """

    def __init__(self, model: nn.Module, loader: Loader, *, every: int = 1, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"NCCallback: every must be at least 1, got {every}")
        if isinstance(loader, Iterator):
            raise ValueError("NCCallback: an iterator gives its data once; give a loader or a pair of tensors")
        self.model, self.loader, self.every, self.options = model, loader, every, options
        self.calls = 0
        self.history: list[tuple[int, NCResult]] = []

    def __call__(self) -> NCResult | None:
        """Count the call; the result where one is due."""
        call, self.calls = self.calls, self.calls + 1
        if call % self.every:
            return None
        result = measure(self.model, self.loader, **self.options)
        self.history.append((call, result))
        return result
