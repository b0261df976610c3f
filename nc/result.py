"""The metrics of a measurement by name, and the results that hold them."""

import dataclasses
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ncollapse import metrics
from ncollapse.stats import ClassStats

#: The metrics of a layer's features, by the names of `LayerResult`.
OF_LAYER: dict[str, Callable[[ClassStats], Tensor]] = {
    "nc1": metrics.nc1,
    "nc1_trace_ratio": partial(metrics.nc1, kind="trace_ratio"),
    "nc1_cdnv": partial(metrics.nc1, kind="cdnv"),
    "nc2": metrics.nc2,
    "nc2_equinorm": partial(metrics.nc2, kind="equinorm"),
    "nc2_equiangularity": partial(metrics.nc2, kind="equiangularity"),
}
#: The further metrics of the head's weight W `[*, K, d]` and its features, by the names of `NCResult`.
OF_HEAD: dict[str, Callable[[Tensor, ClassStats], Tensor]] = {
    "nc0": lambda weight, _: metrics.nc0(weight),
    "nc2_weight": lambda weight, _: metrics.nc2(weight),
    "nc2_weight_equinorm": lambda weight, _: metrics.nc2(weight, kind="equinorm"),
    "nc2_weight_equiangularity": lambda weight, _: metrics.nc2(weight, kind="equiangularity"),
    "nc3": metrics.nc3,
    "nc3_difference": partial(metrics.nc3, kind="difference"),
    "degenerate": metrics.degenerate,
}
#: The names of all metrics of a head.
HEAD_METRICS = (*OF_LAYER, *OF_HEAD, "nc4", "train_accuracy")


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
        head: name of the head, as in `model.named_modules()`.
        degenerate: features or classifier have vanished: NC1–NC3 are undefined (NaN).
        layers: name -> metrics of that layer's features.
        means: class means of the head's input, `[K, d]` float64 on the CPU; NaN for a class without samples.
            `measure(..., previous=result)` uses them.
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
    head: str = ""
    layers: dict[str, LayerResult]
    means: Tensor = dataclasses.field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float]:
        """Return all numbers by name, those of layers as "layer2.nc1", for loggers."""
        others = ("head", "layers", "means")
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in others}
        for name, layer in self.layers.items():
            numbers |= {f"{name}.{key}": value for key, value in dataclasses.asdict(layer).items()}
        return numbers
