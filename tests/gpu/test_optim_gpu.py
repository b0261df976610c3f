"""The optimizers on a GPU: one launch, no synchronisation, gradient scaling, stacked runs, mixed devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gpu_training import assert_same, batches, captured_step, every_optimizer, gpu_work, train_step, two_networks
from ncollapse import optim
from waiting import nothing_waits

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
def test_one_kernel_per_step_for_any_number_of_groups(device: torch.device, make: Any, tmp_path: Path) -> None:
    params = [nn.Parameter(torch.randn(1 + 37 * (i % 60)).to(device)) for i in range(200)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make([{"params": [p], "weight_decay": 0.001 * i} for i, p in enumerate(params)])
    for _ in range(2):
        optimizer.step()
        gpu_work(optimizer.step, tmp_path)  # the first profile of a process may be incomplete
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
def test_a_step_does_not_synchronise(device: torch.device, make: Any) -> None:
    model, _ = two_networks(device)
    optimizer = make(model.parameters())
    data = batches(device, 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    train_step(model, optimizer, data[0])
    with nothing_waits():
        for x in data[1:]:
            kept = [p.grad for p in model.parameters()]  # so that the next gradients have other addresses
            train_step(model, optimizer, x)
            schedule.step()
            optimizer.param_groups[0]["weight_decay"] *= 0.5
            del kept
        with pytest.raises(RuntimeError, match="synchroniz"):
            data[0].sum().item()  # the test detects synchronisation


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


def test_observed_values(device: torch.device) -> None:
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


def test_each_stacked_run_equals_a_run_alone(device: torch.device) -> None:
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
    on_gpu, on_cpu = (nn.Parameter(v.to(d)) for v, d in zip(values, (device, "cpu"), strict=True))
    alone = [nn.Parameter(p.detach().clone()) for p in (on_gpu, on_cpu)]
    both = optim.Adam([{"params": [on_gpu]}, {"params": [on_cpu], "lr": 0.02}], lr=0.01)
    each = [optim.Adam([alone[0]], lr=0.01), optim.Adam([alone[1]], lr=0.02)]
    for _ in range(5):
        for p, q in zip((on_gpu, on_cpu), alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (both, *each):
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert torch.equal(on_gpu, alone[0])
    assert torch.equal(on_cpu, alone[1])


@pytest.mark.compiled
def test_a_learning_rate_on_the_cpu_for_parameters_on_both_devices(device: torch.device) -> None:
    rate = torch.tensor(0.5)
    params = [nn.Parameter(torch.ones(700, device=d)) for d in (device, "cpu")]
    optimizer = optim.SGD(params, lr=rate)
    for expected in (0.5, 0.25):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        rate.mul_(0.5)  # read at every step
        assert all((p == expected).all() for p in params)
