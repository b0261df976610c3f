"""Optimizer updates with coupled and decoupled weight decay on one dial: plain-PyTorch references.

With decay λ and coupling c ∈ [0, 1], `c·λ·w` is added to the gradient before the update rule, so that it passes through
momentum, sign and adaptive scaling, and the weights are multiplied by `1 − η(1 − c)λ` directly. c = 1 is L2
regularisation (SGD, Adam), c = 0 decoupled decay (SGDW, AdamW; Loshchilov & Hutter, arXiv 1711.05101). The momentum
convention is the heavy ball of arXiv 2602.16642: V ← βV + ∇L + cλW without dampening.

Every hyperparameter may be a float, a 0-d tensor, or a tensor `[R]` when the parameters are R stacked runs `[R, …]`:
run r then trains with the r-th value. All functions work in place on lists of equal length and return None.

float16 and bfloat16 parameters are updated in float32, with float32 state, and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Hyper = float | Tensor


def _over(value: Hyper, param: Tensor) -> Hyper:
    """A per-run vector `[R]` shaped to broadcast over a stacked parameter `[R, …]`; anything else as it is."""
    if isinstance(value, Tensor) and value.dim() == 1:
        return value.to(compute_dtype(param)).view(-1, *[1] * (param.dim() - 1))
    return value


def _is_zero(value: Hyper) -> bool:
    return not isinstance(value, Tensor) and value == 0


def compute_dtype(param: Tensor) -> torch.dtype:
    """In which a parameter's state is kept and its update computed: its own dtype, but float32 for half precision."""
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def _coupled(param: Tensor, grad: Tensor, weight_decay: Hyper, coupling: Hyper, maximize: bool) -> Tensor:
    """The gradient with the coupled share of the decay added, in the dtype of the computation."""
    dtype = compute_dtype(param)
    grad, param = grad.to(dtype), param.to(dtype)
    grad = -grad if maximize else grad
    rate = coupling * weight_decay
    return grad if _is_zero(rate) else grad + param * _over(rate, param)


def _apply(param: Tensor, update: Tensor, lr: Hyper, weight_decay: Hyper, coupling: Hyper) -> None:
    """`W ← W − (update + η(1 − c)λW)`."""
    rate = lr * (1 - coupling) * weight_decay
    # Not param *= 1 − rate: that factor, rounded to float32, is off by up to 3e-8, always to the same side, which adds
    # up to 1e-3 over the steps of a long run.
    value = param.to(update.dtype)
    param.copy_(value - (update if _is_zero(rate) else update + value * _over(rate, value)))


@torch.no_grad()
def sgd_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    lr: Hyper,
    momentum: Hyper = 0.0,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    coupling: Hyper = 1.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: Sequence[bool] | None = None,
) -> None:
    """`V ← βV + (1 − τ)(∇L + cλW)`, then `W ← (1 − η(1 − c)λ)W − ηV`; with Nesterov `∇L + cλW + βV` in place of V.

    Args:
        momentum_buffers: V, zero before the first step; None where there is no momentum.
        dampening: τ. As in `torch.optim.SGD` it does not apply to a parameter's first step (`first`).
    """
    for i, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        grad = _coupled(param, grad, weight_decay, coupling, maximize)
        if buffer is None:
            update = grad
        else:
            damped = grad if first is not None and first[i] else grad * _over(1 - dampening, param)
            buffer.mul_(_over(momentum, param)).add_(damped)
            update = grad + buffer * _over(momentum, param) if nesterov else buffer
        _apply(param, update * _over(lr, param), lr, weight_decay, coupling)


@torch.no_grad()
def signum_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    lr: Hyper,
    momentum: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    coupling: Hyper = 1.0,
    maximize: bool = False,
) -> None:
    """`V ← βV + ∇L + cλW`, then `W ← (1 − η(1 − c)λ)W − η·sign(V)`, sign(0) = 0 (Bernstein et al., arXiv 1802.04434).

    The sign of NaN is NaN.

    Args:
        momentum_buffers: V, zero before the first step; None where there is no momentum (SignGD).
    """
    for param, grad, buffer in zip(params, grads, momentum_buffers, strict=True):
        grad = _coupled(param, grad, weight_decay, coupling, maximize)
        direction = grad if buffer is None else buffer.mul_(_over(momentum, param)).add_(grad)
        # torch.sign(NaN) is 0, which would freeze a run that has diverged and let it pass for a healthy one.
        sign = torch.where(direction.isnan(), direction, direction.sign())
        _apply(param, sign * _over(lr, param), lr, weight_decay, coupling)


def _bias_correction(beta: Hyper, step: float, param: Tensor) -> Hyper:
    # In float64: 1 − 0.999¹ keeps only four digits in float32.
    if isinstance(beta, Tensor):
        return _over(1 - beta.double() ** step, param)
    return 1 - beta**step


@torch.no_grad()
def adam_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Hyper,
    beta1: Hyper = 0.9,
    beta2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    coupling: Hyper = 1.0,
    maximize: bool = False,
) -> None:
    """`W ← (1 − η(1 − c)λ)W − η·m̂/(√v̂ + ε)` with g = ∇L + cλW, m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g².

    Adam (Kingma & Ba, arXiv 1412.6980) at c = 1, AdamW (arXiv 1711.05101) at c = 0; bias correction as in torch.optim.

    Args:
        exp_avgs: m, zero before the first step.
        exp_avg_sqs: v, zero before the first step.
        steps: 0-d tensors on the CPU, the number of steps taken; increased here.
    """
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        grad = _coupled(param, grad, weight_decay, coupling, maximize)
        step += 1
        t = step.item()
        exp_avg.lerp_(grad, _over(1 - beta1, param))
        exp_avg_sq.mul_(_over(beta2, param)).add_(grad * grad * _over(1 - beta2, param))
        scale = _over(lr, param) / _bias_correction(beta1, t, param)
        denominator = (exp_avg_sq / _bias_correction(beta2, t, param)).sqrt() + _over(eps, param)
        _apply(param, exp_avg / denominator * scale, lr, weight_decay, coupling)
