"""`cross_entropy_grad`, and the torch operator that it calls where there is a kernel."""

import torch
from torch import Tensor

from ncollapse.kernels import operators
from ncollapse.kernels.cross_entropy.reference import cross_entropy_grad_reference

_MOST_CLASSES = 1024  # `BLOCK` of `gpu`, which needs Triton


def cross_entropy_grad(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(softmax(logits) − targets) / B: the gradient of each run's mean cross-entropy by its logits.

    Its sum over the classes is zero up to float32's rounding, as the exact theory of the classifier's row sum assumes.
    Not differentiable.

    Args:
        logits: `[R, B, K]` in any layout; on a GPU float32 with K ≤ 1,024, for the kernel. A row with a NaN or an
            infinite logit gives NaN.
        labels: int64 in [0, K), `[B]` for all runs or `[R, B]`. They are not checked, since that would synchronise
            with the GPU at every step: check them once when loading the data. On a GPU a label out of range counts as
            none.
        label_smoothing: ε; the targets are (1 − ε)·one-hot(labels) + ε/K.

    Returns:
        `[R, B, K]`, in the logits' dtype.

    Raises:
        ValueError: shapes or devices that do not match, or labels that are not int64.

    Warns:
        UserWarning: (on a GPU, once for each reason) plain PyTorch computes it, and why.
    """
    if logits.dim() != 3 or labels.shape not in (logits.shape[:2], logits.shape[1:2]) or labels.dtype != torch.int64:
        raise ValueError(
            "cross_entropy_grad takes logits [R, B, K] and int64 labels [B] or [R, B], "
            f"not {tuple(logits.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, labels on {labels.device}")
    if logits.device.type != "cpu":
        if not (reason := why_no_kernel(logits)):
            return grad_op(logits.detach(), labels, label_smoothing)
        operators.warn_once("computes the gradient of the cross-entropy", reason)
    return cross_entropy_grad_reference(logits, labels, label_smoothing)


def why_no_kernel(logits: Tensor) -> str | None:
    """The reason why the reference takes these logits, on a device other than the CPU; None if the kernel does."""
    if reason := operators.why_no_kernel(logits.device):
        return reason
    if logits.dtype != torch.float32:
        return f"there is no kernel for {logits.dtype} logits"
    return f"there are more than {_MOST_CLASSES} classes" if logits.shape[-1] > _MOST_CLASSES else None


def _cross_entropy_grad(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    from ncollapse.kernels.cross_entropy import gpu

    out = _result(logits, labels, label_smoothing)
    gpu.launch_cross_entropy_grad(logits, labels.expand(logits.shape[:2]), label_smoothing, out)
    return out


def _result(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


grad_op = operators.register_operator(
    "cross_entropy_grad(Tensor logits, Tensor labels, float label_smoothing=0.0) -> Tensor",
    _cross_entropy_grad,
    _result,
)
