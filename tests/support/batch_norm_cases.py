"""Inputs of batch norm with ReLU, and the comparison of a result with the reference, for the tests of its kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import interpreter
from ncollapse.kernels.batch_norm import batch_norm_relu, op
from ncollapse.kernels.batch_norm.op import fused
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

MOMENTUM, EPS = 0.1, 1e-5
KINDS = ("plain", "pool", "residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Error bound of z, relative to 1 + |z|: Triton's interpreter truncates half precision where a GPU rounds.
MARGIN = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 0.0}

#: The ways in which the kernels sum: all rows in one program (never with pooling), or parts that the last program to
#: arrive merges, or a second kernel. By default the size of the maps decides.
WAYS = ("small", "last program", "second kernel")

#: A function with the arguments of `batch_norm_relu_reference`.
Implementation = Callable[..., Tensor]


@dataclass
class Case:
    """The arguments of `batch_norm_relu`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None = None
    pool: bool = False
    train: bool = True

    def copy(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Case":
        """A deep copy; with `dtype`, all tensors in it."""
        tensors = {
            name: t.detach().to(device, dtype, copy=True) for name, t in vars(self).items() if torch.is_tensor(t)
        }
        return replace(self, **tensors)


@dataclass
class Result:
    """The output y, the gradients of x, weight, bias and residual, and the running statistics."""

    y: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    kind: str = "plain",
    *,
    mean: float = 0.5,
    std: float = 2.0,
    device: torch.device | None = None,
) -> Case:
    """Normal random maps with this mean and deviation; about a tenth of the channels have a negative weight."""

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    channels = shape[1]
    x = channels_last((mean + std * random(*shape, dtype=torch.float64)).to(dtype))
    weight, bias = 1 + 0.8 * random(channels), random(channels)
    running = random(channels), 0.5 + random(channels).abs()
    residual = channels_last(random(*shape).to(dtype)) if kind == "residual" else None
    return Case(x, weight, bias, *running, residual, kind == "pool")


def public(*arguments: Any) -> Tensor:
    """`batch_norm_relu` with the arguments of the reference."""
    x, weight, bias, mean, var, train, momentum, eps, pool, residual = arguments
    return batch_norm_relu(
        x, weight, bias, mean, var, train=train, momentum=momentum, eps=eps, pool=pool, residual=residual
    )


def kernels(*arguments: Any) -> Tensor:
    """The kernels: on a GPU through `batch_norm_relu`, on the CPU in Triton's interpreter."""
    if arguments[0].is_cuda:
        return public(*arguments)
    with interpreter.quiet():
        return fused(*arguments)


def choose(way: str, monkeypatch: pytest.MonkeyPatch, *, programs: int = 4) -> None:
    """Make the kernels sum in this way, whatever the maps' size; in Triton's interpreter with so many programs."""
    from ncollapse.kernels.batch_norm import gpu

    monkeypatch.setattr(op, "SMALL_ROWS", 2**30 if way == "small" else 0)
    monkeypatch.setattr(op, "SMALL_CHANNELS", 1)
    monkeypatch.setattr(gpu, "MERGED_ELEMENTS", 2**62 if way == "last program" else 0)
    monkeypatch.setattr(gpu, "MERGE_SUMS", way == "last program")
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "PROGRAMS", 1)
        monkeypatch.setattr(gpu, "multiprocessors", lambda device: programs)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN, so that what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward(implementation: Implementation, given: Case) -> Tensor:
    return implementation(
        given.x, given.weight, given.bias, given.running_mean, given.running_var, given.train, MOMENTUM, EPS,
        given.pool, given.residual,
    )  # fmt: skip


def run(implementation: Implementation, given: Case, grad: Tensor) -> Result:
    """Run forward and backward on a copy; `given` does not change."""
    copy = given.copy()
    leaves = [copy.x, copy.weight, copy.bias, *([] if copy.residual is None else [copy.residual])]
    for leaf in leaves:
        leaf.requires_grad_()
    y = forward(implementation, copy)
    with interpreter.quiet():
        grads = torch.autograd.grad(y, leaves, grad.to(y))
    residual = None if copy.residual is None else grads[3]
    return Result(y.detach(), *grads[:3], residual, copy.running_mean, copy.running_var)


def normalised(given: Case) -> Tensor:
    """z in float64: the values by which ReLU and pooling select."""
    exact = given.copy(torch.float64)
    return F.batch_norm(
        exact.x, exact.running_mean, exact.running_var, exact.weight, exact.bias, exact.train, MOMENTUM, EPS
    )


def gradient(given: Case, margin: float | None = None) -> Tensor:
    """A random gradient of the output, zero where rounding of z could change what ReLU or pooling selects.

    Exactly equal values keep their gradient: the first of them must be selected.
    """
    margin = MARGIN[given.x.dtype] if margin is None else margin
    z = normalised(given)
    largest, uncertain = z, torch.zeros_like(z, dtype=torch.bool)
    if given.pool:
        largest = F.max_pool2d(z, 2)
        height, width = largest.shape[2:]
        corners = [z[..., i : 2 * height : 2, j : 2 * width : 2] for i in (0, 1) for j in (0, 1)]
        uncertain = torch.stack([(largest - v <= margin * (1 + largest.abs())) & (v != largest) for v in corners]).any(
            0
        )
    uncertain |= largest.abs() <= margin
    grad = torch.randn(largest.shape, device=largest.device).masked_fill(uncertain, 0.0).to(given.x.dtype)
    assert grad.count_nonzero() >= 0.4 * grad.numel()
    return channels_last(grad)


def check(ours: Result, given: Case, grad: Tensor, channels: Tensor | None = None) -> Result:
    """Raise AssertionError unless a result equals the float64 reference up to rounding; return the reference's.

    Vectors may have float32's rounding errors, maps those of their dtype, truncated as in `MARGIN`.

    Args:
        channels: `[C]` bool, the channels to compare; all by default.
    """
    exact = given.copy(torch.float64)
    theirs = run(batch_norm_relu_reference, exact, grad.double())
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[given.x.dtype]
    pixels = given.x.numel() // given.x.shape[1]
    variance = exact.x.var((0, 2, 3), unbiased=False)
    # The gradient of x is a difference of terms of this size.
    terms = (given.weight * (variance + EPS).rsqrt()).abs().max() * grad.abs().max()
    for name, their in vars(theirs).items():
        our = getattr(ours, name)
        if their is None:
            assert our is None, name
            continue
        if channels is not None:
            our, their = (t[:, channels] if t.dim() == 4 else t[channels] for t in (our, their))
        if their.dim() == 4:
            assert our.dtype == given.x.dtype, name
            # A residual is added to a rounded value, which rounds twice.
            twice = 2 if name == "y" and theirs.residual is not None else 1
            size = max(their.abs().max().item(), terms.item() if name == "x" else 0.0)
            close(name, our, their, rtol=twice * rounding + 1e-5, atol=(1e-5 + (twice - 1) * rounding) * size)
        else:
            assert our.dtype == torch.float32, name
            summed = name in ("weight", "bias")
            close(name, our, their, rtol=1e-5, atol=1e-5 * (pixels**0.5 if summed else 1.0))
    return theirs


def close(name: str, ours: Tensor, theirs: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(
        ours.cpu().double(), theirs.cpu().double(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def same_bits(a: Result, b: Result) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(s is t or torch.equal(s, t) for s, t in pairs)
