"""What is observed is true whenever it is read, or NaN."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse import optim


def nc0(weight: Tensor) -> float:
    return float(weight.detach().double().sum(-2).square().sum())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None, fill: float = 1.0) -> None:
    optimizer.zero_grad()
    loss = model(torch.full((2, 5), fill)).square().sum()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def test_nc0_is_the_heads_whatever_happens_to_it() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    head = model[1].weight
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    seen = optimizer.observe(head=head)
    assert seen.nc0.item() == nc0(head) > 0
    head.requires_grad_(False)
    step(model, optimizer)
    assert seen.nc0.item() == nc0(head)
    head.requires_grad_(True)
    step(model, optimizer)
    assert seen.nc0.item() == nc0(head)
    model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()})
    assert seen.nc0.item() == nc0(head)
    head.data.mul_(0.5)
    assert seen.nc0.item() == nc0(head)
    head.data = torch.ones(3, 5)
    assert seen.nc0.item() == 45.0


def test_a_step_that_was_left_out_leaves_no_norms() -> None:
    model = nn.Linear(5, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    seen = optimizer.observe(head=model.weight, norms=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    assert seen.grad_norm.isnan()
    assert seen.update_norm.isnan()
    for fill, known in ((float("inf"), False), (1.0, True), (float("inf"), False), (1.0, True)):
        step(model, optimizer, scaler, fill)
        assert bool(seen.grad_norm.isfinite()) == bool(seen.update_norm.isfinite()) == known
        assert seen.nc0.item() == nc0(model.weight)
    optimizer.zero_grad()
    optimizer.step()  # without a gradient
    assert seen.grad_norm.isnan()


def test_parameters_of_groups_that_are_added_get_their_copies() -> None:
    first, second = nn.Linear(5, 5), nn.Linear(5, 3)
    optimizer = optim.Adam(first.parameters(), lr=0.1)
    seen = optimizer.observe(bf16=True, norms=True)
    optimizer.add_param_group({"params": second.parameters()})
    both = [*first.parameters(), *second.parameters()]
    assert [*seen.weights] == both
    for steps in range(3):
        if steps:
            step(nn.Sequential(first, second), optimizer)
        assert all(torch.equal(seen.weights[p], p.detach().bfloat16()) for p in both)
    with pytest.raises(ValueError, match="norms are taken over parameters on one device"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, device="meta"))]})
    assert len(optimizer.param_groups) == 2
    optimizer.observe()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [*seen.weights] == both


def test_stacked_runs() -> None:
    heads = nn.Parameter(torch.randn(2, 3, 5))
    seen = optim.Stacked([heads], ["sgd", "adam"]).observe(head=heads, norms=True)
    assert torch.equal(seen.nc0, torch.tensor([nc0(head) for head in heads], dtype=torch.float64))
    assert torch.equal(seen.grad_norm.isnan(), torch.tensor([True, True]))


def test_a_copy_observes_nothing() -> None:
    model = nn.Linear(5, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    seen = optimizer.observe(norms=True)
    again = copy.deepcopy((model, optimizer))
    step(*again)
    assert seen.grad_norm.isnan()
