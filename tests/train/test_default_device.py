"""What is computed on the CPU stays there, whatever torch's default device is."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ncollapse
from ncollapse import ClassStats, optim, ufm
from ncollapse.train import train


@pytest.fixture
def default() -> Iterator[Callable[[], None]]:
    """Sets the default device to one on which nothing can be computed."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


MAKERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1),
    "adam": lambda params: optim.Adam(params, lr=torch.tensor(0.01, device="cpu")),
    "lion": lambda params: optim.Lion(params, lr=0.01),
    "muon": lambda params: optim.Muon(params, lr=0.01),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_steps_and_state_dicts(make: Callable[..., Any], default: Callable[[], None]) -> None:
    before = trained(make)
    default()
    assert all(torch.equal(p, q) for p, q in zip(before, trained(make), strict=True))


def trained(make: Callable[..., Any]) -> list[Any]:
    network = model()
    optimizer = make(network.parameters())
    optimizer.observe(head=network[2].weight, norms=True, bf16=True)
    for k in range(4):
        for p in network.parameters():
            p.grad = p.detach().sin() if k else None
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + k)
        optimizer.load_state_dict(optimizer.state_dict())
    return list(network.parameters())


def test_statistics_and_measurements(default: Callable[[], None]) -> None:
    x, y = torch.randn(30, 6), torch.arange(30) % 3
    network = model()
    before = ncollapse.measure(network, (x, y), batch_size=7)
    default()
    after = ncollapse.measure(network, (x, y), batch_size=7)
    assert repr(after) == repr(before)
    of_arrays = ncollapse.measure(network, (x.numpy(), y.numpy()), batch_size=7)
    assert repr(of_arrays) == repr(before)
    stats = ClassStats(3, 6, device="cpu")
    stats.update(x, y)
    assert stats.counts.tolist() == [10, 10, 10]


def test_unconstrained_features(default: Callable[[], None]) -> None:
    settings: dict[str, Any] = {"K": 3, "d": 4, "features": "etf", "lr": 0.1, "steps": 5, "weight_decay": 0.01}
    before = ufm.simulate("sgd", **settings)
    default()
    after = ufm.simulate("sgd", **settings)
    assert np.array_equal(before.nc0, after.nc0)


class Mine(nn.Module):
    """A model that names no device."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(x.flatten(1) * self.scale))


@pytest.mark.parametrize("network", ["mlp", Mine], ids=["built-in", "own"])
def test_training(network: Any, default: Callable[[], None]) -> None:
    settings: dict[str, Any] = {"epochs": 2, "device": "cpu", "lr": 0.05, "progress": False}
    before = train(network, "digits", **settings)
    default()
    after = train(network, "digits", **settings)
    assert repr(after.history) == repr(before.history)
