"""The optimizers on the GPU: one launch, no waiting, CUDA graphs, torch.compile, gradient scaling, stacked runs."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from nc import optim

# What PyTorch and its compilers say on a GPU is not ours to fix; a fall back to the reference is.
pytestmark = pytest.mark.filterwarnings("ignore", "error:plain PyTorch")

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, lr=0.1: optim.SGD(params, lr=lr, momentum=0.9, weight_decay=0.01),
    "signumw": lambda params, lr=0.01: optim.SignumW(params, lr=lr, weight_decay=0.01),
    "adam": lambda params, lr=0.01: optim.Adam(params, lr=lr, weight_decay=0.01, coupling=0.5),
    "lion": lambda params, lr=0.01: optim.Lion(params, lr=lr, weight_decay=0.01),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Network(nn.Module):
    """Two layers of products and sums, which are the same bits at every run; matrix products need not be."""

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
    """A CUDA graph of a train step with whatever is in x."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(model, optimizer, x)
    return graph


def warm_up(step: Callable[[], Any], times: int = 3) -> None:
    """Steps on a stream of their own, as PyTorch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def assert_same(a: nn.Module, b: nn.Module, first: Any, second: Any) -> None:
    """Parameters and states, bit for bit."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert first.state[p].keys() == second.state[q].keys()
        assert all(torch.equal(first.state[p][name], second.state[q][name]) for name in first.state[p])


def gpu_work(step: Callable[[], Any], folder: Path) -> dict[str, list[str]]:
    """Names of what a step has the GPU do, by the profiler's category."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset")
    return {cat: [e["name"] for e in events if e.get("cat") == cat] for cat in wanted}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """An error for everything that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


PAIRS = {
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "Adam": (optim.Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}),
}


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), PAIRS.values(), ids=PAIRS)
def test_same_as_torch(device: torch.device, ours: Any, theirs: Any, kwargs: dict[str, Any]) -> None:
    a, b = two_networks(device)
    first, second = ours(a.parameters(), **kwargs), theirs(b.parameters(), fused=True, **kwargs)
    for x in batches(device, 50):
        train_step(a, first, x)
        train_step(b, second, x)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@every_optimizer
def test_one_kernel_a_step_however_many_groups(device: torch.device, make: Any, tmp_path: Path) -> None:
    params = [nn.Parameter(torch.randn(1 + 37 * (i % 60)).to(device)) for i in range(200)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make([{"params": [p], "weight_decay": 0.001 * i} for i, p in enumerate(params)])
    for _ in range(2):
        optimizer.step()
        gpu_work(optimizer.step, tmp_path)  # the first profile of a process may miss something
    work = gpu_work(optimizer.step, tmp_path)
    assert work == {"kernel": ["_update_kernel"], "gpu_memcpy": [], "gpu_memset": []}

    def scheduled_step() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()

    work = gpu_work(scheduled_step, tmp_path)
    assert work["kernel"] == ["_update_kernel"]
    assert len(work["gpu_memcpy"]) == 1  # the numbers of all groups together


@every_optimizer
def test_a_step_does_not_wait_for_the_gpu(device: torch.device, make: Any, request: pytest.FixtureRequest) -> None:
    model, _ = two_networks(device)
    optimizer = make(model.parameters())
    data = batches(device, 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    train_step(model, optimizer, data[0])
    request.getfixturevalue("no_waiting")
    for x in data[1:]:
        kept = [p.grad for p in model.parameters()]  # so that the next gradients lie elsewhere
        train_step(model, optimizer, x)
        schedule.step()
        optimizer.param_groups[0]["weight_decay"] *= 0.5
        del kept
    with pytest.raises(RuntimeError, match="synchroniz"):
        data[0].sum().item()  # and the test would notice


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


def test_a_graph_outlives_eager_steps_with_other_gradients(device: torch.device) -> None:
    """The graph's table must stay as it was, wherever an eager step finds its gradients, and whatever is allocated."""
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
        # Were the graph's table freed, this would be written over it: a table of nothing, which harms nobody.
        garbage = [torch.zeros(n, dtype=torch.int64, device=device) for n in (12, 36, 64, 512, 5000) * 20]
        graph.replay()
        step(b, second, grads[0])
        torch.cuda.synchronize()
        del garbage
    assert_same(a, b, first, second)


def test_a_capture_before_the_first_step_is_refused(device: torch.device) -> None:
    model, _ = two_networks(device)
    optimizer = optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="must take a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@every_optimizer
def test_grad_scaler(device: torch.device, make: Any) -> None:
    a, b = two_networks(device)
    first, second = make(a.parameters()), make(b.parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for k, x in enumerate(batches(device, 6)):
        first.zero_grad()
        scaler.scale((a(x) - 1).square().mean()).backward()
        if k == 3:
            a.bias.grad.fill_(float("inf"))
        scaler.step(first)
        scaler.update()
        if k != 3:
            train_step(b, second, x)
    assert scaler.get_scale() == 512
    assert_same(a, b, first, second)  # scales are powers of two


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


def test_what_is_observed(device: torch.device) -> None:
    model, _ = two_networks(device)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    seen = optimizer.observe(head=model.fc.weight, norms=True, bf16=True)

    def check(before: list[Tensor]) -> None:
        torch.testing.assert_close(seen.row_sum, model.fc.weight.detach().double().sum(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(seen.nc0, seen.row_sum.square().sum())
        params = list(model.parameters())
        pairs = [(seen.grad_norm, [p.grad for p in params])]
        pairs.append((seen.update_norm, [p.detach() - b for p, b in zip(params, before, strict=True)]))
        for norm, tensors in pairs:
            expected = torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        assert all(torch.equal(seen.weights[p], p.detach().bfloat16()) for p in params)

    x = torch.randn(16, 20).to(device)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        train_step(model, optimizer, x)
        check(before)
    graph = captured_step(model, optimizer, x)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        graph.replay()
        check(before)


def test_stacked_runs_train_as_alone(device: torch.device) -> None:
    rules = ["sgd", "sgdw", "signum", "signumw", "adam", "adamw", "lion"]
    lr = [0.1, 0.2, 0.01, 0.02, 0.003, 0.004, 0.001]
    betas = {"momentum": 0.8, "betas": (0.9, 0.99)}
    shapes = [(6, 5), (513,), (33, 7)]
    params = [nn.Parameter(torch.randn(7, *s).to(device)) for s in shapes]
    alone = [[nn.Parameter(p.detach()[r].clone()) for p in params] for r in range(7)]
    rate = torch.tensor(lr, dtype=torch.float64, device=device)
    stacked = optim.Stacked(params, rules, lr=rate, weight_decay=0.05, **betas)
    classes = {c.__name__.lower(): c for c in (getattr(optim, name) for name in optim.__all__)}
    each = []
    for rule, run, eta in zip(rules, alone, lr, strict=True):
        key = "betas" if rule in ("adam", "adamw", "lion") else "momentum"
        each.append(classes[rule](run, lr=eta, weight_decay=0.05, **{key: betas[key]}))
    for _ in range(20):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape).to(device)
            for r in range(7):
                alone[r][i].grad = p.grad[r].clone()
        stacked.step()
        for optimizer in each:
            optimizer.step()
    for r, run in enumerate(alone):
        assert all(torch.equal(p.detach()[r], q.detach()) for p, q in zip(params, run, strict=True)), rules[r]


def test_bfloat16_parameters_keep_float32_states_through_a_state_dict(device: torch.device) -> None:
    a, b = two_networks(device)
    a, b = a.bfloat16(), b.bfloat16()
    first, second = optim.Adam(a.parameters(), lr=0.01), optim.Adam(b.parameters(), lr=0.5)
    data = [x.bfloat16() for x in batches(device, 6)]
    for x in data[:3]:
        train_step(a, first, x)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(tree_map(lambda t: t.cpu() if torch.is_tensor(t) else t, first.state_dict()))
    for x in data[3:]:
        train_step(a, first, x)
        train_step(b, second, x)
    assert all(s["exp_avg"].dtype == torch.float32 and s["exp_avg"].is_cuda for s in second.state.values())
    assert_same(a, b, first, second)


@pytest.mark.compiled
def test_parameters_on_both_devices(device: torch.device) -> None:
    values = [torch.randn(700), torch.randn(40, 30)]
    there, here = (nn.Parameter(v.to(d)) for v, d in zip(values, (device, "cpu"), strict=True))
    alone = [nn.Parameter(p.detach().clone()) for p in (there, here)]
    both = optim.Adam([{"params": [there]}, {"params": [here], "lr": 0.02}], lr=0.01)
    each = [optim.Adam([alone[0]], lr=0.01), optim.Adam([alone[1]], lr=0.02)]
    for _ in range(5):
        for p, q in zip((there, here), alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (both, *each):
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert torch.equal(there, alone[0])
    assert torch.equal(here, alone[1])
