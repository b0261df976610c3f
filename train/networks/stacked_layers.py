"""The forward pass of a model's layers for R runs at once, each run with its own weights.

Maps of R runs are `[B, R·C, H, W]`, run by run: a convolution is one grouped convolution, and batch norm and pooling
work as for one run. Vectors are `[R, B, d]`: a linear layer is one batched matrix product. Images that all runs share,
`[B, C, H, W]`, are multiplied with the first layer's weights of all runs in one ordinary convolution or product.

Maps and vectors have the dtype of the precision. If that is bfloat16, so have the weights of convolutions and hidden
linear layers; batch norm's parameters and the head keep the parameters' dtype.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.kernels.batch_norm import batch_norm_relu
from ncollapse.train.networks.models import ConvBlock, GlobalMaxPool, LinearBlock, Residual, SingleRun
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
    def of(images: Tensor) -> "Batch":
        """Make a batch of images, `[B, C, H, W]` for all runs or `[R, B, C, H, W]`."""
        shared = images.dim() == 4
        return Batch(_channels_last(images if shared else images.transpose(0, 1).flatten(1, 2)), shared)


def _channels_last(maps: Tensor) -> Tensor:
    maps = maps.contiguous(memory_format=torch.channels_last)
    # With one channel both layouts are the same in memory, and torch would report the other one.
    return maps if maps.shape[1] > 1 else maps.as_strided(maps.shape, (maps.stride(0), 1, maps.stride(2), 1))


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """The tensors and settings of one forward pass of R runs.

    Attributes:
        tensors: name -> parameter or buffer, `[R, …]`.
        train: training mode; else evaluation mode.
        watched: names of the modules whose outputs are recorded.
        outputs: name -> recorded output `[R, B, d]`; of maps the mean over space.
    """

    runs: int
    tensors: Mapping[str, Tensor]
    train: bool
    watched: Collection[str] = ()
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def forward(module: nn.Module, name: str, x: Batch, context: ForwardContext) -> Batch:
    """Run a layer of all runs, with the tensors of the context that have its name as prefix.

    Raises:
        TypeError: `LAYERS` has no forward pass for this type of layer.
    """
    layer = LAYERS.get(type(module))
    if layer is None:
        raise TypeError(
            f"{type(module).__name__} ({name}) has no forward pass for stacked runs; add one to LAYERS in "
            "networks/stacked_layers.py"
        )
    out = layer(module, name, x, context)
    if name in context.watched:
        value = out.value
        context.outputs[name] = _by_run(value.mean((-2, -1)), context) if value.dim() == 4 else value
    return out


def _by_run(values: Tensor, context: ForwardContext) -> Tensor:
    """View `[B, R·d, …]` as `[R, B, d, …]`."""
    return values.unflatten(1, (context.runs, -1)).transpose(0, 1)


def _needs_float32(x: Tensor) -> bool:
    """Return whether to compute bfloat16 products in float32: on a CPU native ones are 10 × slower."""
    return x.dtype == torch.bfloat16 and not x.is_cuda


def _sequential(module: nn.Sequential, name: str, x: Batch, context: ForwardContext) -> Batch:
    for key, child in module.named_children():
        x = forward(child, f"{name}.{key}", x, context)
    return x


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.float(), b.float()).to(a.dtype) if _needs_float32(a) else torch.bmm(a, b)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if _needs_float32(a):
        return torch.baddbmm(bias, a.float(), b.float()).to(a.dtype)
    return torch.baddbmm(bias.to(a.dtype), a, b)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b of R runs, with `relu` followed by ReLU in place.

    Autograd's formula gives the weights' gradient in transposed layout, which the update kernels do not take.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        out = _baddbmm(bias.unsqueeze(1), x, weight.mT)
        ctx.relu, ctx.bias_dtype = relu, bias.dtype
        ctx.save_for_backward(x, weight, out.relu_() if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight, out = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        # Before the products: torch warns if the first GPU operation of an autograd thread is a matrix product.
        bias_grad = grad.sum(1, dtype=ctx.bias_dtype)
        with ExitStack() as stack:
            if not ctx.relu:  # the head
                stack.enter_context(exact_products())
            x_grad = _bmm(grad, weight) if ctx.needs_input_grad[0] else None
            return x_grad, _bmm(grad.mT, x), bias_grad, None


def _linear(name: str, x: Batch, context: ForwardContext, *, relu: bool) -> Batch:
    weight, bias = context.tensors[f"{name}.weight"], context.tensors[f"{name}.bias"]
    value = x.value.expand(context.runs, -1, -1) if x.shared else x.value
    return Batch(_Linear.apply(value.to(weight.dtype), weight, bias, relu))


def _head(module: nn.Linear, name: str, x: Batch, context: ForwardContext) -> Batch:
    # The row sum of its gradient is exactly zero; rounded products would turn the row sum of W into a random walk.
    with exact_products():
        return _linear(name, x, context, relu=False)


def _linear_block(module: LinearBlock, name: str, x: Batch, context: ForwardContext) -> Batch:
    return _linear(f"{name}.0", x, context, relu=True)


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


def _conv_block(
    module: ConvBlock, name: str, x: Batch, context: ForwardContext, residual: Tensor | None = None
) -> Batch:
    conv, norm = cast(nn.Conv2d, module[0]), cast(nn.BatchNorm2d, module[1])
    assert norm.momentum is not None
    weight = context.tensors[f"{name}.0.weight"].flatten(0, 1)  # a view, since `Stack` keeps weights channels-last
    if x.shared and x.value.is_cuda and conv.stride == (1, 1) and is_small_filter(weight):
        maps = convolve(x.value, weight, cast(tuple[int, int], conv.padding))
    else:
        groups = 1 if x.shared else context.runs
        inputs = (x.value.float(), weight.float()) if _needs_float32(x.value) else (x.value, weight)
        maps = F.conv2d(*inputs, None, conv.stride, conv.padding, groups=groups).to(x.value.dtype)
    gain, bias, mean, var = (
        context.tensors[f"{name}.1.{part}"].view(-1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    out = batch_norm_relu(
        maps, gain, bias, mean, var,
        train=context.train, momentum=norm.momentum, eps=norm.eps, pool=len(module) > 3, residual=residual,
    )  # fmt: skip
    return Batch(out)


def _residual(module: Residual, name: str, x: Batch, context: ForwardContext) -> Batch:
    first, second = (cast(ConvBlock, block) for block in module.block)
    inner = _conv_block(first, f"{name}.block.0", x, context)
    return _conv_block(second, f"{name}.block.1", inner, context, residual=x.value)


def _global_max_pool(module: GlobalMaxPool, name: str, x: Batch, context: ForwardContext) -> Batch:
    return Batch(_by_run(module(x.value), context))


def _flatten(module: nn.Flatten, name: str, x: Batch, context: ForwardContext) -> Batch:
    return Batch(x.value.flatten(1), shared=True) if x.shared else Batch(_by_run(x.value, context).flatten(2))


def _single_run(module: SingleRun, name: str, x: Batch, context: ForwardContext) -> Batch:
    """Run the module itself, with the tensors of the context."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert context.runs == 1
    tensors = {key.removeprefix(f"{name}."): value[0] for key, value in context.tensors.items() if key.startswith(name)}
    module.train(context.train)
    value, half = x.value, x.value.dtype == torch.bfloat16
    with ExitStack() as stack:
        for watched in context.watched:
            layer = module.get_submodule(watched.removeprefix(f"{name}."))
            stack.callback(layer.register_forward_hook(partial(_record, context, watched)).remove)
        # The other attention backends do not give the same bits every time.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(value.device.type, torch.bfloat16, enabled=half, cache_enabled=False))
        out = torch.func.functional_call(module, tensors, (value,))
    return Batch(out.unsqueeze(0))


def _record(context: ForwardContext, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
    """Record the mean over space or tokens of maps `[B, d, H, W]` or tokens `[B, T, d]`."""
    context.outputs[name] = output.mean((-2, -1) if output.dim() == 4 else 1).unsqueeze(0)


#: Type of a layer -> its forward pass: (module, name, x, context) -> output.
LAYERS: dict[type[nn.Module], Callable[[Any, str, Batch, ForwardContext], Batch]] = {
    nn.Sequential: _sequential, nn.Linear: _head, nn.Flatten: _flatten, LinearBlock: _linear_block,
    ConvBlock: _conv_block, Residual: _residual, GlobalMaxPool: _global_max_pool, SingleRun: _single_run,
}  # fmt: skip
