"""Quantities that are read beside the update: `Optimizer.observe`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ncollapse.kernels.update.reference import has_float64, in_float64
from ncollapse.kernels.update.table import Extras


@dataclass(frozen=True)
class Observed:
    """Quantities of the last step. Only reading a value synchronises.

    The row sum is computed from the head's weight as it is when it is asked for: before the first step, with a frozen
    head, after a step that was skipped and after other weights were loaded it is still true. The norms are a step's,
    which writes them in its pass over the parameters; they are NaN before the first and after one that was skipped.

    Attributes:
        head: the classifier's weight `[K, d]`, or `[R, K, d]`.
        weights: for each parameter its bfloat16 copy after the step, in its layout; empty unless requested.
        stacked: whether the parameters are R stacked runs.
    """

    head: Tensor | None
    weights: dict[Tensor, Tensor]
    stacked: bool
    _copied: bool
    _norms: Tensor | None

    @property
    def row_sum(self) -> Tensor | None:
        """Wᵀ1, float64 `[d]` or `[R, d]`; None without a head."""
        return None if self.head is None else in_float64(self.head.detach()).sum(-2)

    @property
    def nc0(self) -> Tensor:
        """NC0 = ‖Wᵀ1‖² (arXiv 2602.16642), float64, 0-d or `[R]`; RuntimeError without a head."""
        if (row_sum := self.row_sum) is None:
            raise RuntimeError("NC0 is not observed: call observe(head=model.fc.weight)")
        return row_sum.square().sum(-1)

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

    def forget(self) -> None:
        """Where a step has not been taken: there are no norms of it. Does not synchronise."""
        if self._norms is not None:
            self._norms.fill_(float("nan"))

    def check(self, owner: str, params: Iterable[Tensor]) -> None:
        """Raise ValueError for parameters on another device than the norms."""
        if self._norms is not None and any(_norms_device(p) != self._norms.device for p in params):
            raise ValueError(f"{owner}: norms are taken over parameters on one device; these are on several")

    def follow(self, params: Iterable[Tensor]) -> None:
        """Make the copies of parameters that were added."""
        if self._copied:
            for p in params:
                self.weights[p] = torch.empty_like(p, dtype=torch.bfloat16).detach().copy_(p.detach())

    def extras(self, params: Sequence[Tensor]) -> Extras:
        """What a step of these parameters writes, in the kernel's form."""
        return Extras(copies=[self.weights.get(p) for p in params] if self.weights else (), norms=self._norms)


def observed(owner: str, params: Sequence[Tensor], runs: int, head: Tensor | None, norms: bool, bf16: bool) -> Observed:
    """Allocate what `Optimizer.observe` asks for, for `runs` stacked runs; ValueError for what is not defined."""
    if head is not None:
        if not any(p is head for p in params):
            raise ValueError(f"{owner}: the head is not among the optimizer's parameters; give model.fc.weight itself")
        if head.dim() - 2 not in ({0, 1} if runs == 1 else {1}):
            raise ValueError(f"{owner}: the head must be a weight [K, d]; got shape {tuple(head.shape)}")
    unknown = float("nan")
    squares = torch.full((runs, 2), unknown, dtype=torch.float64, device=_norms_device(params[0])) if norms else None
    result = Observed(head, {}, runs > 1, bf16, squares)
    result.check(owner, params)
    result.follow(params)
    return result


def _norms_device(param: Tensor) -> torch.device:
    """Where the norms of a parameter are summed: on the CPU if its device has no float64."""
    return param.device if has_float64(param.device) else torch.device("cpu")
