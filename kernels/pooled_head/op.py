"""`pooled_head`, and the torch operators that it calls."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ncollapse.kernels import operators

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Whether the kernels are used at all: they are not timed on a GPU yet (`python -m bench.step_times` does so).
ENABLED = True
#: With more, matrix products by libraries are faster than a program for each sample that reads all weights, or one for
#: each few channels that reads all samples. The most channels are `MOST_CHANNELS` of `gpu`, which needs Triton.
_MOST_CLASSES, _MOST_SAMPLES, _MOST_CHANNELS = 128, 1024, 2048


def pooled_head(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute each channel's maximum over space, and a linear layer of these features, for R runs.

    `pooled_head_reference` is the specification. The kernels take what `why_no_kernel` has no objection to.

    Args:
        maps: `[B, R·C, H, W]`, channels-last, in float32, bfloat16 or float16.
        weight: `[R, K, C]` float32.
        bias: `[R, K]` float32, or None.

    Returns:
        Features `[R, B, C]` in the maps' dtype and logits `[R, B, K]` in float32: products and sums are float32, never
        rounded to tf32. A maximum over NaN is NaN. Differentiable once by all three; the gradient of a maximum is
        shared evenly by the pixels that have it.
    """
    features, logits, _ = _PooledHead.apply(maps, weight, bias)
    return features, logits


def why_no_kernel(maps: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """The reason why the kernels do not take these tensors; None if they do."""
    if not ENABLED:
        return "the kernels are turned off"
    if maps.device.type == "cpu":
        return "there is no kernel for cpu tensors"
    if reason := operators.why_no_kernel(maps.device):
        return reason
    (runs, classes, channels), of_head = weight.shape, [weight] if bias is None else [weight, bias]
    if maps.dim() != 4 or maps.shape[1] != runs * channels:
        return f"maps {tuple(maps.shape)} are not those of weights {tuple(weight.shape)}"
    if maps.dtype not in _DTYPES:
        return f"there is no kernel for {maps.dtype} maps"
    if not maps.numel() or not maps.is_contiguous(memory_format=torch.channels_last):
        return "the maps are empty or not channels-last"
    if any(t.dtype != torch.float32 or not t.is_contiguous() or t.device != maps.device for t in of_head):
        return "weight and bias are not dense float32 beside the maps"
    if classes > _MOST_CLASSES or channels > _MOST_CHANNELS or len(maps) > _MOST_SAMPLES:
        return f"there are more than {_MOST_CLASSES} classes, {_MOST_CHANNELS} channels or {_MOST_SAMPLES} samples"
    return None


class _PooledHead(torch.autograd.Function):
    """`forward_op` with the gradient of its first two results."""

    @staticmethod
    def forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return forward_op(maps, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, ...]) -> None:
        maps, weight, bias = inputs
        features, _, ties = output
        ctx.mark_non_differentiable(ties)
        ctx.set_materialize_grads(False)  # which would fill zeros for features that nothing else uses
        ctx.save_for_backward(maps, weight, features, ties)
        ctx.has_bias = bias is not None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, features_grad: Tensor | None, logits_grad: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        maps, weight, features, ties = ctx.saved_tensors
        if logits_grad is None:
            logits_grad = weight.new_zeros(*features.shape[:2], weight.shape[1])
        grads = backward_op(logits_grad, features_grad, maps, weight, features, ties)
        return grads[0], grads[1], grads[2] if ctx.has_bias else None


def _forward(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from ncollapse.kernels.pooled_head import gpu

    results = _results(maps, weight, bias)
    gpu.launch_forward(maps, weight, bias, results[0], results[2], results[1])
    return results


def _backward(
    logits_grad: Tensor, features_grad: Tensor | None, maps: Tensor, weight: Tensor, features: Tensor, ties: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from ncollapse.kernels.pooled_head import gpu

    features_grad = None if features_grad is None else features_grad.contiguous()
    grads = _gradients(logits_grad, features_grad, maps, weight, features, ties)
    gpu.launch_backward(logits_grad.contiguous(), features_grad, maps, weight, features, ties, *grads)
    return grads


# The fakes: results of the right shape, dtype and layout, with any content.
def _results(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    runs, classes, channels = weight.shape
    features = maps.new_empty(runs, maps.shape[0], channels)
    return features, weight.new_empty(runs, maps.shape[0], classes), torch.empty_like(features, dtype=torch.float32)


def _gradients(
    logits_grad: Tensor, features_grad: Tensor | None, maps: Tensor, weight: Tensor, features: Tensor, ties: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(maps), torch.empty_like(weight), weight.new_empty(weight.shape[:2])


# The kernels need channels-last maps: the compiler must pass tensors on with their strides unchanged.
_EXACT = (torch.Tag.needs_exact_strides,)
forward_op = operators.register_operator(
    "pooled_head(Tensor maps, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)", _forward, _results, _EXACT
)
backward_op = operators.register_operator(
    "pooled_head_backward(Tensor logits_grad, Tensor? features_grad, Tensor maps, Tensor weight, Tensor features, "
    "Tensor ties) -> (Tensor, Tensor, Tensor)", _backward, _gradients, _EXACT,
)  # fmt: skip
