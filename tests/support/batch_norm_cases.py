"""Maps and what batch norm with ReLU makes of them: what the tests of its kernels share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import interpreter
from ncollapse.kernels.batch_norm.op import fused
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

MOMENTUM, EPS = 0.1, 1e-5
KINDS = ("plain", "pool", "residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: How far z may be off in a dtype, beside 1 + |z|: half precision is cut off by Triton's interpreter, not rounded.
MARGIN = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 0.0}

#: `fused` or the reference.
How = Callable[..., Tensor]


@dataclass
class Case:
    """The tensor arguments of `batch_norm_relu`, and what it is to do with them."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    residual: Tensor | None = None
    pool: bool = False
    train: bool = True

    def copy(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Case":
        """The same of its own; all of it in `dtype`, if there is one."""
        tensors = {
            name: t.detach().to(device, dtype, copy=True) for name, t in vars(self).items() if torch.is_tensor(t)
        }
        return replace(self, **tensors)


@dataclass
class Result:
    """The output, the gradients (of those that want one) and the running statistics."""

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
    """Normal random maps of this mean and spread, about a tenth of the channels with a negative weight."""

    def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    channels = shape[1]
    x = channels_last((mean + std * random(*shape, dtype=torch.float64)).to(dtype))
    weight, bias = 1 + 0.8 * random(channels), random(channels)
    running = random(channels), 0.5 + random(channels).abs()
    residual = channels_last(random(*shape).to(dtype)) if kind == "residual" else None
    return Case(x, weight, bias, *running, residual, kind == "pool")


def kernels(*arguments: object) -> Tensor:
    """`fused` on the GPU, or in Triton's interpreter."""
    with interpreter.quiet():
        return fused(*arguments)  # type: ignore[arg-type]


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forward(how: How, of: Case) -> Tensor:
    return how(
        of.x, of.weight, of.bias, of.running_mean, of.running_var, of.train, MOMENTUM, EPS, of.pool, of.residual
    )  # fmt: skip


def run(how: How, given: Case, grad: Tensor) -> Result:
    """Forward and backward on a copy; what was given stays as it is."""
    of = given.copy()
    leaves = [of.x, of.weight, of.bias, *([] if of.residual is None else [of.residual])]
    for leaf in leaves:
        leaf.requires_grad_()
    y = forward(how, of)
    with interpreter.quiet():
        grads = torch.autograd.grad(y, leaves, grad.to(y))
    residual = None if of.residual is None else grads[3]
    return Result(y.detach(), *grads[:3], residual, of.running_mean, of.running_var)


def normalised(of: Case) -> Tensor:
    """z in float64: what ReLU and pooling choose by."""
    of = of.copy(torch.float64)
    return F.batch_norm(of.x, of.running_mean, of.running_var, of.weight, of.bias, of.train, MOMENTUM, EPS)


def gradient(of: Case, margin: float | None = None) -> Tensor:
    """A random gradient of the output, zero where a rounding of z decides what ReLU or pooling chooses.

    Values that are exactly equal are no such case: the first is to win.
    """
    margin = MARGIN[of.x.dtype] if margin is None else margin
    z = normalised(of)
    best, uncertain = z, torch.zeros_like(z, dtype=torch.bool)
    if of.pool:
        best = F.max_pool2d(z, 2)
        height, width = best.shape[2:]
        four = [z[..., i : 2 * height : 2, j : 2 * width : 2] for i in (0, 1) for j in (0, 1)]
        uncertain = torch.stack([(best - v <= margin * (1 + best.abs())) & (v != best) for v in four]).any(0)
    uncertain |= best.abs() <= margin
    grad = torch.randn(best.shape, device=best.device).masked_fill(uncertain, 0.0).to(of.x.dtype)
    assert grad.count_nonzero() >= 0.4 * grad.numel()
    return channels_last(grad)


def check(ours: Result, given: Case, grad: Tensor, channels: Tensor | None = None) -> Result:
    """Raise AssertionError unless all is as the reference in float64 has it, but for roundings; returns what it has.

    These are float32's, and for maps those of the dtype, cut off as in `MARGIN`.

    Args:
        channels: those that are compared, `[C]` bool; all.
    """
    exact = given.copy(torch.float64)
    theirs = run(batch_norm_relu_reference, exact, grad.double())
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[given.x.dtype]
    pixels = given.x.numel() // given.x.shape[1]
    variance = exact.x.var((0, 2, 3), unbiased=False)
    # A gradient of x is a difference of such terms.
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
            # A residual is added to what has been rounded before.
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
