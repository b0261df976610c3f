"""Streaming statistics of a layer's features by class: all that NC1–NC4 need."""

import torch
from torch import Tensor

from nc.kernels.class_stats import class_stats_reference


class ClassStats:
    """Counts, means and within-class scatter of features, gathered batch by batch in one read of the features.

    The sums are kept about a shift per class, its first sample, so that they keep their digits near collapse
    (see `nc.kernels.class_stats`). Everything read off is float64.

    Args:
        num_classes: K ≥ 2.
        dim: d, the feature dimension.
        runs: R for stacked runs with features `[R, B, d]`; None for one model with `[B, d]`. `*` below is R or nothing.
        device: where the features are.
        dtype: of the sums; float32 unless float64 features are to keep their digits.

    Attributes:
        counts: `[K]` int64, samples seen of each class.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        runs: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_classes < 2 or dim < 1:
            raise ValueError(f"ClassStats needs num_classes ≥ 2 and dim ≥ 1; got {num_classes} and {dim}")
        lead = () if runs is None else (runs,)
        self.num_classes, self.dim, self.runs = num_classes, dim, runs
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._shifts = torch.zeros(*lead, num_classes, dim, dtype=dtype, device=device)
        self._sums = torch.zeros_like(self._shifts)
        self._scatter = torch.zeros(*lead, dim, dim, dtype=dtype, device=device)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: `[*, B, d]`, any floating dtype; NaN features make the metrics of their run NaN.
            labels: `[B]` integers in [0, K), shared by stacked runs.

        Raises:
            ValueError: wrong shapes or labels out of range.
            TypeError: labels that are not integers.

        After an error the statistics are as they were before the call.
        """
        expected = (*self._shifts.shape[:-2], labels.shape[0] if labels.dim() == 1 else "B", self.dim)
        if labels.dim() != 1 or tuple(features.shape) != expected:
            raise ValueError(
                f"ClassStats.update: expected features {expected} with labels [B]; "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"ClassStats.update: labels must be integers, got {labels.dtype}")
        labels = labels.long()
        if labels.numel() and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"ClassStats.update: labels must lie in [0, {self.num_classes}); "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        class_stats_reference(features, labels, self.counts, self._shifts, self._sums, self._scatter)

    def merge(self, other: "ClassStats") -> None:
        """Add what `other` has seen, as if its batches had come here; `other` stays as it is.

        The sums are moved to the shifts kept here in float64 (Chan et al. 1979).

        Raises:
            ValueError: `other` has another shape.
        """
        if (self.num_classes, self.dim, self.runs) != (other.num_classes, other.dim, other.runs):
            raise ValueError(
                f"ClassStats.merge: cannot add (K, d, R) = {(other.num_classes, other.dim, other.runs)} "
                f"to {(self.num_classes, self.dim, self.runs)}"
            )
        new = (self.counts == 0).unsqueeze(-1)
        self._shifts.copy_(torch.where(new, other._shifts.to(self._shifts), self._shifts))
        n = other.counts.double().to(self.counts.device).unsqueeze(-1)
        sums = other._sums.to(self._shifts.device, torch.float64)
        moved = torch.where(n > 0, other._shifts.to(sums) - self._shifts.double(), 0.0)
        cross = sums.mT @ moved
        scatter = other._scatter.to(sums) + cross + cross.mT + (n * moved).mT @ moved
        self._scatter.copy_(self._scatter.double() + scatter)
        self._sums.copy_(self._sums.double() + sums + n * moved)
        self.counts += other.counts.to(self.counts.device)

    @property
    def present(self) -> Tensor:
        """`[K]` bool: classes of which at least one sample was seen."""
        return self.counts > 0

    @property
    def means(self) -> Tensor:
        """Class means μ_k, `[*, K, d]` float64; NaN for a class that was not seen."""
        return self._shifts.double() + self._sums.double() / self.counts.unsqueeze(-1)

    @property
    def global_mean(self) -> Tensor:
        """μ_G, `[*, d]` float64: the mean of the class means, each class with the same weight (Papyan et al. 2020)."""
        return self.means[..., self.present, :].mean(-2)

    def centred_means(self) -> Tensor:
        """M, rows μ_k − μ_G of the classes seen, `[*, K', d]` float64."""
        # Centred before the shifts are added to anything large: both steps are differences of float64 values.
        means = self.means[..., self.present, :]
        return means - means.mean(-2, keepdim=True)

    def within_cov(self) -> Tensor:
        """Σ_W = (1/N) Σ (h − μ_y)(h − μ_y)ᵀ over all samples, `[*, d, d]` float64 (Papyan et al. 2020)."""
        counts = self.counts.clamp(min=1).double().unsqueeze(-1)
        sums = self._sums.double()
        return (self._scatter.double() - sums.mT @ (sums / counts)) / self.counts.sum()

    def between_cov(self) -> Tensor:
        """Σ_B = (1/K) Σ_k (μ_k − μ_G)(μ_k − μ_G)ᵀ over the classes seen, `[*, d, d]` float64 (Papyan et al. 2020)."""
        means = self.centred_means()
        return means.mT @ means / means.shape[-2]
