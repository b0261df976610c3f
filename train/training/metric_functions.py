"""Metrics of the user's: functions of a run's head and features that return a number."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncollapse.stats import ClassStats
from ncollapse.train.errors import OwnCodeError, UserError, out_of_memory
from ncollapse.train.plugins import Plugins, metric_name

#: What a metric can take beside the weight and the statistics, by name.
_OF_SAMPLES = ("features", "logits", "labels")


@dataclasses.dataclass(frozen=True)
class MetricFunctions:
    """The metrics of the user's, each a function that is called with what its signature names.

    | argument | |
    | --- | --- |
    | weight: also the first one, whatever its name | `[K, d]` of the head |
    | statistics, stats: also the second one | `ClassStats` of the head's input over the training data |
    | features | `[N, d]`, the head's input for all training samples |
    | logits | `[N, K]` |
    | labels | `[N]` int64 |

    The statistics have means, counts and traces, and of the second moment what NC1 needs: `within_cov()` of all d × d
    values is kept for narrow layers only (d < 4 K), so compute that from features. Features and logits of a run take
    4 N (d + K) bytes while it is evaluated.

    Attributes:
        functions: name, as in the results -> the function.
        needs: those of features, logits and labels that any of them names.
    """

    functions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    needs: frozenset[str] = frozenset()

    @staticmethod
    def of(names: Sequence[str], plugins: Plugins) -> "MetricFunctions":
        """Find metrics by the names that a grid has: FILE.py:NAME, package.module:NAME, or one given in Python.

        Raises:
            UserError: no such function, or one with arguments that a metric does not get.
        """
        functions, needs = {}, set()
        for name in names:
            function = plugins.find("metric", name)
            by_place, by_name = _takes(f"metric {name} ({plugins.where('metric', name)})", function)
            functions[metric_name(name)] = functools.partial(_call, function, by_place, by_name)
            needs.update({*_OF_SAMPLES}.intersection((*by_place, *by_name.values())))
        return MetricFunctions(functions, frozenset(needs))

    def compute(self, weight: Tensor, stats: ClassStats, samples: Mapping[str, Tensor]) -> dict[str, float]:
        """Compute all metrics of one run.

        Args:
            samples: what `needs` names.

        Raises:
            OwnCodeError: a metric raises an error, or returns something else than a number.
        """
        known = {"weight": weight, "statistics": stats, "stats": stats, **samples}
        values = {}
        for name, function in self.functions.items():
            try:
                values[name] = _number(function(known))
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise OwnCodeError.of(f"metric {name}", error) from error
        return values


def _takes(what: str, function: Callable[..., Any]) -> tuple[list[str], dict[str, str]]:
    """Return which values a metric takes, in their places, and by the names of its arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some functions in C
        return ["weight", "statistics"], {}
    known = ("weight", "statistics", "stats", *_OF_SAMPLES)
    by_place: list[str] = []
    by_name: dict[str, str] = {}
    left_out = False
    for i, parameter in enumerate(p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)):
        if parameter.name not in known and parameter.default is not parameter.empty:
            left_out = True
            continue
        if parameter.name not in known and i >= 2:
            raise UserError(
                f"{what}: a metric takes weight and statistics, and those of {', '.join(_OF_SAMPLES)} that it names; "
                f"there is no {parameter.name}"
            )
        value = parameter.name if parameter.name in known else known[i]
        if left_out or parameter.kind is parameter.KEYWORD_ONLY:
            by_name[parameter.name] = value
        else:
            by_place.append(value)
    return by_place, by_name


def _call(
    function: Callable[..., Any], by_place: Sequence[str], by_name: Mapping[str, str], known: Mapping[str, Any]
) -> Any:
    return function(*(known[value] for value in by_place), **{name: known[value] for name, value in by_name.items()})


def _number(value: Any) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        raise TypeError(f"a metric returns one number; this one returned an array of shape {list(value.shape)}")
    if isinstance(value, Tensor | np.ndarray):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"a metric returns a number; this one returned a {type(value).__name__}")
    return float(value)


def try_metric(name: str, plugins: Plugins, num_classes: int = 10, dim: int = 64) -> None:
    """Try a metric on random weights and features.

    Args:
        num_classes, dim: K and d.

    Raises:
        UserError: arguments that a metric does not get, an error in it, a result that is no finite number.
    """
    metrics = MetricFunctions.of([name], plugins)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5 * num_classes, device="cpu") % num_classes
    weight = torch.randn(num_classes, dim, generator=generator, device="cpu")
    features = torch.randn(num_classes, dim, generator=generator, device="cpu")[labels]
    features += 0.3 * torch.randn(features.shape, generator=generator, device="cpu")
    stats = ClassStats(num_classes, dim)
    stats.update(features, labels)
    if 4 * num_classes <= dim:  # as in an evaluation
        stats = stats.projected()
        stats.update(features, labels)
    samples = {"features": features, "logits": features @ weight.T, "labels": labels}
    with torch.no_grad():
        values = metrics.compute(weight, stats, samples)
    if wrong := [value for value in values.values() if not np.isfinite(value)]:
        place = plugins.where("metric", name)
        raise UserError(f"metric {name} ({place}) returns {wrong[0]}, of random weights and features")
