"""NC0–NC4 of a classifier: `Measurement` batch by batch, `measure` of any model, `NCCallback` while it trains."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ncollapse import metrics
from ncollapse.batches import Loader, labelled_batches
from ncollapse.heads import find_module
from ncollapse.hooks import Pool, capture_features
from ncollapse.result import HEAD_METRICS, OF_HEAD, OF_LAYER, LayerResult, NCResult
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
        nan_policy: Literal["raise", "propagate"] = "raise", name: str = "", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        if not set(names) <= set(HEAD_METRICS):
            raise ValueError(f"Measurement: metrics are {', '.join(HEAD_METRICS)}; got {', '.join(names)}")
        self._weight, self._names, self._moment = weight.detach(), names, moment
        self._nan_policy, self._dtype = nan_policy, dtype
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
            self._kept.append((features, predicted))
            self._bytes_left -= features.nbytes
            if self._bytes_left < 0:
                self._kept = None

    def end_pass(self) -> bool:
        """End the first pass over the data; return whether a second is needed, in which the same batches are added."""
        kept, compared = self._kept, self._centres is not None
        self._first_pass, self._kept, self._centres = False, None, None
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
        return self._centres is not None or self._moment == "projected"

    def finish(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Compute the metrics.

        Returns:
            name -> value `[*]` of each metric of the head, and for each further layer the same of its features. NC4 is
            NaN if it needed a second pass that was not made.

        Raises:
            ValueError: samples of fewer than two classes, batches that were refused.
        """
        if self._first_pass:
            self.end_pass()
        values = {name: of(self.stats) for name, of in OF_LAYER.items() if name in self._names}
        values |= {name: of(self._weight, self.stats) for name, of in OF_HEAD.items() if name in self._names}
        if self._means is not None:
            finite = self._means[..., self.stats.present, :].isfinite().flatten(-2).all(-1)  # else nothing is near
            values["nc4"] = (self._differ.double() / self._compared).masked_fill(~finite, float("nan"))
        if "train_accuracy" in self._names:
            values["train_accuracy"] = self._correct.double() / self.samples
        layers = {key: {name: of(stats) for name, of in OF_LAYER.items()} for key, stats in self._layers.items()}
        return values, layers

    def _statistics(self, dim: int, name: str, device: torch.device) -> ClassStats:
        *runs, classes, _ = self._weight.shape
        return ClassStats(
            classes, dim, moment="full" if self._moment == "full" else "trace", runs=runs[0] if runs else None,
            nan_policy=self._nan_policy, name=name, device=device, dtype=self._dtype,
        )  # fmt: skip

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


def measure(
    model: nn.Module, loader: Loader, *, head: str = "fc", layers: Sequence[str] = (), pool: Pool | None = None,
    moment: Literal["full", "projected"] = "full", previous: NCResult | None = None, keep_bytes: int = 2**30,
    nan_policy: Literal["raise", "propagate"] = "raise", batch_size: int = 1024,
) -> NCResult:  # fmt: skip
    """Measure NC0–NC4 of a classifier on its training data.

    The model runs once over the data, in evaluation mode without gradients; its modes and hooks are restored, also
    after an error. For NC4 the head's inputs (N × d values) are kept until the class means are known; if they take more
    than `keep_bytes`, there is a second forward pass instead. With `previous` NC4 takes the class means of that earlier
    result, a good approximation if they have hardly moved since. Two passes see the same data only if the loader yields
    the same data twice, so use it without random augmentation.

    Args:
        model: any module; of a compiled one the original runs, since hooks are not part of compiled code.
        loader: batches, or one pair of tensors (inputs, labels). A batch is a mapping of the model's keyword arguments
            and "labels", or a pair (inputs, labels `[B]`), where inputs are a tensor, a tuple (positional arguments) or
            a mapping (keyword arguments).
        head: name of the last layer, as in `model.named_modules()`: an `nn.Linear` with features `[B, d]` as input.
        layers: names of further layers; NC1 and NC2 of their outputs are measured.
        pool: makes features `[B, d]` of a layer's output. Default: outputs `[B, d]` unchanged, of maps `[B, d, H, W]`
            (or with three dimensions of space) the mean over space, of a tuple the first entry.
        moment, nan_policy: as in `Measurement` and `ClassStats`.
        previous: an earlier result of the same model.
        keep_bytes: the most that the features kept for NC4 may take, on the head's device.
        batch_size: of the batches into which a pair of tensors is cut.

    Raises:
        ValueError: no module of that name (near matches are listed), an empty loader, labels out of range, features
            that are NaN or not `[B, d]`, fewer than two classes.
        TypeError: the head is not linear, labels are not integers.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    linear = find_module(model, head)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"measure: the head must be an nn.Linear; {head!r} is a {type(linear).__name__}")
    if previous is not None and previous.means.shape != linear.weight.shape:
        raise ValueError(
            f"measure: previous has means {tuple(previous.means.shape)}; the head {head!r} has K × d = "
            f"{tuple(linear.weight.shape)}"
        )
    once = isinstance(loader, Iterator)
    if moment == "projected" and once:
        raise ValueError("measure: moment='projected' needs two passes over the data, and an iterator allows one")
    measurement = Measurement(
        linear.weight, moment=moment, previous=None if previous is None else previous.means, keep_bytes=keep_bytes,
        nan_policy=nan_policy, name=head,
    )  # fmt: skip
    modules = {name: find_module(model, name) for name in layers}
    with torch.no_grad(), capture_features(model, linear, modules, pool) as run:

        def add_all() -> None:
            for inputs, labels in labelled_batches(loader, batch_size):
                features, logits, features_of_layers = run(inputs)
                measurement.add(features, logits, labels, features_of_layers)

        add_all()
        if not measurement.samples:
            raise ValueError("measure: the loader gave no samples")
        if measurement.end_pass():
            if once:
                warnings.warn(
                    f"measure: NC4 is unknown (NaN): the features take more than keep_bytes={keep_bytes}, and an "
                    "iterator cannot be read twice; give a loader, a previous result or more keep_bytes",
                    stacklevel=2,
                )
            else:
                add_all()
        values, values_of_layers = measurement.finish()
    numbers = to_numbers(values)
    numbers["degenerate"] = bool(numbers["degenerate"])
    layer_results = {name: LayerResult(**to_numbers(of_layer)) for name, of_layer in values_of_layers.items()}
    return NCResult(**numbers, layers=layer_results, means=measurement.stats.means.cpu())


def to_numbers(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert values `[*]` to numbers, or to lists of the stacked runs, with one wait for the device."""
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))


class NCCallback:
    """Call `measure` at calls 0, `every`, 2 · `every`, … of this object, one per step (or epoch) of a training loop.

    Args:
        model, loader, and all options: as for `measure`.

    Attributes:
        history: pairs (number of the call, result).

    Example:
        >>> callback = NCCallback(model, loader, head="fc", every=10)
        >>> for epoch in range(100):
        ...     train_one_epoch()
        ...     if result := callback():
        ...         log(result.as_dict())
    """

    def __init__(self, model: nn.Module, loader: Loader, *, every: int = 1, **options: Any) -> None:
        if every < 1:
            raise ValueError(f"NCCallback: every must be at least 1, got {every}")
        if isinstance(loader, Iterator):
            raise ValueError("NCCallback: an iterator can be read only once; give a loader or a pair of tensors")
        self.model, self.loader, self.every, self.options = model, loader, every, options
        self.calls = 0
        self.history: list[tuple[int, NCResult]] = []

    def __call__(self) -> NCResult | None:
        """Count the call; return a result at every `every`-th, else None."""
        call, self.calls = self.calls, self.calls + 1
        if call % self.every:
            return None
        result = measure(self.model, self.loader, **self.options)
        self.history.append((call, result))
        return result
