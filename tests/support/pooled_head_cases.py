"""Inputs of the maximum over space with a linear head, and what an implementation makes of them, for its tests."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: (R, B, C, H, W, K).
Shape = tuple[int, int, int, int, int, int]
#: A function with the arguments of `pooled_head_reference`.
Implementation = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Inputs(NamedTuple):
    """The arguments of `pooled_head`, and gradients of its results, of which that of the features may be missing."""

    maps: Tensor
    weight: Tensor
    bias: Tensor | None
    logits_grad: Tensor
    features_grad: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]


class Outcome(NamedTuple):
    """The results and the gradients of maps, weight and bias."""

    features: Tensor
    logits: Tensor
    maps: Tensor
    weight: Tensor
    bias: Tensor | None


def channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, *, relu: bool = True, device: torch.device | None = None
) -> Inputs:
    """Normal random numbers; maps of halves after ReLU, as the networks have, so that many pixels share a maximum."""
    runs, batch, channels, height, width, classes = shape
    maps = torch.randn(batch, runs * channels, height, width, device=device)
    maps = (2 * maps).round().relu() / 2 if relu else maps
    weight, bias = (torch.randn(runs, classes, *rest, device=device) for rest in ((channels,), ()))
    return Inputs(channels_last(maps.to(dtype)), weight, bias, torch.randn(runs, batch, classes, device=device))


def outcome(implementation: Implementation, given: Inputs) -> Outcome:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given[:3]]
    features, logits = implementation(*leaves)  # type: ignore[arg-type]
    of = [logits] if given.features_grad is None else [logits, features]
    by = [given.logits_grad, given.features_grad][: len(of)]
    grads = list(torch.autograd.grad(of, [leaf for leaf in leaves if leaf is not None], by))
    return Outcome(features.detach(), logits.detach(), *grads, *[None] * (3 - len(grads)))


def check(ours: Outcome, exact: Outcome, dtype: torch.dtype) -> None:
    """Compare with the reference's outcome in float64: the maps' gradient up to a rounding to their dtype.

    Sums of float32 products are as exact as float32 is of the largest of them; Triton's interpreter truncates half
    precision where a GPU rounds.
    """
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert torch.equal(ours.features.double(), exact.features)
    for name, rtol in (("logits", 1e-6), ("weight", 1e-6), ("bias", 1e-6), ("maps", unit)):
        our, their = getattr(ours, name), getattr(exact, name)
        if their is None:
            assert our is None
        else:
            atol = 2e-6 * their.abs().max().item() if their.numel() else 0.0
            torch.testing.assert_close(our.double(), their, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
