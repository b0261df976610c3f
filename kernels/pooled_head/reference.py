"""The maximum over space and the logits of a linear head: plain-PyTorch reference."""

from torch import Tensor


def pooled_head_reference(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `pooled_head`, for any floating dtype and layout, differentiable as often as wanted.

    The gradient of `amax` is shared evenly by the pixels that have the maximum.
    """
    features = maps.amax((-2, -1)).unflatten(1, (len(weight), -1)).transpose(0, 1)
    logits = features.to(weight.dtype) @ weight.mT
    return features, logits if bias is None else logits + bias.unsqueeze(1)
