"""Parameters of all kinds for Muon, and the same gradients for two optimizers."""

from typing import Any

import torch
from torch import Tensor, nn

# A wide and a tall matrix, a row, a column, a convolution, a bias and a scalar.
SHAPES = [(4, 7), (7, 4), (1, 6), (6, 1), (5, 3, 2, 2), (5,), ()]


def parameters(shapes: Any = SHAPES, dtype: torch.dtype = torch.float64, runs: tuple[int, ...] = ()) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn((*runs, *shape), generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(params: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        # Depends on the weights, so that a difference would grow.
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + 0.1 * p.detach().sin()


def take(optimizer: torch.optim.Optimizer, params: Any, steps: range) -> list[Tensor]:
    for seed in steps:
        give_gradients(params, seed)
        optimizer.step()
    return [p.detach().clone() for p in params]


def close(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
