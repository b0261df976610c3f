"""NC0–NC4 of any classifier: `measure` a model on data, `NCCallback` while it trains."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

from ncollapse.batches import Batch, Loader, batch_count, labelled_batches
from ncollapse.heads import Head, find_module, name_of
from ncollapse.hooks import Forward, HeadLike, unwrapped, watch
from ncollapse.measurement import Measurement, to_numbers
from ncollapse.process_group import in_step, is_sharded, run_in_all, told_by_all
from ncollapse.progress import tracked
from ncollapse.result import LayerResult, NCResult
from ncollapse.samples import Pool, select_samples

Heads = list[Any] | tuple[HeadLike, ...] | Mapping[str, HeadLike]


class MeasureOptions(TypedDict, total=False):
    """The options of `measure`."""

    layers: Sequence[str]
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
    layers: Sequence[str] = (), pool: Pool | None = None, batch: Batch | None = None, ignore_index: int | None = -100,
    group: Any = None, moment: Literal["full", "projected"] = "full",
    previous: NCResult | Mapping[str, NCResult] | None = None, keep_bytes: int = 2**30,
    nan_policy: Literal["raise", "propagate"] = "raise", dtype: torch.dtype | None = None, batch_size: int = 1024,
    progress: bool | None = None,
) -> NCResult | dict[str, NCResult]:  # fmt: skip
    """Measure NC0–NC4 of a classifier on its training data.

    The model runs once over the data, in evaluation mode without gradients; its modes and hooks are restored, also
    after an error. For NC4 the head's inputs (N × d values) are kept until the class means are known; if they take more
    than `keep_bytes`, there is a second forward pass instead. With `previous` NC4 takes the class means of that earlier
    result, a good approximation if they have hardly moved since. Two passes see the same data only if the loader yields
    the same data twice, so use it without random augmentation.

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
        layers: names of further layers; NC1 and NC2 of their outputs are measured.
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
        keep_bytes: the most that the features kept for NC4 may take, on the head's device.
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
    once = isinstance(loader, Iterator)
    if moment == "projected" and once:
        raise ValueError("measure: moment='projected' needs two passes over the data, and an iterator allows one")
    if group is None and isinstance(getattr(loader, "sampler", None), DistributedSampler):
        warnings.warn(
            "measure: the loader has a DistributedSampler, and the result is of this process's share of the data only; "
            "give group=torch.distributed.group.WORLD in every process",
            stacklevel=2,
        )
    start = partial(Measurement, moment=moment, keep_bytes=keep_bytes // len(heads), group=group, nan_policy=nan_policy)
    measurements: dict[str, Measurement] = {}

    def add(run: Callable[[Any], Forward]) -> None:
        """Add all batches to the measurements, which begin with the first."""
        parts = labelled_batches(loader, batch_size, batch)
        show = progress if group is None or dist.get_rank(group) == 0 else False
        parts = tracked(parts, batch_count(loader, batch_size), show)
        steps = in_step(parts, group) if group is not None and is_sharded(model) else ((part, True) for part in parts)
        for (inputs, labels), is_new in steps:
            forward = run(inputs)
            if not is_new:
                continue
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            for key, (name, call) in zip(heads, forward.heads, strict=True):
                features, logits, classes, of_layers = select_samples(
                    call, forward.output, labels[key] if isinstance(labels, Mapping) else labels, forward.layers,
                    pool=pool, mask=mask, ignore_index=ignore_index,
                )  # fmt: skip
                if key not in measurements:
                    means = None if (result := earlier.get(key)) is None else result.means
                    if means is not None and means.shape != call.weight.shape:
                        raise ValueError(
                            f"measure: previous has means {tuple(means.shape)}; the head {name!r} has K × d = "
                            f"{tuple(call.weight.shape)}"
                        )
                    measurements[key] = start(call.weight, previous=means, name=name, dtype=dtype)
                measurements[key].add(features, logits, classes, of_layers)

    modules = {name: find_module(model, name) for name in layers}
    with torch.no_grad(), watch(model, list(heads.values()), modules, pool) as run:
        run_in_all(lambda: add(run), group)
        if not sum(told_by_all(_samples(measurements), group) if group is not None else [_samples(measurements)]):
            raise ValueError("measure: the loader gave no samples")
        if group is not None:
            _join_without_data(measurements, model, group, start)
        again = [measurement.end_pass() for measurement in measurements.values()]
        if any(again) and not once:
            run_in_all(lambda: add(run), group)
        elif any(again):
            warnings.warn(
                f"measure: NC4 is unknown (NaN): the features take more than keep_bytes={keep_bytes}, and an "
                "iterator cannot be read twice; give a loader, a previous result or more keep_bytes",
                stacklevel=2,
            )
    results = {key: _result(measurement) for key, measurement in measurements.items()}
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


def _samples(measurements: Mapping[str, Measurement]) -> int:
    return sum(measurement.samples for measurement in measurements.values())


def _join_without_data(
    measurements: dict[str, Measurement], model: nn.Module, group: Any, start: Callable[..., Measurement]
) -> None:
    """Begin the measurements of a process that had no batch, as others have begun them."""
    told = told_by_all(bool(measurements), group)
    if all(told):
        return
    mine = None
    if dist.get_rank(group) == told.index(True):
        mine = {key: measurement.blank() for key, measurement in measurements.items()}
    blanks = next(blank for blank in told_by_all(mine, group) if blank is not None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not measurements:
        for key, (weight, layers, options) in blanks.items():
            weight = weight.to(device)
            measurements[key] = start(weight, **options)
            nothing = weight[:0]
            labels = torch.zeros(0, dtype=torch.int64, device=device)
            measurements[key].add(
                nothing,
                weight.new_zeros(0, len(weight)),
                labels,
                {name: weight.new_zeros(0, dim) for name, dim in layers.items()},
            )


def _result(measurement: Measurement) -> NCResult:
    values, values_of_layers = measurement.finish()
    numbers = to_numbers(values)
    numbers["degenerate"] = bool(numbers["degenerate"])
    layers = {name: LayerResult(**to_numbers(of_layer)) for name, of_layer in values_of_layers.items()}
    means = measurement.stats.means.cpu()
    return NCResult(**numbers, head=measurement.stats.name, layers=layers, means=means)


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
        if isinstance(loader, Iterator):
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
