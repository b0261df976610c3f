"""The metrics of a measurement by name, and the results that hold them."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ncollapse import metrics
from ncollapse.further_metrics import (
    energy_variation,
    entropy_rank,
    mean_energy,
    numerical_rank,
    pair_distances,
    rows_of,
    spectrum,
)
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
#: The names of all metrics of a head that a `Measurement` takes by default.
HEAD_METRICS = (*OF_LAYER, *OF_HEAD, "nc4", "train_accuracy")


def further_of_head(
    weight: Tensor, bias: Tensor | None, stats: ClassStats
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute what `measure` adds for a head.

    Args:
        weight, bias: W `[*, K, d]` and b `[*, K]`; without b the global logits are left out.
        stats: of the head's input.

    Returns:
        The further metrics, `[*]` each, by the names of `NCResult`; and its `matrices`, on the CPU.
    """
    weight = weight.detach()
    of_weight, left, values = _geometry(weight, "_weight")
    del of_weight["mean_rank_weight"]
    numbers = further_of_layer(stats) | of_weight | {"unc3": metrics.unc3(weight, stats)}
    if bias is not None:
        numbers["global_logits"] = metrics.global_logits(weight, bias, stats)
    row_sum = left.sum(-2).abs() / left.shape[-2] ** 0.5
    matrices = metrics.matrices(weight, stats) | {"singular_values": values, "row_sum": row_sum}
    return numbers, {name: matrix.cpu() for name, matrix in matrices.items()}


def further_of_layer(stats: ClassStats) -> dict[str, Tensor]:
    """Compute the further metrics of a layer, `[*]` each, by the names of `LayerResult`."""
    return _geometry(stats)[0] | {"nc1_trace_ratio_balanced": metrics.nc1(stats, kind="trace_ratio", within="class")}


def _geometry(of: ClassStats | Tensor, of_what: str = "") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Compute GNC2 and ranks by name, with the left singular vectors and the singular values: one decomposition."""
    rows = rows_of(of)
    energies = -pair_distances(rows).log()
    left, values = spectrum(rows, of.dtype)
    numbers = {
        f"gnc2{of_what}": energy_variation(energies),
        f"gnc2{of_what}_energy": mean_energy(energies),
        f"effective_rank{of_what}": entropy_rank(values),
        f"mean_rank{of_what}": numerical_rank(values, max(rows.shape[-2:]), of.dtype),
    }
    return numbers, left, values


def nearest_numbers(counts: Tensor | None) -> dict[str, Any]:
    """Turn the counts of `metrics.agreement`, `[K, 3]`, into the fields of `LayerResult` on nearest means.

    There are none without counts, and NaN without samples.
    """
    if counts is None:
        return {}
    samples, right, differ = counts.cpu().double().unbind(-1)
    return {
        "nearest_mean_accuracy": float(right.sum() / samples.sum()),
        "nearest_mean_accuracy_per_class": (right / samples).tolist(),
        "nc4_per_class": (differ / samples).tolist(),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """Metrics of one layer's features; definitions in `ncollapse.metrics`. NaN is undefined, None not measured.

    Attributes:
        nearest_mean_accuracy: share of the samples whose nearest training mean is that of their class.
        nearest_mean_accuracy_per_class, nc4_per_class: the same, and NC4, for each class; NaN without samples.
    """

    nc1: float
    nc1_trace_ratio: float
    nc1_cdnv: float
    nc2: float
    nc2_equinorm: float
    nc2_equiangularity: float
    nc1_trace_ratio_balanced: float | None = None
    gnc2: float | None = None
    gnc2_energy: float | None = None
    effective_rank: float | None = None
    mean_rank: float | None = None
    nearest_mean_accuracy: float | None = None
    nearest_mean_accuracy_per_class: list[float] = dataclasses.field(default_factory=list, repr=False)
    nc4_per_class: list[float] = dataclasses.field(default_factory=list, repr=False)

    @property
    def undefined(self) -> tuple[str, ...]:
        """The names of the metrics that are NaN."""
        return tuple(name for name, value in self.as_dict().items() if math.isnan(value))

    def as_dict(self) -> dict[str, float]:
        """Return all measured numbers by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, float | int)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NCResult(LayerResult):
    """Metrics of one model; definitions in `ncollapse.metrics`.

    Attributes:
        head: name of the head, as in `model.named_modules()`.
        degenerate: features or classifier have vanished; `undefined` names the metrics that are NaN for it.
        nc5: of out-of-distribution data.
        layers: name -> metrics of that layer's features.
        means: class means of the head's input, `[K, d]` float64 on the CPU; NaN for a class without samples.
            `measure(..., previous=result)` uses them.
        matrices: name -> `[K, K]` float64 on the CPU, as `metrics.matrices` returns them; of W "singular_values" and
            "row_sum", `[min(K, d)]` each: σ_i, and the cosine of the left singular vector u_i with 1.
        test: the same of test data, where they were given. Its NC4 and accuracy of the nearest mean are against the
            means of the training data, its `train_accuracy` is that of the test data.
    """

    nc0: float
    nc2_weight: float
    nc2_weight_equinorm: float
    nc2_weight_equiangularity: float
    nc3: float
    nc3_difference: float
    nc4: float
    train_accuracy: float
    gnc2_weight: float | None = None
    gnc2_weight_energy: float | None = None
    effective_rank_weight: float | None = None
    unc3: float | None = None
    global_logits: float | None = None
    nc5: float | None = None
    degenerate: bool
    head: str = ""
    layers: dict[str, LayerResult]
    means: Tensor = dataclasses.field(repr=False, compare=False)
    matrices: dict[str, Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    test: "NCResult | None" = None

    def as_dict(self) -> dict[str, float]:
        """Return all measured numbers by name; of layers as "layer2.nc1", of test data as "test.nc1"."""
        numbers = super().as_dict()
        for name, layer in self.layers.items():
            numbers |= {f"{name}.{key}": value for key, value in layer.as_dict().items()}
        if self.test is not None:
            numbers |= {f"test.{key}": value for key, value in self.test.as_dict().items()}
        return numbers
