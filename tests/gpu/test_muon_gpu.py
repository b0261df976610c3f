"""Muon on a GPU: CUDA graphs, no synchronisation, stacked runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse import optim
from ncollapse.kernels.newton_schulz.reference import newton_schulz
from ncollapse.optim import muon
from waiting import nothing_waits


def parameters(device: torch.device, *runs: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 16), (16, 10), (16, 10), (6, 4, 3, 3), (10,), (6,)]
    return [nn.Parameter(torch.randn(*runs, *shape, generator=generator).to(device)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    """Write into the existing gradients, whose addresses a graph reads."""
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).to(p.device)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


def close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    """Raise AssertionError unless equal up to rounding of matrix products, which a graph may compute differently."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-4, atol=1e-4)


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Capture a step in a CUDA graph, after a warm-up on another stream, as PyTorch requires."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("precision", ["full", "bfloat16", "auto"])
def test_equals_the_cpu(device: torch.device, precision: str) -> None:
    """On the CPU "auto" is told which parameters it has in bfloat16 on a GPU: all but the last matrix."""
    a, b = parameters(device), parameters(torch.device("cpu"))
    settings = {"lr": 0.02, "weight_decay": 0.1, "coupling": 0.5}
    first = optim.Muon(a, ns_precision=precision, **settings)
    hidden = [p for p in b if p is not b[2]]
    second = optim.Muon(
        [{"params": hidden, "ns_precision": "full" if precision == "full" else "bfloat16"},
         {"params": [b[2]], "ns_precision": "bfloat16" if precision == "bfloat16" else "full"}], **settings,
    )  # fmt: skip
    for seed in range(6):
        give_gradients(a, seed)
        give_gradients(b, seed)
        first.step()
        second.step()
    if precision == "full":
        close(a, b)
        return
    # bfloat16 keeps three digits of directions of size 0.2·√max(A, B) < 1.3, over six steps of 0.02.
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=6 * 0.02 * 1.3 * 0.03)
    if precision == "auto":
        close([a[2]], [b[2]])


@pytest.mark.parametrize("most", [0, muon.MOST_SIDE], ids=["cuBLAS", "kernels"])
def test_large_matrices_are_orthogonalised(device: torch.device, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Of several shapes at once, as many tiles as in ResNet9: singular values near 1, the same as in float64."""
    monkeypatch.setattr(muon, "MOST_SIDE", most)
    monkeypatch.setattr(muon, "FENCES", (0,))  # the kernels are tried with any Triton
    shapes = [(512, 4608), (512, 512, 3, 3), (512, 2304), (128, 1152), (64, 9), (300, 200)]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(*shape, device=device)) for shape in shapes]
    params[1] = nn.Parameter(params[1].detach().contiguous(memory_format=torch.channels_last))
    optimizer = optim.Muon(params, lr=1.0, momentum=0.0, ns_precision="bfloat16", adjust_lr_fn="original")
    for p in params:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
    optimizer.step()
    for p in params:
        scale = max(1, len(p) / p[0].numel()) ** 0.5
        ours = -p.detach().double().reshape(len(p), -1) / scale
        exact = newton_schulz(p.grad.double().reshape(1, len(p), -1))[0]
        assert (ours - exact).norm() < 0.03 * exact.norm(), tuple(p.shape)


@pytest.mark.parametrize("kind", ["number", "tensor", "stacked"])
def test_a_captured_step_equals_an_eager_one_and_reads_changed_numbers(device: torch.device, kind: str) -> None:
    def make(params: list[nn.Parameter]) -> optim.Muon:
        numbers: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "coupling": 0.5, "momentum": 0.9}
        if kind != "number":
            shape = (3,) if kind == "stacked" else ()
            numbers = {n: torch.full(shape, v, dtype=torch.float64, device=device) for n, v in numbers.items()}
        return optim.Muon(params, **numbers, stacked=kind == "stacked")

    def write(optimizer: optim.Muon, name: str, value: float) -> None:
        group = optimizer.param_groups[0]
        if isinstance(group[name], Tensor):
            group[name].fill_(value)
        else:
            group[name] = value

    runs = (3,) if kind == "stacked" else ()
    a, b = parameters(device, *runs), parameters(device, *runs)
    first, second = make(a), make(b)
    give_gradients(a, 0)
    graph = captured(first.step)
    give_gradients(b, 0)
    second.step()
    for seed in range(1, 10):
        for optimizer in (first, second):
            write(optimizer, "lr", 0.02 / seed)
            # Decay starts after the capture.
            write(optimizer, "weight_decay", 0.1 * (seed > 4))
            write(optimizer, "momentum", 0.8 if seed > 6 else 0.9)
        give_gradients(a, seed)
        give_gradients(b, seed)
        graph.replay()
        second.step()
    torch.cuda.synchronize()
    close(a, b)


def test_a_replay_uses_a_state_loaded_after_the_capture(device: torch.device) -> None:
    params = parameters(device)
    optimizer = optim.Muon(params, lr=0.02)
    give_gradients(params, 0)
    graph = captured(optimizer.step)
    saved = optimizer.state_dict()
    saved = {"state": {i: {n: v.clone() for n, v in s.items()} for i, s in saved["state"].items()}} | {
        "param_groups": saved["param_groups"]
    }
    weights = [p.detach().clone() for p in params]
    ends = []
    for _ in range(2):
        optimizer.load_state_dict(saved)
        for p, w in zip(params, weights, strict=True):
            p.data.copy_(w)
        for seed in range(1, 4):
            give_gradients(params, seed)
            graph.replay()
        ends.append([nn.Parameter(p.detach().clone()) for p in params])
    close(*ends)


def test_a_capture_before_the_first_step_is_refused(device: torch.device) -> None:
    params = parameters(device)
    give_gradients(params, 0)
    optimizer = optim.Muon(params)
    with pytest.raises(RuntimeError, match="must take a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_a_step_does_not_synchronise(device: torch.device, tensors: bool) -> None:
    params = parameters(device, 3)
    rates = torch.full((3,), 0.02, dtype=torch.float64, device=device)
    optimizer = optim.Muon(params, lr=rates if tensors else 0.02, weight_decay=rates if tensors else 0.1, stacked=True)
    optimizer.observe(head=params[0], norms=True, bf16=True)
    give_gradients(params, 0)
    optimizer.step()
    with nothing_waits():
        optimizer.param_groups[0]["eps"] = 1e-6
        optimizer.step()


def test_the_law_of_the_row_sum_holds_with_hidden_matrices_in_bfloat16(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).to(device)
    x, y = torch.randn(32, 8, device=device), torch.arange(32, device=device) % 5
    optimizer = optim.Muon(model.parameters(), lr=0.02, weight_decay=0.5)
    start = model[4].weight.detach().double().sum(0)
    for _ in range(60):
        logits = model(x)
        gradient = logits.detach().softmax(1).scatter_(1, y[:, None], 0)
        gradient.scatter_(1, y[:, None], -gradient.sum(1, keepdim=True))
        optimizer.zero_grad()
        logits.backward(gradient / 32)
        optimizer.step()
    expected = (1 - 0.02 * 0.5) ** 60 * start
    assert (model[4].weight.detach().double().sum(0) - expected).norm() < 1e-3 * start.norm()
