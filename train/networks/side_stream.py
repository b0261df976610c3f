"""The gradients of convolutions' weights beside the rest of the backward pass: a side branch of a captured CUDA graph.

Nothing waits for the gradient of a weight before the update, but everything waits for the gradients of maps. A
convolution of small maps leaves a part of the GPU idle, batch norm waits for memory: kernels of another stream fill
that. With a prototype a step of ResNet9 took 920 µs instead of 1,006, one of VGG9 711 instead of 786, and two of
ResNet9 side by side 735 a run instead of 766 (`beside` in bench/results/prototypes-cuda.json).

Autograd runs the backward pass of a node on the stream of its forward pass, lets that stream wait for the gradients
that come in, and the caller's stream for those of all leaves
(https://docs.pytorch.org/docs/stable/notes/cuda.html#stream-semantics-of-backward-passes). So the weights of a
convolution are a node of their own, whose forward pass, which computes nothing, is called on the side stream. What
autograd returns is ready on the caller's stream, and a weight that is used twice, or cast, needs no care.

This is for capture alone: a graph holds the order of its branches, while eager launches would pay for each wait.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncollapse.kernels.convolution import op as small

#: Whether captured graphs have the side branch. Measured with a prototype, not yet as it is here: `step_times` times
#: both, and `False` is the graph without a branch.
BESIDE = True


class _Settings(NamedTuple):
    """The arguments of a convolution that are not tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@functools.cache
def _stream(device: int, priority: int, key: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)


def main_stream(lane: int = 0) -> torch.cuda.Stream:
    """Return the current device's stream on which to capture; runs side by side take one each.

    Its kernels start before those of side streams that are ready too: the weights' gradients get what is left.
    """
    return _stream(torch.cuda.current_device(), -1, lane)


@contextmanager
def _side_stream() -> Iterator[None]:
    """Make current the stream beside the current one, as a part of its capture."""
    main = torch.cuda.current_stream()
    side = _stream(main.device_index, 0, main.cuda_stream)
    side.wait_stream(main)
    main.wait_stream(side)  # joined, should no backward pass follow; there is nothing to wait for
    with torch.cuda.stream(side):
        yield


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...] | str,
    dilation: tuple[int, ...], groups: int,
) -> Tensor:  # fmt: skip
    """Compute `F.conv2d` with the weights of R runs; in a captured graph their gradients get a side branch.

    The values and gradients have the same bits either way. Maps of few pixels may have kernels of ours, here and there
    (`kernels.convolution`).

    Args:
        x: `[N, C, H, W]`.
        weight: `[R, O, C', h, w]`, whose first two dimensions are one in memory; cast to x's dtype.
        bias: `[R, O]`, cast too.

    Returns:
        `[N, R·O, H', W']`, in x's dtype.
    """
    forks, ours = _forks(x, weight), small.VALUES or small.GRADIENTS
    if isinstance(padding, str) or not (forks or ours):
        return F.conv2d(x, *_filters(x, weight, bias), stride, padding, dilation, groups)
    settings = _Settings(stride, padding, dilation, groups)
    with torch.no_grad():
        filters, vector = _filters(x, weight, bias)
        fits = ours and small.fits(x, filters, *settings)
        if fits and small.VALUES and vector is None:
            out = small.small_convolution(x, filters)
        else:
            out = F.conv2d(x, filters, vector, *settings)
    with _side_stream() if forks else nullcontext():
        weights = _Weights.apply(weight, bias, x.detach(), filters, out, settings)
    return _Maps.apply(x, filters, out, weights, settings, fits and small.GRADIENTS)


def _forks(x: Tensor, weight: Tensor) -> bool:
    needed = BESIDE and torch.is_grad_enabled() and weight.requires_grad
    return needed and x.is_cuda and torch.cuda.is_current_stream_capturing()


def _filters(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.flatten(0, 1).to(x.dtype), None if bias is None else bias.view(-1).to(x.dtype)


def _gradients(
    grad: Tensor, x: Tensor, filters: Tensor, bias_sizes: list[int] | None, settings: _Settings, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return those of the gradients of x, filters and bias that are wanted, as autograd computes them."""
    stride, padding, dilation, groups = settings
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, filters, bias_sizes, stride, padding, dilation, False, (0, 0), groups, wanted
    )
    return found


class _Weights(torch.autograd.Function):
    """Stands for weight and bias in the result, of whose gradient its backward pass makes theirs."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, filters: Tensor, out: Tensor, settings: _Settings
    ) -> Tensor:
        ctx.save_for_backward(x, filters)
        ctx.settings = settings
        ctx.forms = [None if each is None else (each.shape, each.dtype) for each in (weight, bias)]
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters = ctx.saved_tensors
        bias_sizes = None if ctx.forms[1] is None else [ctx.forms[1][0].numel()]
        _, *grads = _gradients(grad, x, filters, bias_sizes, ctx.settings, [False, *ctx.needs_input_grad[:2]])
        for tensor in (grad, x, filters):
            if tensor.is_cuda:  # the main stream may free it before this stream has read it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        made = (None if g is None else g.view(form[0]).to(form[1]) for g, form in zip(grads, ctx.forms, strict=True))
        return *made, None, None, None, None


class _Maps(torch.autograd.Function):
    """The result, as a function of x, and of `_Weights`, which gets its gradient as it is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Tensor, out: Tensor, weights: Tensor, settings: _Settings, ours: bool
    ) -> Tensor:
        ctx.save_for_backward(x, filters)
        ctx.settings, ctx.ours = settings, ours
        return out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, filters = ctx.saved_tensors
        # Launched before the side stream is told to wait, so that it begins first.
        x_grad = None
        if ctx.needs_input_grad[0] and ctx.ours:
            x_grad = small.small_convolution_input_grad(grad.contiguous(memory_format=torch.channels_last), filters)
        elif ctx.needs_input_grad[0]:
            x_grad, _, _ = _gradients(grad, x, filters, None, ctx.settings, [True, False, False])
        return x_grad, None, None, grad, None, None
