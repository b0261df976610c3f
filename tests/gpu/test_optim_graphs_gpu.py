"""The optimizers in CUDA graphs and under torch.compile, on a GPU."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu_training import (
    OPTIMIZERS,
    assert_same,
    batches,
    captured_step,
    every_optimizer,
    gpu_work,
    train_step,
    two_networks,
)
from ncollapse import optim
from ncollapse.kernels.update import table
from ncollapse.kernels.update.graph_memory import free_ended


def warm_up(step: Callable[[], Any], times: int = 3) -> None:
    """Take steps on another stream, as PyTorch requires before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("lr", ["number", "tensor"])
@every_optimizer
def test_a_captured_train_step_equals_an_eager_one_and_follows_the_schedule(
    device: torch.device, make: Any, lr: str
) -> None:
    a, b = two_networks(device)
    rates = [torch.tensor(0.02, dtype=torch.float64, device=device) if lr == "tensor" else 0.02 for _ in range(2)]
    first, second = make(a.parameters(), lr=rates[0]), make(b.parameters(), lr=rates[1])
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (first, second)]
    x, data = torch.randn(16, 20).to(device), batches(device, 12)
    warm_up(lambda: train_step(a, first, x))
    for _ in range(3):
        train_step(b, second, x)
    graph = captured_step(a, first, x)
    for batch in data:
        x.copy_(batch)
        graph.replay()
        train_step(b, second, batch)
        for schedule in schedules:
            schedule.step()
    torch.cuda.synchronize()
    assert float(first.param_groups[0]["lr"]) == pytest.approx(0.02 / 13)
    assert_same(a, b, first, second)


@every_optimizer
def test_a_graph_of_many_steps(device: torch.device, make: Any) -> None:
    """Each step has other gradients, at other addresses."""
    a, b = two_networks(device)
    first, second = make(a.parameters()), make(b.parameters())
    data = batches(device, 10)
    warm_up(lambda: train_step(a, first, data[0]))
    for _ in range(3):
        train_step(b, second, data[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in data:
            train_step(a, first, x)
    for _ in range(3):
        graph.replay()
        for x in data:
            train_step(b, second, x)
    torch.cuda.synchronize()
    assert_same(a, b, first, second)


def test_a_graph_outlives_eager_steps_with_other_gradients(device: torch.device) -> None:
    """The graph's table must not change, wherever the gradients of eager steps are and whatever is allocated."""
    a, b = two_networks(device)
    first, second = optim.Adam(a.parameters(), lr=0.01), optim.Adam(b.parameters(), lr=0.01)
    grads = [[torch.randn_like(p) for p in a.parameters()] for _ in range(3)]

    def step(model: nn.Module, optimizer: Any, which: list[Tensor]) -> None:
        for p, g in zip(model.parameters(), which, strict=True):
            p.grad = g
        optimizer.step()

    warm_up(lambda: step(a, first, grads[0]))
    for _ in range(3):
        step(b, second, grads[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(a, first, grads[0])
    for k in range(6):
        other = grads[1 + k % 2]
        step(a, first, other)
        step(b, second, other)
        # If the graph's table were freed, these zeros would overwrite it: a table without parameters does no harm.
        garbage = [torch.zeros(n, dtype=torch.int64, device=device) for n in (12, 36, 64, 512, 5000) * 20]
        graph.replay()
        step(b, second, grads[0])
        torch.cuda.synchronize()
        del garbage
    assert_same(a, b, first, second)


@pytest.mark.parametrize("once", [True, False], ids=["filled once", "copied in each replay"])
def test_a_replay_is_the_kernel_alone(
    device: torch.device, once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And equals eager steps: replays read what the first one has filled in."""
    monkeypatch.setattr(table, "FILLED_ONCE", once)
    a, b = two_networks(device)
    first, second = optim.Adam(a.parameters(), lr=0.01), optim.Adam(b.parameters(), lr=0.01)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    warm_up(first.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    for _ in range(3):
        second.step()
    for _ in range(3):
        graph.replay()
        second.step()
    gpu_work(graph.replay, tmp_path)  # the first profile of a process may be incomplete
    work = gpu_work(graph.replay, tmp_path)
    assert work["kernel"] == ["_update_kernel"]
    assert len(work["gpu_memcpy"]) == (0 if once else 1)
    for _ in range(2):
        second.step()
    torch.cuda.synchronize()
    assert_same(a, b, first, second)


@pytest.mark.skipif(
    not hasattr(torch.cuda.CUDAGraph, "retain_object"), reason="torch keeps nothing alive for a graph before 2.15"
)
def test_what_a_graph_holds_outlives_the_optimizer_and_is_freed_with_the_graph(device: torch.device) -> None:
    a, b = two_networks(device)
    first, second = optim.Adam(a.parameters(), lr=0.01), optim.Adam(b.parameters(), lr=0.01)
    grads = [torch.randn_like(p) for p in a.parameters()]
    for model in (a, b):
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
    warm_up(first.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    for p in a.parameters():
        p.grad = None
    del first
    gc.collect()
    # If states or tables were freed, these would overwrite them.
    garbage = [torch.zeros(n, dtype=torch.int64, device=device) for n in (12, 36, 64, 512, 5000) * 20]
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        second.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    del garbage
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    del graph
    gc.collect()
    free_ended()
    assert torch.cuda.memory_allocated(device) < before


def test_a_capture_before_the_first_step_is_refused(device: torch.device) -> None:
    model, _ = two_networks(device)
    optimizer = optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="must take a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_compiled_steps_follow_the_learning_rate_without_compiling_again(
    device: torch.device, name: str, mode: str
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    a, b = two_networks(device)
    first, second = (OPTIMIZERS[name](m.parameters()) for m in (a, b))
    compiled = torch.compile(lambda: first.step(), mode=mode)
    for k in range(8):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            if p.grad is None:
                p.grad, q.grad = torch.empty_like(p), torch.empty_like(q)
            q.grad.normal_()
            p.grad.copy_(q.grad)
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + k)
        compiled()
        second.step()
    torch.cuda.synchronize()
    assert_same(a, b, first, second)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
