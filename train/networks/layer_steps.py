"""The steps of a graph of layers: each takes its tensors by name and its activations, and runs a layer for R runs."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ncollapse.train.networks import stacked_layers as layers
from ncollapse.train.networks.stacked_layers import Batch, ForwardContext

#: What a step computes of the activations that it needs.
LayerStep = Callable[[ForwardContext, Sequence[Batch]], Batch]


def linear(context: ForwardContext, xs: Sequence[Batch], *, weight: str, bias: str, relu: bool = False) -> Batch:
    tensors = context.tensors
    return layers.linear(xs[0], tensors[weight], tensors[bias] if bias else None, relu=relu)


def convolution(context: ForwardContext, xs: Sequence[Batch], *, module: nn.Conv2d, weight: str, bias: str) -> Batch:
    tensors = context.tensors
    return layers.convolution(xs[0], module, tensors[weight], tensors[bias] if bias else None)


def batch_norm(
    context: ForwardContext, xs: Sequence[Batch], *, module: nn.BatchNorm1d | nn.BatchNorm2d, names: Sequence[str],
    relu: bool = False, pool: bool = False, residual: bool = False,
) -> Batch:  # fmt: skip
    tensors = [context.tensors[name] for name in names]
    added = xs[1] if residual else None
    return layers.batch_norm(xs[0], module, tensors, train=context.train, relu=relu, pool=pool, residual=added)


def norm(
    context: ForwardContext,
    xs: Sequence[Batch],
    *,
    form: Callable[..., Batch],
    module: nn.Module,
    weight: str,
    bias: str,
) -> Batch:
    return form(xs[0], module, context.tensors[weight], context.tensors[bias])


def pointwise(context: ForwardContext, xs: Sequence[Batch], *, function: Callable[[Tensor], Tensor]) -> Batch:
    return Batch(function(xs[0].value), xs[0].shared)


def pool(context: ForwardContext, xs: Sequence[Batch], *, function: Callable[[Tensor], Tensor]) -> Batch:
    if not xs[0].is_map:
        raise ValueError("pooling of stacked runs takes maps")
    return Batch(function(xs[0].value), xs[0].shared)


def over_space(context: ForwardContext, xs: Sequence[Batch], *, function: Callable[[Tensor], Tensor]) -> Batch:
    return layers.over_space(function, xs[0], context.runs)


def maximum_over_space(context: ForwardContext, xs: Sequence[Batch]) -> Batch:
    return layers.over_space(layers.maximum, xs[0], context.runs)


def flatten(context: ForwardContext, xs: Sequence[Batch], *, length: int = -1) -> Batch:
    out = layers.flatten(xs[0], context.runs)
    if length not in (-1, out.value.shape[-1]):
        raise ValueError(f"a view as [B, {length}] of samples with {out.value.shape[-1]} values")
    return out


def same(context: ForwardContext, xs: Sequence[Batch]) -> Batch:
    return xs[0]


def both(context: ForwardContext, xs: Sequence[Batch], *, function: Callable[..., Tensor]) -> Batch:
    a, b = xs
    if a.is_map != b.is_map:
        raise ValueError("a sum of maps and vectors")
    if a.shared and b.shared:
        return Batch(function(a.value, b.value), shared=True)
    return Batch(function(layers.unshared(a, context.runs), layers.unshared(b, context.runs)))


def mean(maps: Tensor) -> Tensor:
    return maps.mean((-2, -1))
