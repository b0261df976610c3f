"""Layers for R runs at once, each run with its own weights.

Maps of R runs are `[B, R·C, H, W]`, run by run: a convolution is one grouped convolution, and batch norm and pooling
work as for one run. Vectors are `[R, B, d]`: a linear layer is one batched matrix product. Samples that all runs share,
`[B, C, H, W]` or `[B, d]`, are multiplied with the first layer's weights of all runs in one ordinary convolution or
product.

Maps and vectors have the dtype of the precision. If that is bfloat16, so have the weights of convolutions and hidden
linear layers; batch norm's parameters and the head keep the parameters' dtype.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.kernels import pooled_head as fused
from ncollapse.kernels.batch_norm import batch_norm_relu
from ncollapse.train.networks import side_stream
from ncollapse.train.networks.precision import exact_products

# The most values per filter for which a convolution of the images is one matrix product.
_MAX_VALUES = 32
# Rows of the patch matrix are padded to a multiple of this, so that they are aligned to 16 bytes in half precision.
_ROW_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Batch:
    """Activations of all runs; if `shared`, one set of maps `[B, C, H, W]` or vectors `[B, d]` for all of them."""

    value: Tensor
    shared: bool = False

    @staticmethod
    def of(samples: Tensor) -> "Batch":
        """Make a batch of images, `[B, C, H, W]` for all runs or `[R, B, C, H, W]`, or of vectors, one dimension each.

        Raises:
            ValueError: samples of another number of dimensions.
        """
        if samples.dim() not in (2, 3, 4, 5):
            raise ValueError(f"stacked layers take images and vectors, not a batch of shape {tuple(samples.shape)}")
        shared = samples.dim() in (2, 4)
        if samples.dim() < 4:
            return Batch(samples, shared)
        return Batch(channels_last(samples if shared else samples.transpose(0, 1).flatten(1, 2)), shared)

    @property
    def is_map(self) -> bool:
        """Whether these are maps."""
        return self.value.dim() == 4


def channels_last(maps: Tensor) -> Tensor:
    """Return maps `[B, C, H, W]` in channels-last memory."""
    maps = maps.contiguous(memory_format=torch.channels_last)
    # With one channel both layouts are the same in memory, and torch would report the other one.
    return maps if maps.shape[1] > 1 else maps.as_strided(maps.shape, (maps.stride(0), 1, maps.stride(2), 1))


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """The tensors and settings of one forward pass of R runs.

    Attributes:
        tensors: name -> parameter or buffer, `[R, …]`.
        train: training mode; else evaluation mode.
        half: activations and hidden weights are bfloat16.
        outputs: if given, is filled with the outputs of the blocks, name -> `[R, B, d]`; of maps the mean over space.
    """

    runs: int
    tensors: Mapping[str, Tensor]
    train: bool
    half: bool = False
    outputs: dict[str, Tensor] | None = None


def by_run(values: Tensor, runs: int) -> Tensor:
    """View `[B, R·d, …]` as `[R, B, d, …]`."""
    return values.unflatten(1, (runs, -1)).transpose(0, 1)


def unshared(x: Batch, runs: int) -> Tensor:
    """Return the activations with those that all runs share once for each run."""
    if not x.shared:
        return x.value
    return x.value.repeat(1, runs, 1, 1) if x.is_map else x.value.expand(runs, -1, -1)


def _needs_float32(x: Tensor) -> bool:
    """Return whether to compute bfloat16 products in float32: on a CPU native ones are 10 × slower."""
    return x.dtype == torch.bfloat16 and not x.is_cuda


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.float(), b.float()).to(a.dtype) if _needs_float32(a) else torch.bmm(a, b)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if _needs_float32(a):
        return torch.baddbmm(bias, a.float(), b.float()).to(a.dtype)
    return torch.baddbmm(bias.to(a.dtype), a, b)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b of R runs, with `relu` followed by ReLU in place; `exact`: products in full float32.

    Autograd's formula gives the weights' gradient in transposed layout, which the update kernels do not take.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, exact: bool) -> Tensor:
        out = _bmm(x, weight.mT) if bias is None else _baddbmm(bias.unsqueeze(1), x, weight.mT)
        ctx.relu, ctx.exact, ctx.bias_dtype = relu, exact, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, out.relu_() if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight, out = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        # Before the products: torch warns if the first GPU operation of an autograd thread is a matrix product.
        bias_grad = None if ctx.bias_dtype is None else grad.sum(1, dtype=ctx.bias_dtype)
        with exact_products() if ctx.exact else nullcontext():
            x_grad = _bmm(grad, weight) if ctx.needs_input_grad[0] else None
            return x_grad, _bmm(grad.mT, x), bias_grad, None, None


def linear(x: Batch, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Batch:
    """Compute x Wᵀ + b, with `relu` followed by ReLU, of vectors; weight `[R, K, d]`, bias `[R, K]`."""
    if x.is_map:
        raise ValueError("a linear layer of stacked runs takes vectors, not maps")
    value = unshared(x, len(weight))
    return Batch(_Linear.apply(value, weight.to(value.dtype), bias, relu, False))


def head(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the logits `[R, B, K]` of features `[R, B, d]` in the dtype of the weight.

    The row sum of its gradient is exactly zero; rounded products would turn the row sum of W into a random walk.
    """
    with exact_products():
        return _Linear.apply(features.to(weight.dtype), weight, bias, False, True)


def pooled_head(x: Batch, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the maximum over space of maps, and the logits of these features as `head` does, by kernels if they fit.

    The kernels save launches; without them torch's operations give the same numbers up to rounding.
    """
    if not x.shared and fused.why_no_kernel(x.value, weight, bias) is None:
        return fused.pooled_head(x.value, weight, bias)
    features = unshared(over_space(maximum, x, len(weight)), len(weight))
    return features, head(features, weight, bias)


def is_small_filter(weight: Tensor) -> bool:
    """Return whether filters `[O, C, h, w]` have so few values that `convolve` is the faster way."""
    return weight[0].numel() <= _MAX_VALUES


def convolve(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """Compute `F.conv2d` with stride 1 and zero padding, of images that need no gradient, as one matrix product.

    Convolution libraries are optimised for many channels. As a matrix product the first layer of ResNet9, one channel
    to 64 at 28 × 28 in batches of 128, takes 18 µs forward and backward on an H100 (bench/results/cnn-cuda.json,
    `aten::mm`), little more than writing and reading its maps.

    Args:
        images: `[N, C, H, W]`.
        weight: `[O, C, h, w]`, of the images' dtype.
        padding: rows and columns of zeros on each side.

    Returns:
        `[N, O, H', W']`, channels-last.
    """
    (rows, cols), size = padding, weight.shape[1:]
    values = size.numel()
    windows = F.pad(images, (cols, cols, rows, rows)).unfold(2, size[1], 1).unfold(3, size[2], 1)
    samples, _, height, width = windows.shape[:4]
    columns = -(-values // _ROW_MULTIPLE) * _ROW_MULTIPLE
    patches = images.new_zeros(samples, height, width, columns)
    patches[..., :values].unflatten(-1, size).copy_(windows.permute(0, 2, 3, 1, 4, 5))
    filters = F.pad(weight.flatten(1), (0, columns - values))
    return (patches.flatten(0, 2) @ filters.T).view(samples, height, width, len(weight)).permute(0, 3, 1, 2)


def convolution(x: Batch, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Batch:
    """Convolve maps as `conv` does; weight `[R, O, C, h, w]`, bias `[R, O]`."""
    if not x.is_map:
        raise ValueError("a convolution of stacked runs takes maps")
    runs = len(weight)
    x = Batch(unshared(x, runs)) if conv.groups > 1 else x
    plain = conv.stride == conv.dilation == (1, 1) and not isinstance(conv.padding, str)
    if x.shared and x.value.is_cuda and plain and is_small_filter(weight.detach()[0]):
        filters = weight.flatten(0, 1).to(x.value.dtype)  # a view, since `Stack` keeps weights channels-last
        maps = convolve(x.value, filters, cast(tuple[int, int], conv.padding))
        return Batch(maps if bias is None else maps + bias.view(-1, 1, 1).to(maps.dtype))
    groups, dtype = 1 if x.shared else runs * conv.groups, x.value.dtype
    inputs = (x.value, weight, bias)
    if _needs_float32(x.value):
        inputs = x.value.float(), weight.to(dtype).float(), None if bias is None else bias.to(dtype).float()
    maps = side_stream.conv2d(*inputs, conv.stride, conv.padding, conv.dilation, groups)
    return Batch(maps.to(dtype))


def batch_norm(
    x: Batch, norm: nn.BatchNorm1d | nn.BatchNorm2d, tensors: Sequence[Tensor], *,
    train: bool, relu: bool = False, pool: bool = False, residual: Batch | None = None,
) -> Batch:  # fmt: skip
    """Normalise maps, or vectors, as `norm` does; with `relu` followed by ReLU, and by pooling or a residual added.

    Args:
        tensors: weight, bias, running mean and variance, each `[R, C]`.
    """
    runs, (gain, bias, mean, var) = len(tensors[0]), (tensor.view(-1) for tensor in tensors)
    assert norm.momentum is not None
    value = unshared(x, runs)
    if not x.is_map:
        maps = value.transpose(0, 1).flatten(1)
        return Batch(by_run(F.batch_norm(maps, mean, var, gain, bias, train, norm.momentum, norm.eps), runs))
    if not relu:
        return Batch(F.batch_norm(value, mean, var, gain, bias, train, norm.momentum, norm.eps))
    added = None if residual is None else unshared(residual, runs)
    return Batch(
        batch_norm_relu(
            value, gain, bias, mean, var,
            train=train, momentum=norm.momentum, eps=norm.eps, pool=pool, residual=added,
        )
    )  # fmt: skip


def group_norm(x: Batch, norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> Batch:
    """Normalise maps as `norm` does; weight and bias `[R, C]`."""
    if not x.is_map:
        raise ValueError("group norm of stacked runs takes maps")
    runs, dtype = len(weight), x.value.dtype
    vectors = weight.view(-1).to(dtype), bias.view(-1).to(dtype)
    return Batch(F.group_norm(unshared(x, runs), runs * norm.num_groups, *vectors, norm.eps))


def layer_norm(x: Batch, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Batch:
    """Normalise vectors as `norm` does; weight and bias `[R, d]`."""
    if x.is_map or len(norm.normalized_shape) != 1:
        raise ValueError("layer norm of stacked runs takes vectors")
    value = unshared(x, len(weight))
    normalised = F.layer_norm(value, norm.normalized_shape, eps=norm.eps)
    return Batch((normalised * weight.unsqueeze(1) + bias.unsqueeze(1)).to(value.dtype))


def over_space(reduce: Callable[[Tensor], Tensor], x: Batch, runs: int) -> Batch:
    """Reduce maps over space to vectors, `[…, H, W]` to `[…]`."""
    if not x.is_map:
        raise ValueError("only maps have a space")
    value = reduce(x.value)
    return Batch(value, shared=True) if x.shared else Batch(by_run(value, runs))


def maximum(maps: Tensor) -> Tensor:
    """Return each channel's maximum over space; its gradient is shared evenly by the pixels that have it."""
    return maps.amax((-2, -1))


def flatten(x: Batch, runs: int) -> Batch:
    """Make vectors of maps, as `nn.Flatten` does."""
    if not x.is_map:
        return x
    return Batch(x.value.flatten(1), shared=True) if x.shared else Batch(by_run(x.value, runs).flatten(2))


def concatenate(parts: Sequence[Batch], runs: int) -> Batch:
    """Concatenate the channels of maps, or the entries of vectors."""
    values = [unshared(part, runs) for part in parts]
    if not parts[0].is_map:
        return Batch(torch.cat(values, 2))
    return Batch(torch.cat([value.unflatten(1, (runs, -1)) for value in values], 2).flatten(1, 2))
