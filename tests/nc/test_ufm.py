"""The exact row-sum recursion against networks trained with our own optimizers."""

import numpy as np
import pytest
import torch
from torch import nn

from nc import metrics, optim, ufm


@pytest.mark.parametrize("coupling", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_row_sum_follows_the_recursion_in_a_network(momentum: float, coupling: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.02, coupling=coupling)
    lrs = [0.1] * 60 + [0.01] * 40
    head = model[2].weight
    start = metrics.nc0(head.detach())
    measured = [1.0]
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 6).double()), torch.randint(5, (32,))).backward()
        optimizer.step()
        measured.append((metrics.nc0(head.detach()) / start).item())
    predicted = ufm.row_sum_factor(lrs, momentum=momentum, weight_decay=0.02, coupling=coupling) ** 2
    np.testing.assert_allclose(measured, predicted, rtol=1e-10)


def test_the_number_worked_out_from_the_papers_table() -> None:
    """SGDW's fall by 68.9 %: 469 steps an epoch, tenfold drops at 66 and 133 of 200 epochs."""
    lrs = [0.0679 * f for epochs, f in ((66, 1.0), (67, 0.1), (67, 0.01)) for _ in range(469 * epochs)]
    factor = ufm.row_sum_factor(lrs, weight_decay=5e-4, coupling=0.0)
    assert len(factor) == 93_801
    assert factor[-1] == pytest.approx(0.3109, abs=5e-5)


def test_no_decay_leaves_the_row_sum() -> None:
    assert set(ufm.row_sum_factor([0.1] * 5, momentum=0.9, weight_decay=0.0, coupling=1.0)) == {1.0}
