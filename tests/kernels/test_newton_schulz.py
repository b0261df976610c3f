"""The kernels of Newton–Schulz against their reference, and both against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bfloat16_products
import interpreter
from ncollapse.kernels.newton_schulz.gpu import SIDE, TILE, Matrices
from ncollapse.kernels.newton_schulz.reference import (
    COEFFICIENTS,
    Factors,
    ReferenceMatrices,
    momentum_reference,
    newton_schulz,
)

# Wide, tall and square, of one row, of one element; sides that no tile divides; more than a tile each way.
SHAPES = [(2, 10, 70), (1, 130, 65), (1, 64, 9), (1, 1, 5), (1, 1, 1), (1, 140, 150)]
STEPS = 2  # an even and an odd iteration


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    bfloat16_products.decode(monkeypatch)


def given(shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Gradient, weight and momentum of each parameter."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(*s, generator=generator).to(device, dtype) for _ in range(3)] for s in shapes]


def numbers(device: torch.device, runs: int = 0) -> list[Tensor]:
    """β, c and λ, in both dtypes that they may have."""
    values = torch.tensor([0.9, 0.7, 0.3], device=device)
    of_runs = values[:, None] * torch.linspace(1, 0.5, runs, device=device) if runs else values
    return [of_runs[0].double(), of_runs[1], of_runs[2].double()]


def step(matrices: Any, tensors: Any, hypers: Any, steps: int = STEPS, **flags: bool) -> list[list[Tensor]]:
    """Momentum and direction of each parameter after a step; what is written is NaN before."""
    flags = {"nesterov": True, "maximize": False} | flags
    held = [[t.clone() for t in each] for each in tensors]
    matrices.begin(range(len(held)))
    for n, (grad, param, buffer) in enumerate(held):
        matrices.momentum(n, grad, param, buffer, *hypers[n], **flags)
    matrices.orthogonalise(COEFFICIENTS, steps)
    results = []
    for n, (_, param, buffer) in enumerate(held):
        out = torch.full_like(param, torch.nan, dtype=torch.float32)
        matrices.direction(n, param, out, *hypers[n], scale=2.5)
        results.append([buffer, out])
    matrices.end()
    return results


def exact(tensors: Any, hypers: Any, steps: int = STEPS, **flags: bool) -> list[list[Tensor]]:
    tensors = [[t.double().clone() for t in each] for each in tensors]
    results = []
    for (grad, param, buffer), (beta, coupling, decay) in zip(tensors, hypers, strict=True):
        x = torch.empty_like(grad)
        flags = {"nesterov": True, "maximize": False} | flags
        momentum_reference(grad, param, buffer, x, Factors((beta, coupling, decay), torch.float64, 3), **flags)
        coupled = (coupling.double() * decay.double()).view(-1, 1, 1)
        results.append([buffer, 2.5 * newton_schulz(x, steps=steps) - coupled * param])
    return results


def error(ours: Tensor, true: Tensor) -> float:
    return float((ours - true).norm() / true.norm())


def test_a_step_is_the_references(device: torch.device) -> None:
    """Both round every product to bfloat16, so they differ by such roundings, and are as far from float64."""
    tensors = given(SHAPES, device)
    hypers = [numbers(device, runs=runs if runs > 1 else 0) for runs, _, _ in SHAPES]
    ours = step(Matrices(SHAPES, device), tensors, hypers)
    reference = step(ReferenceMatrices(SHAPES, device, torch.bfloat16), tensors, hypers)
    for shape, mine, theirs, true in zip(SHAPES, ours, reference, exact(tensors, hypers), strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)
        assert error(mine[1], true[1]) < 1.5 * error(theirs[1], true[1]) + 2e-3, shape
        assert error(mine[1], true[1]) < 0.03, shape


@pytest.mark.parametrize("flags", [{"nesterov": False}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed gradient", "bfloat16 parameter"])
def test_momentum_and_direction(device: torch.device, flags: dict[str, bool], layout: str) -> None:
    shapes = [(1, 9, 40)]
    tensors, hypers = given(shapes, device), [numbers(device)]
    if layout == "transposed gradient":
        tensors[0][0] = tensors[0][0].mT.contiguous().mT
    if layout == "bfloat16 parameter":
        tensors[0][:2] = [t.bfloat16() for t in tensors[0][:2]]
    ((buffer, direction),) = step(Matrices(shapes, device), tensors, hypers, steps=1, **flags)
    ((true_buffer, true),) = exact(tensors, hypers, steps=1, **flags)
    torch.testing.assert_close(buffer.double(), true_buffer, rtol=1e-6, atol=1e-6)
    assert error(direction, true) < 0.01


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-6, 1e8, torch.nan])
def test_norms(device: torch.device, scale: float) -> None:
    """Zero stays zero, a norm below torch.optim.Muon's least is not brought to 1, NaN stays within its run."""
    shapes = [(2, 10, 20)]
    (tensors,), hypers = given(shapes, device), numbers(device)
    tensors = [tensors[0], torch.zeros_like(tensors[1]), torch.zeros_like(tensors[2])]
    tensors[0][0] *= scale
    ((_, ours),) = step(Matrices(shapes, device), [tensors], [hypers])
    ((_, reference),) = step(ReferenceMatrices(shapes, device, torch.bfloat16), [tensors], [hypers])
    assert ours[1].isfinite().all()
    assert error(ours[1], reference[1]) < 0.02
    if scale == scale and scale > 0:
        assert error(ours[0], reference[0]) < 0.02
    else:
        assert torch.equal(ours[0].isnan(), reference[0].isnan())
        assert scale != scale or not ours[0].any()


def test_the_triangle_is_mirrored_and_the_padding_stays_zero(device: torch.device) -> None:
    shapes = [(1, 70, 150)]
    assert TILE < 70 < SIDE
    matrices = Matrices(shapes, device)
    tensors, hypers = given(shapes, device), [numbers(device)]
    ((_, first),) = step(matrices, tensors, hypers)
    for square in (matrices._gram, matrices._factor):
        square = square.view(SIDE, SIDE)
        assert torch.equal(square, square.mT)
        assert square[:70, :70].count_nonzero() > 4800
        assert not square[70:].any()
    for x in matrices._x:
        assert not x.view(SIDE, 2 * SIDE)[70:].any()
        assert not x.view(SIDE, 2 * SIDE)[:, 150:].any()
    # Nothing of a step is left for the next.
    ((_, again),) = step(matrices, tensors, hypers)
    assert torch.equal(first, again)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_nothing_for_the_next(device: torch.device, value: float) -> None:
    """As when an earlier state dict is loaded; nor do steps without the gradient of a matrix whose norm was tiny."""
    shapes = [(1, 10, 40), (1, 140, 20)]
    matrices, tensors = Matrices(shapes, device), given(shapes, device)
    hypers = [numbers(device)] * 2
    expected = step(Matrices(shapes, device), tensors, hypers)
    broken, tiny = ([[t.clone() for t in each] for each in tensors] for _ in range(2))
    broken[0][0][0, 3, 5] = broken[1][0][0, 130, 7] = value
    for t in tiny[0] + tiny[1]:
        t *= 1e-12
    with interpreter.quiet():
        assert all(out.isnan().any() for _, out in step(matrices, broken, hypers))
        step(matrices, tiny, hypers)
        for _ in range(2):
            matrices.orthogonalise(COEFFICIENTS, STEPS)
    for ours, theirs in zip(step(matrices, tensors, hypers), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_reference_computes_those_that_are_present(device: torch.device) -> None:
    shapes = [(2, 4, 7), (1, 7, 4), (1, 6, 6)]
    tensors, hypers = given(shapes, device, torch.float64), [numbers(device)] * 3
    matrices, every = ReferenceMatrices(shapes, device, torch.float64), exact(tensors, hypers)
    for present in ([0, 1, 2], [1], [2, 0]):
        held = {n: [t.clone() for t in tensors[n]] for n in present}
        matrices.begin(present)
        for n, each in held.items():
            matrices.momentum(n, *each, *hypers[n], nesterov=True, maximize=False)
        matrices.orthogonalise(COEFFICIENTS, STEPS)
        for n, (_, param, buffer) in held.items():
            out = torch.empty_like(param)
            matrices.direction(n, param, out, *hypers[n], scale=2.5)
            torch.testing.assert_close([buffer, out], every[n], rtol=1e-11, atol=1e-11)
        matrices.end()
