"""Muon's steps: what may change between them, states, compiled code, layouts, half precision."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from muon_cases import close, give_gradients, parameters, take
from ncollapse import optim


@pytest.mark.parametrize("method", ["state dict", "copy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resumes_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = optim.Muon(params, lr=0.03, weight_decay=0.2, coupling=0.5, momentum=0.8, nesterov=False)
    take(optimizer, params, range(3))
    if method == "state dict":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = optim.Muon(others, lr=0.5)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        both = (params, optimizer)
        others, other = copy.deepcopy(both) if method == "copy" else pickle.loads(pickle.dumps(both))
    expected = take(optimizer, params, range(3, 6))
    assert all(map(torch.equal, take(other, others, range(3, 6)), expected))
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(
            v.dtype == torch.float32 and torch.equal(v, other.state[q][n]) for n, v in optimizer.state[p].items()
        )


def test_a_tensor_or_a_number_may_be_written_between_steps_and_groups_added() -> None:
    """Tensors and floats give the same."""
    rate = torch.tensor(0.02, dtype=torch.float64)
    a, b = parameters(), parameters()
    first = optim.Muon([{"params": a[:3]}, {"params": a[5:], "momentum": 0.5}], lr=rate, weight_decay=0.1)
    second = optim.Muon([{"params": b[:3]}, {"params": b[5:], "momentum": 0.5}], lr=0.02, weight_decay=0.1)
    for seed in range(8):
        if seed == 2:
            rate.fill_(0.01)
            schedule = torch.optim.lr_scheduler.LambdaLR(second, lambda t: 0.5)
        if seed == 4:
            for group in (*first.param_groups, *second.param_groups):
                group.update(weight_decay=0.3, coupling=0.5, betas=(0.5, 0.6), nesterov=False)
        if seed == 5:
            first.add_param_group({"params": a[3:5], "lr": 0.04})
            second.add_param_group({"params": iter(b[3:5]), "lr": 0.04})
        if seed == 6:
            first.param_groups = [dict(group) for group in first.param_groups]
            second.load_state_dict(copy.deepcopy(second.state_dict()))
        close(take(first, a, range(seed, seed + 1)), take(second, b, range(seed, seed + 1)), 0.0)
        if seed == 6:
            assert second.param_groups[0]["lr"] == schedule.get_last_lr()[0] == 0.01


def test_missing_gradients_closures_and_a_scaler() -> None:
    params, twins = parameters(), parameters()
    optimizer, other = optim.Muon(params, lr=0.02), optim.Muon(twins, lr=0.02)
    optimizer.step()
    assert not optimizer.state
    give_gradients(params, 0)
    params[0].grad = params[5].grad = None
    before = params[0].detach().clone()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(params[0], before)
    assert {id(p) for p in optimizer.state} == {id(p) for i, p in enumerate(params) if i not in (0, 5)}
    give_gradients(twins, 0)
    twins[0].grad = twins[5].grad = None
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(torch.ones(()))
    for p in twins:
        p.grad = None if p.grad is None else 16 * p.grad
    scaler.step(other)
    close(twins, params)


def test_autocast_has_no_effect() -> None:
    a, b = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = take(optim.Muon(a, lr=0.02), a, range(3))
    close(take(optim.Muon(b, lr=0.02), b, range(3)), inside, 0.0)


def test_new_numbers_do_not_prepare_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a second step could not be captured in a CUDA graph."""
    params, prepared = parameters(), []
    optimizer = optim.Muon(params)
    take(optimizer, params, range(1))
    real = optimizer._stepper.prepare
    monkeypatch.setattr(optimizer._stepper, "prepare", lambda *args: (prepared.append(1), real(*args)))
    for step in range(1, 4):
        optimizer.param_groups[0].update(lr=0.01 * step, weight_decay=0.1 * step, momentum=0.9, betas=(0.8, 0.9))
        take(optimizer, params, range(step, step + 1))
    assert not prepared
    optimizer.param_groups[0]["maximize"] = True
    take(optimizer, params, range(1))
    assert prepared


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_step_within_compiled_code_is_taken_outside_of_its_graph() -> None:
    torch._dynamo.reset()
    a, b = parameters(), parameters()
    first, second = optim.Muon(a, lr=0.02), optim.Muon(b, lr=0.02)
    step = torch.compile(lambda: second.step(), backend="eager")
    for seed in range(4):
        give_gradients(a, seed)
        give_gradients(b, seed)
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + seed)
        first.step()
        step()
    close(a, b, 0.0)


LAYOUTS: dict[str, Any] = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0] if t.dim() > 1 else t,
}


@pytest.mark.filterwarnings("ignore:plain PyTorch updates some parameters")  # those with gaps
@pytest.mark.parametrize("of_grad", [False, True], ids=["gradient-as-well", "gradient-contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_memory(layout: Any, of_grad: bool) -> None:
    a = parameters()
    b = [nn.Parameter(layout(p.detach().clone())) for p in a]
    first, second = optim.Muon(a, weight_decay=0.3, coupling=0.5), optim.Muon(b, weight_decay=0.3, coupling=0.5)
    for seed in range(3):
        give_gradients(a, seed)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone() if of_grad else layout(p.grad.clone())
        first.step()
        second.step()
    close(a, b)
    for q in b:
        buffer = second.state[q].get("momentum_buffer")
        assert buffer is None or buffer.stride() == torch.empty_like(q).stride()


def test_half_precision_is_rounded_once() -> None:
    exact = parameters(dtype=torch.float32)
    for p in exact:
        p.data = p.data.bfloat16().float()
    half = [nn.Parameter(p.detach().bfloat16()) for p in exact]
    single = [nn.Parameter(p.detach().clone()) for p in exact]
    optimizers = [optim.Muon(ps, lr=0.02, weight_decay=0.1) for ps in (exact, half, single)]
    for seed in range(3):
        give_gradients(exact, seed)
        for p, q, r in zip(exact, half, single, strict=True):
            p.grad = p.grad.bfloat16().float()
            q.grad = p.grad.bfloat16()
            r.grad_dtype = None
            r.grad = q.grad.clone()
            p.data = q.data.float()
            r.data = q.data.float()
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(p, r) for p, r in zip(exact, single, strict=True))
        assert all(torch.equal(p.bfloat16(), q) for p, q in zip(exact, half, strict=True))
    assert all(v.dtype == torch.float32 for q in half for v in optimizers[1].state[q].values())


def test_zero_gradients_change_no_weight() -> None:
    params = parameters(dtype=torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = optim.Muon(params, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    close(params, before, 0.0)
