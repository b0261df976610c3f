"""Quantities that a step computes along with the update: `Optimizer.observe`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncollapse.kernels.update.table import Extras


@dataclass(frozen=True)
class Observed:
    """Quantities of the last step, in tensors that every step overwrites. Only reading a value synchronises.

    Attributes:
        head: the classifier's weight `[K, d]`, or `[R, K, d]`.
        row_sum: Wᵀ1 after the step, float64 `[d]` or `[R, d]`; None without a head.
        weights: for each parameter its bfloat16 copy after the step, in its layout; empty unless requested.
        stacked: whether the parameters are R stacked runs.
    """

    head: Tensor | None
    row_sum: Tensor | None
    weights: dict[Tensor, Tensor]
    stacked: bool
    _norms: Tensor | None

    @property
    def nc0(self) -> Tensor:
        """NC0 = ‖Wᵀ1‖² (arXiv 2602.16642), float64, 0-d or `[R]`; RuntimeError without a head."""
        if self.row_sum is None:
            raise RuntimeError("NC0 is not observed: call observe(head=model.fc.weight)")
        return self.row_sum.square().sum(-1)

    @property
    def grad_norm(self) -> Tensor:
        """Norm of all gradients, before decay, unscaled; float64, 0-d or `[R]`; RuntimeError unless requested."""
        return self._norm(0)

    @property
    def update_norm(self) -> Tensor:
        """Norm of the change of all parameters, with decay; float64, 0-d or `[R]`; RuntimeError unless requested."""
        return self._norm(1)

    def _norm(self, column: int) -> Tensor:
        if self._norms is None:
            raise RuntimeError("norms are not observed: call observe(norms=True)")
        norms = self._norms[:, column].sqrt()
        return norms if self.stacked else norms[0]

    def extras(self, params: Sequence[Tensor]) -> Extras:
        """The same in the kernel's form, for a step of these parameters."""
        head = next((i for i, p in enumerate(params) if p is self.head), -1)
        return Extras(
            copies=[self.weights.get(p) for p in params] if self.weights else (),
            norms=self._norms,
            head=head,
            row_sum=self.row_sum if head >= 0 else None,
        )


def observed(owner: str, params: Sequence[Tensor], runs: int, head: Tensor | None, norms: bool, bf16: bool) -> Observed:
    """Allocate what `Optimizer.observe` asks for, for `runs` stacked runs; ValueError for what is not defined."""
    row_sum = None
    if head is not None:
        if not any(p is head for p in params):
            raise ValueError(f"{owner}: the head is not among the optimizer's parameters; give model.fc.weight itself")
        if head.dim() - 2 not in ({0, 1} if runs == 1 else {1}):
            raise ValueError(f"{owner}: the head must be a weight [K, d]; got shape {tuple(head.shape)}")
        row_sum = torch.zeros(*head.shape[:-2], head.shape[-1], dtype=torch.float64, device=head.device)
    squares = None
    if norms:
        if len({p.device for p in params}) > 1:
            raise ValueError(f"{owner}: norms are taken over parameters on one device; these are on several")
        squares = torch.zeros(runs, 2, dtype=torch.float64, device=params[0].device)
    weights = {p: torch.empty_like(p, dtype=torch.bfloat16).copy_(p.detach()) for p in params} if bf16 else {}
    return Observed(head, row_sum, weights, runs > 1, squares)
