"""The nearest class mean, and how often it is the class or the predicted class."""

import torch
from torch import Tensor

from ncollapse.kernels.class_stats.op import project_op


def nearest_class(features: Tensor, means: Tensor) -> Tensor:
    """Return the class with the nearest mean, `[*, N]` int64.

    Features are centred on the average of the means, so that an offset common to all features costs no accuracy.

    Args:
        features: `[*, N, d]`.
        means: `[*, K, d]` float64; a class whose row is NaN is never the nearest.
    """
    return NearestMean(means, features.dtype)(features)


class NearestMean:
    """As `nearest_class`, of the same means for many batches of one dtype."""

    def __init__(self, means: Tensor, dtype: torch.dtype) -> None:
        dtype, absent = torch.promote_types(dtype, torch.float32), means.isnan().any(-1)
        present = (~absent).sum(-1, keepdim=True).clamp(min=1).unsqueeze(-1)
        self._centre = (means.nan_to_num(0.0).sum(-2, keepdim=True) / present).to(dtype)
        axes = (means - self._centre).nan_to_num(0.0)
        self._axes = axes.to(dtype)
        self._half = (axes.square().sum(-1) / 2).to(dtype).masked_fill(absent, float("inf")).unsqueeze(-2)

    def __call__(self, features: Tensor) -> Tensor:
        """Return the class with the nearest mean, `[*, N]` int64, of features `[*, N, d]`."""
        labels = torch.zeros(features.shape[-2], dtype=torch.int64, device=features.device)
        products = project_op(features.detach(), labels, self._centre, self._axes)
        # ‖h − μ‖² is smallest where (h − c)·(μ − c) − ‖μ − c‖²/2 is largest; c is the centre.
        return (products - self._half).argmax(-1)


def agreement(features: Tensor, labels: Tensor, predicted: Tensor, means: Tensor) -> Tensor:
    """Count how often the nearest class mean is the class's own, and how often it is not the predicted class.

    The counts of batches are added. With n, a and b the three counts of a class, a/n is the accuracy of its nearest
    class mean and b/n is NC4. With the means of the training data and samples of the test data they say how collapse
    generalises (Hui, Belkin, Nakkiran, arXiv 2202.08384).

    Args:
        features, predicted: `[*, N, d]` and `[*, N]`, the argmax of the logits.
        labels: `[N]` int64 in [0, K).
        means: `[*, K, d]` float64, as in `nearest_class`.

    Returns:
        `[*, K, 3]` int64: a class's samples, those nearest to its mean, those whose nearest mean is not predicted.
    """
    return count_kinds(nearest_class(features, means), labels, predicted, means.shape[-2])


def count_kinds(nearest: Tensor, labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """As `agreement`, of the class with the nearest mean, `[*, N]`."""
    # One of four kinds for each class; on a CPU adding rows of three counts takes eight times as long.
    kinds = 4 * labels + 2 * (nearest == labels) + (nearest != predicted)
    counts = kinds.new_zeros(*kinds.shape[:-1], 4 * classes).scatter_add_(-1, kinds, torch.ones_like(kinds))
    neither, differ, own, both = counts.unflatten(-1, (classes, 4)).unbind(-1)
    return torch.stack([neither + differ + own + both, own + both, differ + both], -1)
