"""`measure`: NC0–NC4 of any model on any data."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nc import metrics
from nc.stats import ClassStats


@dataclasses.dataclass(frozen=True)
class NCResult:
    """NC metrics of one model (definitions in `nc.metrics`); `degenerate` says that NC1–NC3 are undefined (NaN)."""

    nc0: float
    nc1: float
    nc2: float
    nc3: float
    nc4: float
    train_accuracy: float
    degenerate: bool

    def as_dict(self) -> dict[str, float]:
        """The fields by name."""
        return dataclasses.asdict(self)


def summarize(weight: Tensor, features: Tensor, logits: Tensor, labels: Tensor, stats: ClassStats) -> dict[str, Tensor]:
    """Every metric of a classifier, by the name under which it is stored; tensors of shape `[*]` (`*`: nothing or R).

    Args:
        weight: W `[*, K, d]`.
        features: `[*, N, d]`, all samples.
        logits: `[*, N, K]` of the same samples.
        labels: `[N]`.
        stats: of these features.
    """
    return {
        "nc0": metrics.nc0(weight),
        "nc1": metrics.nc1(stats),
        "nc1_trace_ratio": metrics.nc1(stats, kind="trace_ratio"),
        "nc2": metrics.nc2(stats),
        "nc2_equinorm": metrics.nc2(stats, kind="equinorm"),
        "nc2_equiangularity": metrics.nc2(stats, kind="equiangularity"),
        "nc3": metrics.nc3(weight, stats),
        "nc3_difference": metrics.nc3(weight, stats, kind="difference"),
        "nc4": metrics.nc4(features, logits, stats),
        "train_accuracy": (logits.argmax(-1) == labels).double().mean(-1),
        "degenerate": metrics.degenerate(weight, stats),
    }


def measure(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
    *,
    head: str = "fc",
    batch_size: int = 1024,
) -> NCResult:
    """NC0–NC4 of a classifier on its training data.

    One forward pass in eval mode without gradients. The head's inputs are kept on the model's device (N × d values),
    since NC4 needs the class means first. The model's mode is restored whatever happens.

    Args:
        model: any module that returns its head's output for a batch of inputs.
        loader: batches (inputs, labels `[B]`), or one such pair of tensors, which is cut into `batch_size`.
        head: name of the last layer, an `nn.Linear`, as in `model.named_modules()`.

    Raises:
        ValueError: no module of that name (near matches are listed), an empty loader, labels out of range.
        TypeError: the head is not linear.
    """
    layer = _find_head(model, head)
    device = layer.weight.device
    stats = ClassStats(layer.out_features, layer.in_features, device=device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    with _eval_mode(model), torch.no_grad():
        for inputs, labels in _batches(loader, batch_size):
            labels = labels.to(device)
            features, logits = _through_head(model, layer, inputs.to(device))
            stats.update(features, labels)
            kept.append((features, logits, labels))
        if not kept:
            raise ValueError("measure: the loader gave no batches")
        features, logits, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
        values = summarize(layer.weight, features, logits, labels, stats)
    names = {field.name for field in dataclasses.fields(NCResult)} - {"degenerate"}
    return NCResult(**{name: values[name].item() for name in names}, degenerate=bool(values["degenerate"]))


def _find_head(model: nn.Module, head: str) -> nn.Linear:
    modules = dict(model.named_modules())
    if head not in modules:
        near = difflib.get_close_matches(head, modules, n=5, cutoff=0.4)
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"measure: the model has no module {head!r}; near matches: {', '.join(near) or 'none'}; "
            f"linear layers: {', '.join(linear) or 'none'}"
        )
    layer = modules[head]
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"measure: the head must be an nn.Linear; {head!r} is a {type(layer).__name__}")
    return layer


def _through_head(model: nn.Module, layer: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    try:
        model(inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"measure: the head ran {len(seen)} times in one forward pass; it must run once")
    return seen[0]


def _batches(
    loader: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[0], Tensor):
        yield from zip(loader[0].split(size), loader[1].split(size), strict=True)
    else:
        yield from loader


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
