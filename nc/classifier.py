"""NC0–NC5 of any classifier: `measure` a model on data, `NCCallback` while it trains."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ncollapse import metrics
from ncollapse.batches import Batch, Loader
from ncollapse.heads import Head, find_module, name_of
from ncollapse.hooks import HeadLike, unwrapped, watch
from ncollapse.measurement import Measurement, to_numbers
from ncollapse.passes import MeasuredHead, Passes
from ncollapse.process_group import is_sharded
from ncollapse.result import LayerResult, NCResult, further_of_head, further_of_layer, nearest_numbers
from ncollapse.samples import Pool

Heads = list[Any] | tuple[HeadLike, ...] | Mapping[str, HeadLike]


class MeasureOptions(TypedDict, total=False):
    """The options of `measure`."""

    layers: Sequence[str]
    test: Loader | None
    ood: Loader | None
    further: bool
    pool: Pool | None
    batch: Batch | None
    ignore_index: int | None
    group: Any
    moment: Literal["full", "projected"]
    previous: NCResult | Mapping[str, NCResult] | None
    keep_bytes: int
    nan_policy: Literal["raise", "propagate"]
    dtype: torch.dtype | None
    batch_size: int
    progress: bool | None


@overload
def measure(
    model: nn.Module, loader: Loader, *, head: HeadLike = None, **options: Unpack[MeasureOptions]
) -> NCResult: ...
@overload
def measure(
    model: nn.Module, loader: Loader, *, head: Heads, **options: Unpack[MeasureOptions]
) -> dict[str, NCResult]: ...
def measure(
    model: nn.Module, loader: Loader, *, head: HeadLike | Heads = None,
    layers: Sequence[str] = (), test: Loader | None = None, ood: Loader | None = None, further: bool = True,
    pool: Pool | None = None, batch: Batch | None = None,
    ignore_index: int | None = -100, group: Any = None, moment: Literal["full", "projected"] = "full",
    previous: NCResult | Mapping[str, NCResult] | None = None, keep_bytes: int = 2**30,
    nan_policy: Literal["raise", "propagate"] = "raise", dtype: torch.dtype | None = None, batch_size: int = 1024,
    progress: bool | None = None,
) -> NCResult | dict[str, NCResult]:  # fmt: skip
    """Measure NC0–NC5 of a classifier on its training data, and on test and out-of-distribution data if they are given.

    The model runs once over the data, in evaluation mode without gradients; its modes and hooks are restored, also
    after an error. For NC4 and the nearest class means the features of the head and of the layers (N × d values) are
    kept until the class means are known; if they take more than `keep_bytes`, there is a second forward pass instead.
    With `previous` NC4 takes the class means of that earlier result, a good approximation if they have hardly moved
    since; the layers' nearest means are left out then. Two passes see the same data only if the loader yields the same
    data twice, so use it without random augmentation.

    Args:
        model: any module. Of one that is compiled, in place, in part or by `torch.compile`, the original code runs,
            since hooks are not part of compiled code; of DataParallel and DistributedDataParallel the module within.
        loader: batches, samples, a `Dataset`, or one pair of tensors or arrays (inputs, labels). A batch is a pair
            (inputs, labels), where inputs are a tensor, a tuple (positional arguments) or a mapping (keyword
            arguments), and entries after the labels are not used; or a mapping with "labels" or "label", from which
            the model gets the entries that it takes.
            Labels are class indices `[B]` or `[B, 1]` of any integer dtype, or one-hot `[B, K]`; for a head that runs
            over tokens or places they may be `[B, T]` or `[B, H, W]`, and each of these is then a sample (padding, of
            which "attention_mask" tells, is left out).
        head: the classifier's last layer. A name, as in `model.named_modules()`, or a module: a layer, or a part of
            the model, of which the last linear layer that runs is taken; None: of the whole model. Linear are
            `nn.Linear` and 1 × 1 convolutions, before or after pooling, and their variants, with the features and the
            weight that they multiply: normalised ones if they normalise. For all else a `Head` says what features,
            weight and logits are. Several heads as a sequence, or a mapping of names, give a dictionary of results;
            labels may be a mapping with the same names.
        layers: names of further layers; NC1, NC2 and the nearest class means of their outputs are measured.
        test: data like `loader`, of the same classes; `result.test` has all metrics of them, with NC4 and the nearest
            class means against the means of the training data.
        ood: out-of-distribution data, like `loader`; their labels are not used and may be missing. `result.nc5` tells
            how orthogonal they are to the class means.
        further: whether to measure what is more than NC0–NC4: uniformity, ranks, nearest means by class and layer,
            `result.matrices`. It needs arithmetic of K × K × d and memory of K × K.
        pool: makes features `[B, d]` of the output of `layers`, and of a head that runs over tokens or places of which
            the model uses one or the mean. A function, or of tokens `[B, T, d]` "mean", "first" or "last", without
            padding. Default: outputs `[B, d]` unchanged, of maps `[B, d, H, W]` (or with three dimensions of space) the
            mean over space, of a tuple the first entry; of a head's tokens those whose logits the model returns.
        batch: a function of what the loader yields that returns (inputs, labels).
        ignore_index: samples with this label are left out, as in `torch.nn.functional.cross_entropy`; None: none.
        group: a `torch.distributed` process group, such as `torch.distributed.group.WORLD`, in all of whose processes
            `measure` is called, each with its share of the data. Each then returns the result of all of it. (A
            `DistributedSampler` repeats samples until all shares are equal.) None: of this process's data.
        moment, nan_policy: as in `Measurement` and `ClassStats`.
        previous: an earlier result of the same model.
        keep_bytes: the most that the features kept for NC4 may take, on their device.
        dtype: as in `ClassStats`; None: float64 for float64 features, else float32.
        batch_size: of the batches into which a pair, a data set or samples are divided.
        progress: whether to show a progress bar on stderr; None: if that is a terminal and the pass takes long.

    Returns:
        The result, whose `head` names the layer; of several heads name -> result.

    Raises:
        ValueError: no module of that name (near matches are listed), a head that did not run exactly once, data without
            samples, labels that are soft or out of range, features that are NaN or not `[B, d]`, fewer than two
            classes.
        TypeError: the head is not linear, labels are not integers.
        RuntimeError: another process of the group failed.
    """
    model = unwrapped(model)
    several = _by_name(model, head)
    heads: Mapping[str, HeadLike] = {"": head} if several is None else several  # type: ignore[dict-item]
    earlier = previous if isinstance(previous, Mapping) else dict.fromkeys(heads, previous)
    loaders = [each for each in (loader, test, ood) if each is not None]
    if moment == "projected" and any(isinstance(each, Iterator) for each in (loader, test)):
        raise ValueError("measure: moment='projected' may need two passes over the data, and an iterator allows one")
    if group is None and any(isinstance(getattr(each, "sampler", None), DistributedSampler) for each in loaders):
        warnings.warn(
            "measure: the loader has a DistributedSampler, and the result is of this process's share of the data only; "
            "give group=torch.distributed.group.WORLD in every process",
            stacklevel=2,
        )

    def begin(name: str, weight: Tensor, means: Tensor | None, of_layers: Mapping[str, Tensor]) -> Measurement:
        return Measurement(
            weight, moment=moment, previous=means, by_layer=further, previous_of_layers=of_layers,
            keep_bytes=keep_bytes // len(heads), group=group, nan_policy=nan_policy, name=name, dtype=dtype,
        )  # fmt: skip

    def begin_training(key: str, name: str, weight: Tensor) -> Measurement:
        means = None if (result := earlier.get(key)) is None else result.means
        if means is not None and means.shape != weight.shape:
            raise ValueError(
                f"measure: previous has means {tuple(means.shape)}; the head {name!r} has K × d = {tuple(weight.shape)}"
            )
        return begin(name, weight, means, {})

    def begin_test(key: str, name: str, weight: Tensor) -> Measurement:
        known = trained[key].measurement
        return begin(f"{name}, test data", weight, known.means, known.means_of_layers)

    modules = {name: find_module(model, name) for name in layers}
    with torch.no_grad(), watch(model, list(heads.values()), modules, pool) as run:
        state = next(chain(model.parameters(), model.buffers()), None)
        passes = Passes(
            run=run, keys=tuple(heads), pool=pool, batch=batch, ignore_index=ignore_index, batch_size=batch_size,
            progress=progress, group=group, together=group is not None and is_sharded(model),
            device=torch.device("cpu") if state is None else state.device,
        )  # fmt: skip
        trained = passes.measure(loader, "", begin_training)
        tested = {} if test is None else passes.measure(test, "test data", begin_test)
        strange = {} if ood is None else passes.mean(ood, trained, "out-of-distribution data")
    results: dict[str, NCResult] = {}
    for key, measured in trained.items():
        of_test = _result(tested[key], None, None, further) if key in tested else None
        results[key] = _result(measured, of_test, strange.get(key), further)
    return results if several is not None else results[""]


def _by_name(model: nn.Module, head: HeadLike | Heads) -> dict[str, HeadLike] | None:
    """Return name -> head of several heads, None of one."""
    if isinstance(head, Mapping):
        heads = dict(head)
    elif isinstance(head, list | tuple):
        names = [
            h.name if isinstance(h, Head) else name_of(model, h) if isinstance(h, nn.Module) else str(h) for h in head
        ]
        heads = dict(zip(names, head, strict=True))
        if len(heads) < len(head):
            raise ValueError(f"measure: heads must have different names; got {', '.join(names)}")
    else:
        return None
    if not heads or None in heads.values():
        raise ValueError("measure: of several heads each is a name, a module or a Head")
    return heads


def _result(measured: MeasuredHead, test: NCResult | None, strange: Tensor | None, more: bool) -> NCResult:
    """Compute the numbers; `strange` is the mean of out-of-distribution features."""
    measurement = measured.measurement
    values, values_of_layers = measurement.finish(on_cpu=True)
    stats = measurement.stats
    weight, bias = measured.weight.to(stats.device), None if measured.bias is None else measured.bias.to(stats.device)
    nearest: dict[str, Any] = {}
    matrices: dict[str, Tensor] = {}
    if more:
        added, matrices = further_of_head(weight, bias, stats)
        values |= added
        nearest = nearest_numbers(measurement.agreement())
        for name, of_layer in values_of_layers.items():
            of_layer |= further_of_layer(measurement.layers[name])
    if strange is not None:
        values["nc5"] = metrics.nc5(strange.unsqueeze(0).to(stats.device), stats)
    numbers = to_numbers(values)
    numbers["degenerate"] = bool(numbers["degenerate"])
    layers = {
        name: LayerResult(**to_numbers(of_layer), **(nearest_numbers(measurement.agreement(name)) if more else {}))
        for name, of_layer in values_of_layers.items()
    }
    return NCResult(
        **numbers, **nearest, head=measured.name, layers=layers, means=stats.means.cpu(), matrices=matrices, test=test
    )


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

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        every: int = 1,
        head: HeadLike = None,
        **options: Unpack[MeasureOptions],
    ) -> None:
        if every < 1:
            raise ValueError(f"NCCallback: every must be at least 1, got {every}")
        if any(isinstance(each, Iterator) for each in (loader, options.get("test"), options.get("ood"))):
            raise ValueError("NCCallback: an iterator can be read only once; give a loader or a pair of tensors")
        self.model, self.loader, self.every, self.head, self.options = model, loader, every, head, options
        self.calls = 0
        self.history: list[tuple[int, NCResult]] = []

    def __call__(self) -> NCResult | None:
        """Count the call; return a result at every `every`-th, else None."""
        call, self.calls = self.calls, self.calls + 1
        if call % self.every:
            return None
        result = measure(self.model, self.loader, head=self.head, **self.options)
        self.history.append((call, result))
        return result
