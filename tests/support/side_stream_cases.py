"""Convolutions of R runs, and their values and gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ncollapse.train.networks import side_stream


@dataclass(frozen=True)
class Layer:
    """A convolution of R runs, of maps of their own or of images that they share."""

    runs: int = 1
    shared: bool = False
    inputs: int = 8
    outputs: int = 16
    size: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32

    @property
    def settings(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding, dilation and groups of all runs."""
        pairs = ((each, each) for each in (self.stride, self.padding, self.dilation))
        return *pairs, 1 if self.shared else self.runs * self.groups  # type: ignore[return-value]


CASES = [
    Layer(),
    Layer(bias=True),
    Layer(runs=2, bias=True),
    Layer(runs=3, shared=True, inputs=3),
    Layer(runs=2, groups=2, stride=2, padding=0, bias=True),
    Layer(size=(1, 1), padding=0, stride=2),
    Layer(dilation=2, padding=2),
    Layer(runs=2, bias=True, dtype=torch.bfloat16),  # weights are cast
    Layer(bias=True, dtype=torch.bfloat16, weight_dtype=torch.bfloat16),  # weights are copies
]


def layer(case: Layer, device: torch.device | None = None, maps: int = 7) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return maps `[4, C, maps, maps]`, channels-last, weights `[R, O, C', h, w]` and bias `[R, O]`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    channels = case.inputs if case.shared else case.runs * case.inputs
    x = random(4, channels, maps, maps).to(case.dtype).contiguous(memory_format=torch.channels_last)
    weight = random(case.runs, case.outputs, *case.size, case.inputs // case.groups).permute(0, 1, 4, 2, 3)
    weight = weight.to(case.weight_dtype)
    bias = random(case.runs, case.outputs).to(case.weight_dtype).requires_grad_() if case.bias else None
    return x.requires_grad_(), weight.requires_grad_(), bias


def gradients(case: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return the result, and the gradients of x, weight and bias for a gradient that depends on the result."""
    out = side_stream.conv2d(x, weight, bias, *case.settings)
    leaves = [x, weight, *([] if bias is None else [bias])]
    return out.detach(), *torch.autograd.grad(out, leaves, out.detach().cos())
