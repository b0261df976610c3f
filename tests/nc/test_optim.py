"""The optimizers against torch.optim, and what they refuse."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ncollapse import optim
from small_network import network, weights

PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.05}),
    "SGD-decay": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "SGD-momentum": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD-dampening": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "SGD-nesterov": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD-maximize": (optim.SGD, torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "Adam": (optim.Adam, torch.optim.Adam, {}),
    "Adam-decay": (optim.Adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    "Adam-maximize": (optim.Adam, torch.optim.Adam, {"weight_decay": 0.1, "maximize": True, "eps": 1e-6}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {}),
    "AdamW-decay": (optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
}
CLASSES = [optim.SGD, optim.SGDW, optim.Signum, optim.SignumW, optim.Adam, optim.AdamW]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=generator, dtype=dtype)
        nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("ours", "theirs", "kwargs"), PAIRS.values(), ids=PAIRS)
def test_same_as_torch(ours: Any, theirs: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    a, b = network(dtype), network(dtype)
    train(a, ours(a.parameters(), **kwargs), 50)
    train(b, theirs(b.parameters(), **kwargs), 50)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(weights(a), weights(b), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["SGD-momentum", "Adam-decay", "AdamW-decay"])
@pytest.mark.parametrize("direction", ["to_torch", "from_torch"])
def test_state_dict_is_exchanged_with_torch(name: str, direction: str) -> None:
    ours, theirs, kwargs = PAIRS[name]
    first, second = (theirs, ours) if direction == "from_torch" else (ours, theirs)
    a, b = network(), network()
    source = first(a.parameters(), **kwargs)
    train(a, source, 20)
    b.load_state_dict(a.state_dict())
    target = second(b.parameters(), **kwargs)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(a, source, 20, seed=1)
    train(b, target, 20, seed=1)
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_continues_from_its_state_dict_bit_for_bit(cls: Any) -> None:
    a, b = network(), network()
    source = cls(a.parameters(), lr=0.01, weight_decay=0.1)
    train(a, source, 10)
    b.load_state_dict(a.state_dict())
    target = cls(b.parameters(), lr=0.5)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(a, source, 10, seed=1)
    train(b, target, 10, seed=1)
    assert torch.equal(weights(a), weights(b))


@pytest.mark.parametrize(
    ("cls", "other", "coupling"),
    [
        (optim.SGD, optim.SGDW, 0.0),
        (optim.SGDW, optim.SGD, 1.0),
        (optim.Signum, optim.SignumW, 0.0),
        (optim.Adam, optim.AdamW, 0.0),
        (optim.AdamW, optim.Adam, 1.0),
    ],
)
def test_coupling_is_the_dial_between_two_classes(cls: Any, other: Any, coupling: float) -> None:
    a, b = network(), network()
    train(a, cls(a.parameters(), lr=0.01, weight_decay=0.1, coupling=coupling), 20)
    train(b, other(b.parameters(), lr=0.01, weight_decay=0.1), 20)
    assert torch.equal(weights(a), weights(b))


@settings(deadline=None, max_examples=50)
@given(
    coupling=st.floats(0, 1),
    lr=st.floats(1e-4, 1),
    decay=st.floats(0, 1),
    momentum=st.floats(0, 0.99),
    grad=st.floats(-10, 10),
    value=st.floats(-10, 10),
)
def test_a_first_sgd_step_is_linear_in_coupling(
    coupling: float, lr: float, decay: float, momentum: float, grad: float, value: float
) -> None:
    """Without momentum, coupled and decoupled decay of SGD are the same: w − η(g + λw) for every c."""
    param = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    param.grad = torch.tensor([grad], dtype=torch.float64)
    optim.SGD([param], lr=lr, momentum=momentum, weight_decay=decay, coupling=coupling).step()
    assert param.item() == pytest.approx(value - lr * (grad + decay * value), rel=1e-12, abs=1e-12)


def test_learning_rate_schedules_and_clipping_work() -> None:
    results = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        model = network()
        optimizer = cls(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for i in range(10):
            train(model, optimizer, 1, seed=i)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            schedule.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_param_groups_have_their_own_settings() -> None:
    model = network()
    decayed, plain = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    before = weights(model)
    optimizer = optim.SGDW([{"params": decayed, "weight_decay": 0.5}, {"params": plain, "lr": 0.0}], lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = [0.95 if p.dim() > 1 else 1.0 for p in model.parameters() for _ in range(p.numel())]
    torch.testing.assert_close(weights(model), before * torch.tensor(expected))


def test_momentum_may_be_switched_on_later() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.Signum([param], lr=0.1, momentum=0.0)
    for momentum in (0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        param.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.ones(3))


def test_closure_is_called_with_gradients() -> None:
    param = nn.Parameter(torch.ones(1))

    def closure() -> float:
        loss = (2 * param).sum()
        loss.backward()
        return loss.item()

    assert optim.SGD([param], lr=0.5).step(closure) == 2.0
    assert param.item() == 0.0
