"""A step of Muon's matrices in plain PyTorch: the momentum, Newton–Schulz, the direction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: a, b, c of an iteration, torch.optim.Muon's: singular values above 0.002 get into [0.68, 1.21] in five iterations.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
#: The least norm by which a matrix is divided, torch.optim.Muon's: a gradient of zero must not become NaN.
LEAST_NORM = 1e-7
#: Multiple of a matrix's sides in the kernels' memory, and rows and columns of a tile of a product with the matrix.
SIDE = 128
#: The most elements of a matrix with its padding that the kernels take, which count them in int32.
MOST_ELEMENTS = 2**30


def padded_sides(rows: int, columns: int) -> tuple[int, int]:
    """The smaller and the larger side of a matrix in the kernels' memory."""
    short, long = (-(-side // SIDE) * SIDE for side in sorted((rows, columns)))
    return short, long


def newton_schulz(x: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5) -> Tensor:
    """Matrices `[N, A, B]` with the singular vectors of `x` and all singular values near 1 (Jordan et al. 2024).

    X ← X/‖X‖_F, then `steps` times X ← aX + (bXXᵀ + c(XXᵀ)²)X, an odd polynomial of each singular value. Every result
    is rounded to x's dtype, as in torch.optim.Muon, where that is bfloat16. float32 products are rounded as
    `torch.set_float32_matmul_precision` says. Zero stays zero.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller Gram matrix
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM)
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Factors:
    """What β, c and λ become in a step: in its dtype, shaped to broadcast over tensors `[R, …]`.

    Args:
        numbers: β, c and λ, float32 or float64, 0-d, `[1]` or `[R]`.

    Attributes:
        coupled, keep, new: cλ, β, 1 − β, each computed in float64 and rounded once.
    """

    def __init__(self, numbers: Sequence[Tensor], dtype: torch.dtype, dims: int) -> None:
        beta, coupling, decay = (number.double() for number in numbers)
        shape = [-1, *[1] * (dims - 1)]
        self.coupled, self.keep, self.new = (
            number.to(dtype).view(shape) if number.dim() else number.to(dtype)
            for number in (coupling * decay, beta, 1 - beta)
        )


def momentum_reference(
    grad: Tensor, param: Tensor, buffer: Tensor, out: Tensor, factors: Factors, *, nesterov: bool, maximize: bool
) -> None:
    """Update the momentum V of matrices in place, and write what is orthogonalised.

    g = ±∇L + cλW, V ← V + (1 − β)(g − V); out is g + β(V − g) with Nesterov's momentum, else V.

    Args:
        grad, param: ∇L and W, of one shape `[R, rows, …]`.
        buffer: V, of that shape, in float32 or float64, in which everything is computed.
        out: of that shape, any dtype; rounded once.
    """
    g = -grad.to(buffer.dtype) if maximize else grad.to(buffer.dtype)
    g = torch.addcmul(g, param.to(buffer.dtype), factors.coupled)
    buffer.lerp_(g, factors.new)
    if nesterov and out.dtype == buffer.dtype:
        torch.lerp(g, buffer, factors.keep, out=out)
    else:
        out.copy_(torch.lerp(g, buffer, factors.keep) if nesterov else buffer)


def direction_reference(x: Tensor, param: Tensor, out: Tensor, factors: Factors, *, scale: float) -> None:
    """Write s·X − cλW, to which the update adds cλW.

    Args:
        x: the orthogonalised matrices X, in the shape of W, `[R, rows, …]`, any dtype.
        out: of that shape, in float32 or float64, in which everything is computed.
        scale: s.
    """
    torch.mul(x.to(out.dtype), scale, out=out)
    out.addcmul_(param.to(out.dtype), factors.coupled, value=-1)


class ReferenceMatrices:
    """The matrices of a step, orthogonalised in one batch for each shape, in any dtype on any device.

    Args:
        shapes: for each parameter its runs, rows and columns.
        dtype: in which they are orthogonalised.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = list(shapes), device, dtype
        self._batches: dict[tuple[int, int], list[int]] = {}  # the parameters of each shape `[short, long]`
        self._x: dict[int, Tensor] = {}  # of a parameter, `[R, rows, columns]`
        self._whole: dict[tuple[int, int], Tensor] = {}
        self._factors: dict[tuple[Any, ...], tuple[Factors, tuple[Tensor, ...]]] = {}

    def memory(self) -> list[Tensor]:
        """What a CUDA graph of a step holds addresses of, beside what was allocated in its capture: nothing."""
        return []

    def begin(self, present: Sequence[int]) -> None:
        """Begin a step in which the parameters with these indices have gradients."""
        self._batches = {}
        for n in present:
            _, rows, columns = self._shapes[n]
            self._batches.setdefault((min(rows, columns), max(rows, columns)), []).append(n)
        self._whole = {
            shape: torch.empty(sum(self._shapes[n][0] for n in ns), *shape, dtype=self._dtype, device=self._device)
            for shape, ns in self._batches.items()
        }
        self._cut()

    def momentum(
        self, n: int, grad: Tensor, param: Tensor, buffer: Tensor, *numbers: Tensor, nesterov: bool, maximize: bool
    ) -> None:
        """`momentum_reference` of parameter n, with β, c and λ, into the matrices of this step."""
        out, factors = as_shaped(self._x[n], param), self._rounded(numbers, buffer)
        momentum_reference(grad, param, buffer, out, factors, nesterov=nesterov, maximize=maximize)

    def orthogonalise(self, coefficients: tuple[float, float, float], steps: int) -> None:
        """`newton_schulz` of all matrices of this step."""
        self._whole = {shape: newton_schulz(x, coefficients, steps) for shape, x in self._whole.items()}
        self._cut()

    def direction(self, n: int, param: Tensor, out: Tensor, *numbers: Tensor, scale: float) -> None:
        """`direction_reference` of parameter n, with β, c and λ."""
        direction_reference(as_shaped(self._x[n], param), param, out, self._rounded(numbers, out), scale=scale)

    def end(self) -> None:
        """End the step, and free its matrices."""
        self._x, self._whole, self._factors = {}, {}, {}

    def _rounded(self, numbers: tuple[Tensor, ...], like: Tensor) -> Factors:
        """The factors of a step, once for all parameters with the same numbers."""
        key = *map(id, numbers), like.dtype, like.dim()
        if key not in self._factors:
            # With the tensors, since another one could get the identity of one that is no more.
            self._factors[key] = Factors(numbers, like.dtype, like.dim()), numbers
        return self._factors[key][0]

    def _cut(self) -> None:
        for shape, ns in self._batches.items():
            pieces = self._whole[shape].split_with_sizes([self._shapes[n][0] for n in ns])
            for n, piece in zip(ns, pieces, strict=True):
                self._x[n] = piece if self._shapes[n][1] <= self._shapes[n][2] else piece.mT


def as_shaped(x: Tensor, param: Tensor) -> Tensor:
    """A view of matrices `[R, rows, columns]` in the shape `[R, rows, …]` of a parameter."""
    return x if param.dim() == 3 else x.unflatten(2, param.shape[2:])
