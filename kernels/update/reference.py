"""The update rules in plain PyTorch: the specification that the kernels are tested against.

With decay λ and coupling c ∈ [0, 1], `c·λ·w` is added to the gradient before the update rule, so that it passes through
momentum, sign and adaptive scaling, and the weights are multiplied by `1 − η(1 − c)λ` directly. c = 1 is L2
regularisation (SGD, Adam), c = 0 decoupled decay (SGDW, AdamW; Loshchilov & Hutter, arXiv 1711.05101).

float16 and bfloat16 parameters are updated in float32, with float32 state, and rounded once. Scalars are computed in
float64 and rounded once, and every product and sum of tensors is rounded separately (no fused multiply-add), so the
kernels can be tested to the last bit. On a device without float64 (MPS) scalars are computed on the CPU, and Adam's
root in float32, whose last bit may differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

Hyper = float | Tensor


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of an update: each number a float, a 0-d tensor, or `[R]` for R stacked runs `[R, …]`.

    beta1 is SGD's and Signum's momentum β, and the first of Adam's and Lion's betas; beta2 is SGD's dampening τ, and
    the second of the betas.
    """

    lr: Hyper
    weight_decay: Hyper = 0.0
    coupling: Hyper = 1.0
    beta1: Hyper = 0.0
    beta2: Hyper = 0.0
    eps: Hyper = 0.0
    nesterov: bool = False
    maximize: bool = False

    def of_run(self, run: int) -> "Settings":
        """The settings of one of R stacked runs."""
        vectors = [f.name for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor) and v.dim()]
        changes: dict[str, Any] = {name: getattr(self, name)[run] for name in vectors}
        return replace(self, **changes)


@dataclass(frozen=True)
class Slot:
    """A parameter's state: V or m, v, and the 0-d count of steps; None where a rule keeps none."""

    first: Tensor | None = None
    second: Tensor | None = None
    step: Tensor | None = None
    fresh: bool = False  # no step taken yet; SGD's dampening does not apply to the first step


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's state and update: its own, but float32 for half precision."""
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.ones(1, dtype=torch.float64, device=device).sqrt()
    except (TypeError, RuntimeError):
        return False
    return True


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU if its device has none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


def _over(value: Hyper, param: Tensor) -> Hyper:
    """Return a scalar unchanged; round a per-run vector `[R]` and shape it to broadcast over a parameter `[R, …]`."""
    if not isinstance(value, Tensor):
        return value
    if not value.dim():
        return value.item()
    return value.to(compute_dtype(param)).to(param.device).view(-1, *[1] * (param.dim() - 1))


def _double(value: Hyper) -> Hyper:
    return in_float64(value) if isinstance(value, Tensor) else value


def _root(x: Tensor) -> Tensor:
    # Through float64, so that the float32 root is correctly rounded: some CPU libraries' float32 root is not.
    return x.double().sqrt().to(x.dtype) if has_float64(x.device) else x.sqrt()


def _sgd(g: Tensor, slot: Slot, h: Settings) -> tuple[Tensor, Hyper]:
    """V ← βV + (1 − τ)g, the direction is V; with Nesterov g + βV. Without V, g. (arXiv 2602.16642; torch.optim.SGD)"""
    if slot.first is None:
        return g, h.lr
    damped = g if slot.fresh else g * _over(1 - _double(h.beta2), g)
    slot.first.copy_(slot.first * _over(h.beta1, g) + damped)
    return g + slot.first * _over(h.beta1, g) if h.nesterov else slot.first, h.lr


def _sign(direction: Tensor) -> Tensor:
    # torch.sign(NaN) is 0: a diverged run would stop moving and look healthy.
    return torch.where(direction.isnan(), direction, direction.sign())


def _signum(g: Tensor, slot: Slot, h: Settings) -> tuple[Tensor, Hyper]:
    """V ← βV + g, the direction is sign(V), sign(0) = 0, sign(NaN) = NaN. (Bernstein et al., arXiv 1802.04434)"""
    if slot.first is None:
        return _sign(g), h.lr
    slot.first.copy_(slot.first * _over(h.beta1, g) + g)
    return _sign(slot.first), h.lr


def _adam(g: Tensor, slot: Slot, h: Settings) -> tuple[Tensor, Hyper]:
    """m ← m + (1 − β₁)(g − m), v ← β₂v + (1 − β₂)g², the direction is m/(√(v/(1 − β₂ᵗ)) + ε), its rate η/(1 − β₁ᵗ).

    Adam (Kingma & Ba, arXiv 1412.6980) at c = 1, AdamW (arXiv 1711.05101) at c = 0.
    """
    assert slot.first is not None
    assert slot.second is not None
    assert slot.step is not None
    slot.step.add_(1)
    t = slot.step.item()
    beta1, beta2 = _double(h.beta1), _double(h.beta2)  # 1 − 0.999¹ keeps only four digits in float32
    slot.first.add_((g - slot.first) * _over(1 - beta1, g))
    slot.second.copy_(slot.second * _over(beta2, g) + g * g * _over(1 - beta2, g))
    denominator = _root(slot.second) * _over((1 - beta2**t) ** -0.5, g) + _over(h.eps, g)
    return slot.first / denominator, _double(h.lr) / (1 - beta1**t)


def _lion(g: Tensor, slot: Slot, h: Settings) -> tuple[Tensor, Hyper]:
    """The direction is sign(β₁m + (1 − β₁)g); then m ← β₂m + (1 − β₂)g. (Chen et al., arXiv 2302.06675, Alg. 2)"""
    assert slot.first is not None
    beta1, beta2 = _double(h.beta1), _double(h.beta2)
    direction = _sign(slot.first * _over(beta1, g) + g * _over(1 - beta1, g))
    slot.first.copy_(slot.first * _over(beta2, g) + g * _over(1 - beta2, g))
    return direction, h.lr


Direction = Callable[[Tensor, Slot, Settings], tuple[Tensor, Hyper]]


@dataclass(frozen=True)
class UpdateRule:
    """An update rule, and what the kernels' launcher knows of it.

    Attributes:
        direction: direction and its rate, from the gradient plus the coupled decay; changes the slot's states in place.
        kernel: the rule's number in the kernels, below 128; None: only the reference computes it.
        needs_first, needs_second: whether it cannot run without `Slot.first`; without `Slot.second` and `Slot.step`.
    """

    direction: Direction
    kernel: int | None = None
    needs_first: bool = False
    needs_second: bool = False

    def __call__(self, grad: Tensor, slot: Slot, settings: Settings) -> tuple[Tensor, Hyper]:
        return self.direction(grad, slot, settings)


#: Every rule by name. To add one that the reference computes, add a function: `RULES["mine"] = direction`.
RULES: dict[str, Direction] = {
    "sgd": UpdateRule(_sgd, kernel=0),
    "signum": UpdateRule(_signum, kernel=1),
    "adam": UpdateRule(_adam, kernel=2, needs_first=True, needs_second=True),
    "lion": UpdateRule(_lion, kernel=3, needs_first=True),
}


def declared(rule: str) -> UpdateRule:
    """The declaration of a rule of `RULES`; for a plain function, one without a kernel."""
    direction = RULES[rule]
    return direction if isinstance(direction, UpdateRule) else UpdateRule(direction)


def _one(rule: str, param: Tensor, grad: Tensor, slot: Slot, h: Settings, scale: Tensor | None) -> None:
    dtype = compute_dtype(param)
    w, g = param.to(dtype), grad.to(dtype)
    if scale is not None:
        g = g / scale.to(dtype)
    if h.maximize:
        g = -g
    coupled = _double(h.coupling) * _double(h.weight_decay)
    if isinstance(coupled, Tensor) or coupled != 0:
        g = g + w * _over(coupled, w)
    direction, rate = RULES[rule](g, slot, h)
    change = direction * _over(rate, w)
    decoupled = _double(h.lr) * (1 - _double(h.coupling)) * _double(h.weight_decay)
    if isinstance(decoupled, Tensor) or decoupled != 0:
        # Not param *= 1 − rate: rounding that factor to float32 is off by up to 3e-8, always in the same direction,
        # which adds up to 1e-3 over a long run.
        change = change + w * _over(decoupled, w)
    param.copy_(w - change)


@torch.no_grad()
def update_reference(
    rule: str | Sequence[str], params: Sequence[Tensor], grads: Sequence[Tensor], slots: Sequence[Slot],
    settings: Settings, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """`W ← (1 − η(1 − c)λ)W − η·direction(∇L + cλW)`, in place, for lists of equal length; `RULES` has the directions.

    Args:
        rule: a name of `RULES`, or one for each of R stacked runs.
        params: W, floating point, any layout; `[R, …]` for stacked runs.
        grads: ∇L, of the same shapes.
        slots: state in `compute_dtype`, zero before the first step; changed in place.
        grad_scale: 0-d or `[1]`; the gradients are divided by it first (`torch.amp.GradScaler`).
        found_inf: 0-d or `[1]`; if it is not 0, nothing changes and no step is counted.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    for param, grad, slot in zip(params, grads, slots, strict=True):
        if isinstance(rule, str):
            _one(rule, param, grad, slot, settings, grad_scale)
            continue
        steps = [None if slot.step is None else slot.step.clone() for _ in rule]
        for r, name in enumerate(rule):
            first, second = (None if s is None else s[r] for s in (slot.first, slot.second))
            run = Slot(first, second, steps[r], slot.fresh)
            _one(name, param[r], grad[r], run, settings.of_run(r), grad_scale)
        if slot.step is not None:
            slot.step.add_(1)
