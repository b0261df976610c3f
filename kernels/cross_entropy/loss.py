"""The mean cross-entropy for autograd, with the gradient of `cross_entropy_grad`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ncollapse.kernels.cross_entropy.op import cross_entropy_grad


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the mean cross-entropy, whose gradient by the logits sums to zero over the classes of every sample.

    As `torch.nn.functional.cross_entropy`, whose gradient has p − 1 at the label: for p near 1 that is only rounding
    error, which the row sum of the classifier then follows. A sign makes whole steps of it. Here the label's entry is
    minus the sum of the others: so the row sum is exactly zero for K = 2, and for more classes within the rounding of
    that sum. So neither SGD nor sign descent moves Wᵀ1 by rounding errors of p − 1; near zero the loss has
    all its digits.

    Differentiable once.

    Args:
        logits: `[*, B, K]` in any floating dtype, where `*` is nothing or R stacked runs. Half precision is computed in
            float32, and the gradient rounded to it.
        labels: `[B]` for all runs or `[*, B]`, integers in [0, K).
        label_smoothing: ε in [0, 1]; the targets are (1 − ε)·one-hot(labels) + ε/K.

    Returns:
        `[*]`, in float64 for float64 logits, else in float32.

    Raises:
        ValueError: wrong shapes, ε out of range, or (checked on a CPU) labels out of range.
        TypeError: labels that are not integers, logits that are not floating.

    Example:
        A network with two classes, whose head sign descent trains with decoupled decay (λ = 0.002, η = 0.05), so that
        its NC0 only falls (arXiv 2602.16642). With this loss it stays below the bound of `ncollapse.ufm.predict`; with
        torch's it reaches 3·10⁶, since the sign of the rounding error of p − 1 is a step of full length
        (`python -m bench.row_sum`).

        >>> loss = cross_entropy(model(x), y)
        >>> loss.backward()
    """
    runs = logits.shape[:-2]
    if logits.dim() not in (2, 3) or labels.shape not in (logits.shape[-2:-1], logits.shape[:-1]):
        raise ValueError(
            "cross_entropy takes logits [B, K] or [R, B, K] and labels [B] or [R, B]; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.is_floating_point() or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"cross_entropy takes floating logits and integer labels; got {logits.dtype} and {labels.dtype}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing lies in [0, 1]; got {label_smoothing:g}")
    k = logits.shape[-1]
    checked = labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling()
    if checked and not 0 <= int(labels.min()) <= int(labels.max()) < k:
        raise ValueError(f"cross_entropy: labels lie in [0, {k}); got {int(labels.min())} to {int(labels.max())}")
    stacked = logits if runs else logits.unsqueeze(0)
    losses: Tensor = _CrossEntropy.apply(stacked, labels.long(), label_smoothing)
    return losses if runs else losses[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.label_smoothing = label_smoothing
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        label = labels.expand(x.shape[:2]).unsqueeze(-1)
        of_label = x.gather(-1, label).squeeze(-1)
        others = x.scatter(-1, label, -torch.inf).logsumexp(-1)
        losses = torch.nn.functional.softplus(others - of_label)  # log(1 + e^…): 1 − p has no digit for p near 1
        return (losses + label_smoothing * (of_label - x.mean(-1))).mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        by_logits = cross_entropy_grad(x, labels, ctx.label_smoothing) * grad.view(-1, 1, 1)
        return by_logits.to(logits.dtype), None, None
