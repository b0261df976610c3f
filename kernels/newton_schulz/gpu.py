"""The matrices of a step on a GPU: their memory, the tables of their tiles, and the launchers of the Triton kernels.

All is made once, so that a step allocates nothing, waits for nothing, and can be captured in a CUDA graph.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ncollapse.kernels.newton_schulz.gpu_kernels import (
    direction_kernel,
    momentum_kernel,
    polynomial_kernel,
    symmetric_kernel,
)
from ncollapse.kernels.newton_schulz.reference import (
    SIDE,
    Factors,
    as_shaped,
    direction_reference,
    momentum_reference,
    padded_sides,
)

#: Side of a tile of `symmetric_kernel`: 512 rows have 36 on and below the diagonal, and all matrices of ResNet9
#: 128, for the 132 multiprocessors of an H100.
TILE = 64
#: Columns (rows) of the factors in an iteration, and how many iterations' loads are under way.
STEP, STAGES = 64, 4
SYMMETRIC = {"num_warps": 4, "enable_fp_fusion": True}
POLYNOMIAL = {"num_warps": 8, "enable_fp_fusion": True}
#: The most parts of a squared norm, and programs of a matrix that write one each.
PARTS = 512
#: Elements per iteration, eight per thread.
BLOCK = 2048
ELEMENTWISE = {"num_warps": 8, "enable_fp_fusion": True}


def _up_to(n: int, multiple: int) -> int:
    return triton.cdiv(n, multiple) * multiple


class Matrices:
    """As `ReferenceMatrices`, in bfloat16, with one launch for each product of an iteration, whatever the shapes.

    Args:
        shapes: for each parameter its runs, rows and columns: its elements with the padding up to MOST_ELEMENTS.
    """

    def __init__(self, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self._shapes, self._device = list(shapes), device
        sides = [sorted(shape[1:]) for shape in shapes for _ in range(shape[0])]  # of each matrix: short, long
        padded = [padded_sides(*each) for each in sides]
        ends, gram_ends = [0], [0]
        for short, long in padded:
            ends.append(ends[-1] + short * long)
            gram_ends.append(gram_ends[-1] + short * short)
        # The padding stays zero: an iteration takes zero rows and columns to themselves.
        self._x = [torch.zeros(ends[-1], dtype=torch.bfloat16, device=device) for _ in range(2)]
        self._gram, self._factor = (torch.zeros(gram_ends[-1], dtype=torch.bfloat16, device=device) for _ in range(2))
        self._parts = torch.zeros(len(sides), PARTS, dtype=torch.float32, device=device)
        self._result = 0  # which of `_x` has the orthogonalised matrices
        firsts = itertools.accumulate((runs for runs, _, _ in shapes), initial=0)
        self._rows = [slice(*pair) for pair in itertools.pairwise(firsts)]  # of each parameter, in `_parts`
        self._views = [
            [_view(x, ends[rows.start], shape) for rows, shape in zip(self._rows, shapes, strict=True)] for x in self._x
        ]
        self._make_tables(sides, padded, ends, gram_ends)

    def _make_tables(self, sides: list[list[int]], padded: list[Any], ends: list[int], gram_ends: list[int]) -> None:
        grams, squares, polynomials = [], [], []
        counts = [_programs(short * long)[0] for short, long in sides]
        for i, ((short, long), (pitch, long_pitch)) in enumerate(zip(sides, padded, strict=True)):
            x, gram, parts = (ends[i], long_pitch), (gram_ends[i], pitch), counts[i]
            grams.append((*x, _up_to(long, STEP), *gram, parts))
            squares.append((*gram, _up_to(short, STEP), *gram, parts))
            polynomials.append((*x, _up_to(short, STEP), *gram, parts, short, long))
        # The longest programs first, so that the last ones to end are short.
        order = sorted(range(len(sides)), key=lambda i: -padded[i][1])
        triangle = [
            (m, i, j) for m in order for i in range(triton.cdiv(sides[m][0], TILE)) for j in range(i + 1)
        ]  # fmt: skip
        rectangle = [
            (m, i, j)
            for m in sorted(order, key=lambda m: -padded[m][0])
            for i in range(padded[m][0] // SIDE)
            for j in range(padded[m][1] // SIDE)
        ]
        self._tables = [
            torch.tensor(t, dtype=torch.int64, device="cpu").to(self._device) for t in (grams, squares, polynomials)
        ]
        self._triangle, self._rectangle = (
            torch.tensor(t, dtype=torch.int32, device="cpu").to(self._device) for t in (triangle, rectangle)
        )

    def memory(self) -> list[Tensor]:
        """What a CUDA graph of a step holds addresses of."""
        return [*self._x, self._gram, self._factor, self._parts, *self._tables, self._triangle, self._rectangle]

    def begin(self, present: Sequence[int]) -> None:
        """Begin a step: without effect, since the matrices of parameters without gradients are computed as well."""

    def momentum(
        self, n: int, grad: Tensor, param: Tensor, buffer: Tensor, *numbers: Tensor, nesterov: bool, maximize: bool
    ) -> None:
        """`momentum_reference` of parameter n, with β, c and λ, into the matrices of this step."""
        x, parts = self._views[0][n], self._parts[self._rows[n]]
        if not (buffer.dtype == torch.float32 and all(t.is_contiguous() for t in (grad, param, buffer))):
            # Of memory in different orders.
            factors = Factors(numbers, buffer.dtype, buffer.dim())
            momentum_reference(grad, param, buffer, as_shaped(x, param), factors, nesterov=nesterov, maximize=maximize)
            parts.zero_()
            torch.sum(x.float().square(), (1, 2), out=parts[:, 0])
            return
        runs, rows, columns = x.shape
        programs, each = _programs(rows * columns)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            momentum_kernel[(programs, runs)](
                grad, param, buffer, x, parts, rows * columns, columns, each, *x.stride(), *_strided(numbers),
                nesterov, maximize, PARTS, BLOCK, **ELEMENTWISE,
            )  # fmt: skip

    def orthogonalise(self, coefficients: tuple[float, float, float], steps: int) -> None:
        """`newton_schulz` of all matrices: three launches an iteration."""
        a, b, c = coefficients
        parts, (grams, squares, polynomials) = self._parts, self._tables
        symmetric, rectangle = (len(self._triangle),), (len(self._rectangle),)
        shape = (PARTS, TILE, STEP, STAGES)
        with torch.cuda.device_of(parts):
            for step in range(steps):
                x, out = self._x[step % 2], self._x[(step + 1) % 2]
                first = step == 0  # X is divided by its norm on the way
                symmetric_kernel[symmetric](
                    x, self._gram, grams, self._triangle, parts, 1.0, 0.0, first, False, *shape, **SYMMETRIC
                )
                symmetric_kernel[symmetric](
                    self._gram, self._factor, squares, self._triangle, parts, c, b, False, True, *shape, **SYMMETRIC
                )
                polynomial_kernel[rectangle](
                    x, self._factor, out, polynomials, self._rectangle, parts, a, first, PARTS, SIDE, SIDE, STEP,
                    STAGES - 1, **POLYNOMIAL,
                )  # fmt: skip
        self._result = steps % 2

    def direction(self, n: int, param: Tensor, out: Tensor, *numbers: Tensor, scale: float) -> None:
        """`direction_reference` of parameter n, with β, c and λ."""
        x = self._views[self._result][n]
        if not (out.dtype == torch.float32 and param.is_contiguous() and out.is_contiguous()):
            factors = Factors(numbers, out.dtype, out.dim())
            direction_reference(as_shaped(x, param), param, out, factors, scale=scale)
            return
        runs, rows, columns = x.shape
        size = rows * columns
        with torch.cuda.device_of(x):
            direction_kernel[(triton.cdiv(size, BLOCK), runs)](
                x, param, out, size, columns, *x.stride(), *_strided(numbers[1:]), scale, BLOCK, **ELEMENTWISE
            )

    def end(self) -> None:
        """End the step: the memory stays for the next one."""


def _view(x: Tensor, start: int, shape: tuple[int, int, int]) -> Tensor:
    """The matrices `[R, rows, columns]` of a parameter in the padded buffer; tall ones lie transposed."""
    runs, rows, columns = shape
    short, long = padded_sides(rows, columns)
    within = x[start : start + runs * short * long].view(runs, short, long)
    return within[:, :rows, :columns] if rows <= columns else within[:, :columns, :rows].mT


def _programs(size: int) -> tuple[int, int]:
    """Programs that take a matrix of so many elements, and how many elements each takes."""
    each = BLOCK * triton.cdiv(size, BLOCK * PARTS)
    return triton.cdiv(size, each), each


def _strided(numbers: Sequence[Tensor]) -> list[Any]:
    """Each number, 0-d or `[R]`, and its stride from run to run."""
    return [v for number in numbers for v in (number, number.stride(0) if number.numel() > 1 else 0)]
