"""Small models, optimizers and train steps for the tests that need a GPU."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ncollapse import optim
from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.training.loop import Training

T = TypeVar("T")

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, lr=0.1: optim.SGD(params, lr=lr, momentum=0.9, weight_decay=0.01),
    "signumw": lambda params, lr=0.01: optim.SignumW(params, lr=lr, weight_decay=0.01),
    "adam": lambda params, lr=0.01: optim.Adam(params, lr=lr, weight_decay=0.01, coupling=0.5),
    "lion": lambda params, lr=0.01: optim.Lion(params, lr=lr, weight_decay=0.01),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Network(nn.Module):
    """Two layers of products and sums, which give the same bits every time; matrix products may not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(32, 20) / 5)
        self.bias = nn.Parameter(torch.zeros(32))
        self.fc = nn.Linear(32, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh((x[:, None, :] * self.hidden).sum(-1) + self.bias)
        return (hidden[:, None, :] * self.fc.weight).sum(-1)


def two_networks(device: torch.device) -> tuple[Network, Network]:
    model = Network().to(device)
    return model, copy.deepcopy(model)


def batches(device: torch.device, count: int) -> list[Tensor]:
    return [torch.randn(16, 20).to(device) for _ in range(count)]


def train_step(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    (model(x) - 1).square().mean().backward()
    optimizer.step()


def captured_step(model: nn.Module, optimizer: Any, x: Tensor) -> torch.cuda.CUDAGraph:
    """Capture a train step in a CUDA graph, which reads its batch from `x`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(model, optimizer, x)
    return graph


def warmed_and_captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Take a step on another stream, which compiles its kernels, and capture one: the graph, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def trained_in_graphs(run: RunConfig, data: Dataset, device: torch.device) -> dict[str, Tensor]:
    """Train a run, whose steps must be in CUDA graphs as a whole; its tensors at the end."""
    training = Training([run], data, device)
    for _ in training:
        pass
    assert training._step.captured == "forward pass, backward pass and update"
    return training.stack.tensors()


def gpu_work(step: Callable[[], Any], folder: Path) -> dict[str, list[str]]:
    """Return the names of kernels, copies and fills that a step runs on the GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    return {cat: [e["name"] for e in events if e.get("cat") == cat] for cat in wanted}


def assert_same(a: nn.Module, b: nn.Module, first: Any, second: Any) -> None:
    """Raise AssertionError unless parameters and states have the same bits."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert first.state[p].keys() == second.state[q].keys()
        assert all(torch.equal(first.state[p][name], second.state[q][name]) for name in first.state[p])
