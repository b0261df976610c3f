"""The layers of a model for R runs at once, each run with its own weights: what makes one program of a stack.

Maps of R runs are `[B, R·C, H, W]`, run by run, so that a convolution is one grouped convolution and batch norm and
pooling are what they are for one run. Vectors are `[R, B, d]`, and a linear layer is one batched matrix product. Images
that all runs share, `[B, C, H, W]`, meet the first layer's weights of all runs in one ordinary product.

Maps and vectors have the dtype of the precision; where that is bfloat16, so have the weights of convolutions and hidden
linear layers. Batch norm's numbers and the head keep the parameters' dtype.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.kernels.batch_norm import batch_norm_relu
from ncollapse.train.networks.models import Alone, ConvBlock, GlobalMaxPool, LinearBlock, Residual
from ncollapse.train.networks.patches import convolve, few
from ncollapse.train.networks.precision import exact_products


@dataclasses.dataclass(frozen=True)
class Batch:
    """What flows between layers, of all runs; or maps `[B, C, H, W]` or vectors `[B, d]` that all runs share."""

    value: Tensor
    shared: bool = False

    @staticmethod
    def of(images: Tensor) -> "Batch":
        """Images `[B, C, H, W]` for all runs, or `[R, B, C, H, W]`."""
        if images.dim() == 4:
            return Batch(_channels_last(images), shared=True)
        return Batch(_channels_last(images.transpose(0, 1).flatten(1, 2)))


def _channels_last(maps: Tensor) -> Tensor:
    maps = maps.contiguous(memory_format=torch.channels_last)
    # With one channel both layouts are the same in memory; torch would take it for the other one.
    return maps if maps.shape[1] > 1 else maps.as_strided(maps.shape, (maps.stride(0), 1, maps.stride(2), 1))


@dataclasses.dataclass(frozen=True)
class State:
    """What the layers of R runs compute with.

    Attributes:
        tensors: parameters and buffers by name, `[R, …]`.
        train: whether the runs train, or are evaluated.
        watched: modules, by name, whose output is wanted.
        seen: takes it, `[R, B, d]`; of maps the mean over space.
    """

    runs: int
    tensors: Mapping[str, Tensor]
    train: bool
    watched: Collection[str] = ()
    seen: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def forward(module: nn.Module, name: str, x: Batch, state: State) -> Batch:
    """A layer of all runs; its tensors stand under `name` in the state.

    Raises:
        TypeError: a layer that has no form for many runs; `FORMS` takes it.
    """
    form = FORMS.get(type(module))
    if form is None:
        raise TypeError(
            f"{type(module).__name__} ({name}) has no form for stacked runs; add one to networks/stacked_layers.py"
        )
    out = form(module, name, x, state)
    if name in state.watched:
        value = out.value
        state.seen[name] = _by_run(value.mean((-2, -1)), state) if value.dim() == 4 else value
    return out


def _by_run(vectors: Tensor, state: State) -> Tensor:
    """`[B, R·d]` as `[R, B, d]`."""
    return vectors.unflatten(1, (state.runs, -1)).transpose(0, 1)


def _rounds(x: Tensor) -> bool:
    """Whether products of bfloat16 have to be made as a GPU makes them, of float32: the CPU's own are 10 × slower."""
    return x.dtype == torch.bfloat16 and not x.is_cuda


def _sequential(module: nn.Sequential, name: str, x: Batch, state: State) -> Batch:
    for key, child in module.named_children():
        x = forward(child, f"{name}.{key}", x, state)
    return x


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.float(), b.float()).to(a.dtype) if _rounds(a) else torch.bmm(a, b)


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if _rounds(a):
        return torch.baddbmm(bias, a.float(), b.float()).to(a.dtype)
    return torch.baddbmm(bias.to(a.dtype), a, b)


class _Linear(torch.autograd.Function):
    """x Wᵀ + b of R runs, and perhaps its ReLU in place.

    Autograd's own formula gives the weights' gradient transposed, in which layout no kernel updates it.
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
        # First: where the first thing that a thread of autograd does on a GPU is a matrix product, torch warns.
        bias = grad.sum(1, dtype=ctx.bias_dtype)
        with ExitStack() as stack:
            if not ctx.relu:  # the head
                stack.enter_context(exact_products())
            back = _bmm(grad, weight) if ctx.needs_input_grad[0] else None
            return back, _bmm(grad.mT, x), bias, None


def _linear(name: str, x: Batch, state: State, *, relu: bool) -> Batch:
    weight, bias = state.tensors[f"{name}.weight"], state.tensors[f"{name}.bias"]
    value = x.value.expand(state.runs, -1, -1) if x.shared else x.value
    return Batch(_Linear.apply(value.to(weight.dtype), weight, bias, relu))


def _head(module: nn.Linear, name: str, x: Batch, state: State) -> Batch:
    # The row sum of its gradient is zero, exactly; rounded products would make a random walk of it.
    with exact_products():
        return _linear(name, x, state, relu=False)


def _linear_block(module: LinearBlock, name: str, x: Batch, state: State) -> Batch:
    return _linear(f"{name}.0", x, state, relu=True)


def _conv_block(module: ConvBlock, name: str, x: Batch, state: State, residual: Tensor | None = None) -> Batch:
    conv, norm = cast(nn.Conv2d, module[0]), cast(nn.BatchNorm2d, module[1])
    assert norm.momentum is not None
    weight = state.tensors[f"{name}.0.weight"].flatten(0, 1)  # a view: `Stack` keeps them channels-last
    factors = (x.value.float(), weight.float()) if _rounds(x.value) else (x.value, weight)
    if x.shared and x.value.is_cuda and conv.stride == (1, 1) and few(weight):
        maps = convolve(x.value, weight, cast(tuple[int, int], conv.padding))
    else:
        groups = 1 if x.shared else state.runs
        maps = F.conv2d(*factors, None, conv.stride, conv.padding, groups=groups).to(x.value.dtype)
    gain, bias, mean, var = (
        state.tensors[f"{name}.1.{part}"].view(-1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    out = batch_norm_relu(
        maps, gain, bias, mean, var,
        train=state.train, momentum=norm.momentum, eps=norm.eps, pool=len(module) > 3, residual=residual,
    )  # fmt: skip
    return Batch(out)


def _residual(module: Residual, name: str, x: Batch, state: State) -> Batch:
    first, second = (cast(ConvBlock, block) for block in module.block)
    inner = _conv_block(first, f"{name}.block.0", x, state)
    return _conv_block(second, f"{name}.block.1", inner, state, residual=x.value)


def _global_max_pool(module: GlobalMaxPool, name: str, x: Batch, state: State) -> Batch:
    return Batch(_by_run(module(x.value), state))


def _flatten(module: nn.Flatten, name: str, x: Batch, state: State) -> Batch:
    if x.shared:
        return Batch(x.value.flatten(1), shared=True)
    return Batch(x.value.unflatten(1, (state.runs, -1)).transpose(0, 1).flatten(2))


def _alone(module: Alone, name: str, x: Batch, state: State) -> Batch:
    """Any network, of one run: the module itself, with the tensors of the state."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    assert state.runs == 1
    tensors = {key.removeprefix(f"{name}."): value[0] for key, value in state.tensors.items() if key.startswith(name)}
    module.train(state.train)
    value, half = x.value, x.value.dtype == torch.bfloat16
    with ExitStack() as stack:
        for watched in state.watched:
            layer = module.get_submodule(watched.removeprefix(f"{name}."))
            stack.callback(layer.register_forward_hook(_watch(watched, state)).remove)
        # The other ways of attention do not give the same bits every time.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autocast(value.device.type, torch.bfloat16, enabled=half, cache_enabled=False))
        out = torch.func.functional_call(module, tensors, (value,))
    return Batch(out.unsqueeze(0))


def _watch(name: str, state: State) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        # Maps `[B, d, H, W]` or tokens `[B, T, d]`.
        state.seen[name] = output.mean((-2, -1) if output.dim() == 4 else 1).unsqueeze(0)

    return hook


Form = Callable[[Any, str, Batch, State], Batch]
FORMS: dict[type[nn.Module], Form] = {
    nn.Sequential: _sequential,
    nn.Linear: _head,
    nn.Flatten: _flatten,
    ConvBlock: _conv_block,
    LinearBlock: _linear_block,
    Residual: _residual,
    GlobalMaxPool: _global_max_pool,
    Alone: _alone,
}
