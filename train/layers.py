"""The layers of a model for R runs at once, each run with its own weights: what makes one program of a stack.

Maps of R runs are `[B, R·C, H, W]`, run by run, so that a convolution is one grouped convolution and batch norm and
pooling are what they are for one run. Vectors are `[R, B, d]`, and a linear layer is one batched matrix product. Images
that all runs share, `[B, C, H, W]`, meet the first layer's weights of all runs in one ordinary product.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nc.train.models import GlobalMaxPool, Residual


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
    """Parameters and buffers of R runs by name, `[R, …]`, and whether the runs train."""

    runs: int
    tensors: Mapping[str, Tensor]
    train: bool


def forward(module: nn.Module, name: str, x: Batch, state: State) -> Batch:
    """A layer of all runs; its tensors stand under `name` in the state.

    Raises:
        TypeError: a layer that has no form for many runs; `FORMS` takes it.
    """
    form = FORMS.get(type(module))
    if form is None:
        raise TypeError(f"{type(module).__name__} ({name}) has no form for stacked runs; add one to nc.train.layers")
    return form(module, name, x, state)


def _sequential(module: nn.Sequential, name: str, x: Batch, state: State) -> Batch:
    children = list(module.named_children())
    before: nn.Module | None = None
    for (key, child), following in itertools.zip_longest(children, (c for _, c in children[1:])):
        path = f"{name}.{key}"
        if type(child) is nn.Linear:
            x = _linear(child, path, x, state, relu=type(following) is nn.ReLU)
        elif not (type(child) is nn.ReLU and type(before) is nn.Linear):
            x = forward(child, path, x, state)
        before = child
    return x


class _Linear(torch.autograd.Function):
    """x Wᵀ + b of R runs, and perhaps its ReLU in place.

    Autograd's own formula gives the weights' gradient transposed, in which layout no kernel updates it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        out = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
        ctx.relu = relu
        ctx.save_for_backward(x, weight, out.relu_() if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight, out = ctx.saved_tensors
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        back = torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None
        return back, torch.bmm(grad.mT, x), grad.sum(1), None


def _linear(module: nn.Linear, name: str, x: Batch, state: State, relu: bool = False) -> Batch:
    weight, bias = state.tensors[f"{name}.weight"], state.tensors[f"{name}.bias"]
    value = x.value.expand(state.runs, -1, -1) if x.shared else x.value
    return Batch(_Linear.apply(value, weight, bias, relu))


def _conv(module: nn.Conv2d, name: str, x: Batch, state: State) -> Batch:
    assert module.bias is None
    weight = state.tensors[f"{name}.weight"].flatten(0, 1).contiguous(memory_format=torch.channels_last)
    groups = 1 if x.shared else state.runs
    return Batch(F.conv2d(x.value, weight, None, module.stride, module.padding, module.dilation, groups))


def _batch_norm(module: nn.BatchNorm2d, name: str, x: Batch, state: State) -> Batch:
    weight, bias, mean, var = (
        state.tensors[f"{name}.{part}"].view(-1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    if state.train:
        state.tensors[f"{name}.num_batches_tracked"].add_(1)
    assert module.momentum is not None
    return Batch(F.batch_norm(x.value, mean, var, weight, bias, state.train, module.momentum, module.eps))


def _max_pool(module: nn.MaxPool2d, name: str, x: Batch, state: State) -> Batch:
    return Batch(F.max_pool2d(x.value, module.kernel_size, module.stride, module.padding), x.shared)


def _global_max_pool(module: GlobalMaxPool, name: str, x: Batch, state: State) -> Batch:
    return Batch(module(x.value).unflatten(1, (state.runs, -1)).transpose(0, 1))


def _flatten(module: nn.Flatten, name: str, x: Batch, state: State) -> Batch:
    if x.shared:
        return Batch(x.value.flatten(1), shared=True)
    return Batch(x.value.unflatten(1, (state.runs, -1)).transpose(0, 1).flatten(2))


def _relu(module: nn.ReLU, name: str, x: Batch, state: State) -> Batch:
    return Batch(F.relu(x.value), x.shared)


def _residual(module: Residual, name: str, x: Batch, state: State) -> Batch:
    return Batch(x.value + forward(module.block, f"{name}.block", x, state).value)


Form = Callable[[Any, str, Batch, State], Batch]
FORMS: dict[type[nn.Module], Form] = {
    nn.Sequential: _sequential,
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    GlobalMaxPool: _global_max_pool,
    nn.Flatten: _flatten,
    nn.ReLU: _relu,
    Residual: _residual,
}
