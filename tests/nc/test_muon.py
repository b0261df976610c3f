"""Muon: its rule by singular values, torch.optim.Muon, the law of the row sum, stacked runs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon as torch_muon

from muon_cases import close, give_gradients, parameters, take
from ncollapse import optim, ufm
from ncollapse.optim.muon import newton_schulz


def direction(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz applied to the singular values."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adjust_lr_fn": "original", "nesterov": False},
        {"weight_decay": 0.3, "coupling": 1.0},
        {"weight_decay": 0.3, "coupling": 0.4, "momentum": 0.0},
        {"weight_decay": 0.3, "coupling": 0.4, "nesterov": False, "maximize": True, "ns_steps": 3},
    ],
    ids=["default", "original", "coupled", "half", "maximize"],
)
def test_matrices_follow_the_rule_and_the_rest_is_adams(settings: dict[str, Any]) -> None:
    params, twins = parameters(), parameters()
    s = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "coupling": 0.0, "nesterov": True} | settings
    ours = optim.Muon(params, betas=(0.8, 0.9), eps=1e-6, **s)
    shared = {name: s[name] for name in ("lr", "weight_decay", "coupling")}
    adam = optim.Adam(
        [p for p in twins if p.dim() < 2], betas=(0.8, 0.9), eps=1e-6, maximize=s.get("maximize", False), **shared
    )
    buffers = [torch.zeros_like(p) for p in twins]
    for seed in range(6):
        take(ours, params, range(seed, seed + 1))
        give_gradients(twins, seed)
        adam.step()
        for w, v in zip(twins, buffers, strict=True):
            if w.dim() < 2:
                continue
            g = (-w.grad if s.get("maximize") else w.grad) + s["coupling"] * s["weight_decay"] * w.detach()
            v.copy_(s["momentum"] * v + (1 - s["momentum"]) * g)
            d = (1 - s["momentum"]) * g + s["momentum"] * v if s["nesterov"] else v
            rows, columns = w.shape[0], w[0].numel()
            scale = max(1, rows / columns) ** 0.5 if "adjust_lr_fn" in s else 0.2 * max(rows, columns) ** 0.5
            d = direction(d.reshape(rows, columns), s.get("ns_steps", 5)).view(w.shape)
            kept = 1 - s["lr"] * (1 - s["coupling"]) * s["weight_decay"]
            w.data = kept * w.data - s["lr"] * scale * d
    close(params, twins)
    for p, w, v in zip(params, twins, buffers, strict=True):
        expected = {"momentum_buffer": v} if p.dim() > 1 else adam.state[w]
        assert ours.state[p].keys() == expected.keys()
        close(list(ours.state[p].values()), [expected[name] for name in ours.state[p]])


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original", None])
def test_as_torch_in_float64_and_in_its_bfloat16(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.8, "adjust_lr_fn": scale}
    shapes = [(4, 7), (7, 4), (6, 6)]
    params, twins = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    ours = take(optim.Muon(params, **settings), params, range(5))
    # bfloat16 keeps three digits of directions of size 1, over five steps of 0.02.
    close(ours, take(torch.optim.Muon(twins, **settings), twins, range(5)), 5 * 0.02 * 1.3e-2)
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", lambda g, *_: direction(g))
    params, twins = parameters(shapes), parameters(shapes)
    first, second = optim.Muon(params, **settings), torch.optim.Muon(twins, **settings)
    close(take(first, params, range(5)), take(second, twins, range(5)))
    # State dicts load in both directions, settings included.
    for source, target in ((first, torch.optim.Muon), (second, optim.Muon)):
        start = params if source is first else twins
        copies = [nn.Parameter(p.detach().clone()) for p in start]
        other = target(copies)
        other.load_state_dict(copy.deepcopy(source.state_dict()))
        close(take(other, copies, range(5, 8)), take(source, start, range(5, 8)))


def test_newton_schulz_brings_singular_values_near_one() -> None:
    u, v = (torch.linalg.qr(torch.randn(9, n, 6, dtype=torch.float64))[0] for n in (8, 11))
    x = 7 * u * torch.logspace(-2.4, 0, 6, dtype=torch.float64) @ v.mT
    for matrices in (x, x.mT, x.float()):
        d = newton_schulz(matrices)
        values = torch.linalg.svdvals(d.double())[:, :6]
        assert values.min() > 0.68
        assert values.max() < 1.21
        close(d.double(), torch.stack([direction(m) for m in matrices]), 1e-4 if d.dtype == torch.float32 else 1e-11)
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    assert newton_schulz(torch.full((1, 3, 4), torch.nan)).isnan().all()
    assert newton_schulz(torch.zeros(2, 0, 4)).shape == (2, 0, 4)


def row_sums(
    make: Any, dtype: torch.dtype = torch.float64, steps: int = 400, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """The row sums of a softmax classifier with a bias, before and after every step, and the last loss."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % 5
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64) / 2
    x = (x + 4 * torch.randn(5, 8, generator=generator, dtype=torch.float64)[y]).to(dtype)
    weight = nn.Parameter(torch.randn(5, 8, generator=generator, dtype=torch.float64).to(dtype) / 3)
    bias = nn.Parameter(torch.zeros(5, dtype=dtype))
    optimizer, seen = make([weight, bias]), [weight.detach().double().sum(0)]
    for step in range(steps):
        batch = torch.arange(step % 2, 64, 2)
        logits = x[batch] @ weight.T + bias
        gradient = logits.detach().softmax(1)
        label = y[batch].unsqueeze(1)
        if exact:  # the label's entry is minus the sum of the others
            gradient.scatter_(1, label, 0).scatter_(1, label, -gradient.sum(1, keepdim=True))
        else:
            gradient.scatter_add_(1, label, -torch.ones_like(gradient[:, :1]))
        optimizer.zero_grad()
        logits.backward(gradient / len(batch))
        optimizer.step()
        seen.append(weight.detach().double().sum(0))
    return torch.stack(seen), nn.functional.cross_entropy(logits, y[batch]).detach()


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("exact", [True, False], ids=["summed", "one-hot"])
def test_the_row_sum_shrinks_as_under_sgdw(momentum: float, exact: bool) -> None:
    sums, _ = row_sums(lambda p: optim.Muon(p, lr=0.01, momentum=momentum, weight_decay=0.5), exact=exact)
    factor = torch.from_numpy(ufm.row_sum_factor([0.01] * 400, weight_decay=0.5, coupling=0))
    assert factor[-1] < 0.2
    close(sums, factor[:, None] * sums[0], 1e-10)


def test_the_law_needs_decoupled_decay_exact_products_and_a_gradient_that_sums_to_zero() -> None:
    settings = {"lr": 0.02, "weight_decay": 0.01}
    factor = torch.from_numpy(ufm.row_sum_factor([0.02] * 400, weight_decay=0.01, coupling=0))

    def off(make: Any, dtype: torch.dtype = torch.float64, exact: bool = True) -> tuple[float, float]:
        sums, loss = row_sums(make, dtype, exact=exact)
        return float((sums - factor[:, None] * sums[0]).norm(dim=1).max() / sums[0].norm()), float(loss)

    assert off(lambda p: optim.Muon(p, **settings))[0] < 1e-8
    assert off(lambda p: optim.Muon(p, **settings, coupling=1.0))[0] > 0.1
    assert off(lambda p: optim.AdamW(p, **settings))[0] > 0.1
    in_bfloat16 = {"adjust_lr_fn": "match_rms_adamw", **settings}
    assert off(lambda p: torch.optim.Muon(p[:1], **in_bfloat16), torch.float32)[0] > 1e-2
    assert off(lambda p: optim.Muon(p, **settings), torch.float32)[0] < 1e-4
    # By now p − 1 of the label has cancelled.
    distance, loss = off(lambda p: optim.Muon(p, **settings), torch.float32, exact=False)
    assert loss < 1e-5
    assert distance > 1e-2


def stack_of(runs: int, dtype: torch.dtype, **settings: Any) -> tuple[Any, optim.Muon, list[tuple[Any, optim.Muon]]]:
    """A stack whose runs differ in every hyperparameter, and each run by itself, with the same gradients."""
    numbers = {
        "lr": torch.linspace(0.01, 0.03, runs, dtype=torch.float64),
        "momentum": torch.linspace(0.0, 0.95, runs, dtype=torch.float64),
        "eps": torch.linspace(1e-8, 1e-3, runs, dtype=torch.float64),
        "weight_decay": torch.linspace(0.0, 0.4, runs, dtype=torch.float64),
        "coupling": torch.linspace(1.0, 0.0, runs, dtype=torch.float64),
    }
    betas = torch.linspace(0.8, 0.9, runs, dtype=torch.float64), 0.99
    stack = parameters(dtype=dtype, runs=(runs,))
    together = optim.Muon(stack, betas=betas, stacked=True, **numbers, **settings)
    alone = []
    for r in range(runs):
        params = [nn.Parameter(p[r].detach().clone()) for p in stack]
        floats = {name: value[r].item() for name, value in numbers.items()}
        alone.append((params, optim.Muon(params, betas=(betas[0][r].item(), 0.99), **floats, **settings)))
    return stack, together, alone


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "adjust_lr_fn": "original"}], ids=["default", "other"])
def test_stacked_runs_are_runs_alone(dtype: torch.dtype, tolerance: float, settings: dict[str, Any]) -> None:
    stack, together, alone = stack_of(4, dtype, **settings)
    lr = together.param_groups[0]["lr"]
    seen = together.observe(norms=True, head=stack[0], bf16=True)
    watched = [optimizer.observe(head=params[0]) for params, optimizer in alone]
    for seed in range(6):
        if seed == 3:  # as a schedule does it, in place
            lr.mul_(0.1)
        give_gradients(stack, seed)
        if seed == 4:
            stack[0].grad[1, 0, 0] = torch.nan
        before, weights = ([t.detach().clone() for t in ts] for ts in ([p.grad for p in stack], stack))
        together.step()
        close([p.grad for p in stack], before, 0.0)
        for r, (params, optimizer) in enumerate(alone):
            optimizer.param_groups[0]["lr"] = lr[r].item()
            for p, q in zip(stack, params, strict=True):
                q.grad = p.grad[r].clone()
            optimizer.step()
            for p, q in zip(stack, params, strict=True):
                close(p[r], q, tolerance)
            changes = [p[r].detach() - w[r] for p, w in zip(stack, weights, strict=True)]
            for norm, tensors in ((seen.grad_norm[r], [g[r] for g in before]), (seen.update_norm[r], changes)):
                close(norm, torch.cat([t.double().flatten() for t in tensors]).norm(), 10 * tolerance)
            close(seen.nc0[r], stack[0][r].detach().double().sum(0).square().sum())
            close(watched[r].nc0, params[0].detach().double().sum(0).square().sum())
    assert stack[0][1].isnan().all()
    assert not stack[0][[0, 2, 3]].isnan().any()
    assert not any(p[1].isnan().any() for p in stack[1:])
    assert all(torch.equal(seen.weights[p].nan_to_num(7), p.detach().bfloat16().nan_to_num(7)) for p in stack)


def test_what_the_training_loop_relies_on() -> None:
    stack, together, _ = stack_of(4, torch.float64)
    lr = together.param_groups[0]["lr"]
    take(together, stack, range(3))
    assert together.param_groups[0]["lr"] is lr
    state = together.state_dict()["state"]
    assert {name for each in state.values() for name in each} == set(together.state_names)
    assert "step" in together.state_names
    for i, p in enumerate(stack):
        assert all(v.shape == (() if name == "step" else p.shape) for name, v in state[i].items())
    # Without the runs that have ended, the others train as before.
    keep = torch.tensor([0, 2, 3])
    fewer = [nn.Parameter(p.detach()[keep].clone()) for p in stack]
    numbers = {n: v[keep] for n, v in together.param_groups[0].items() if isinstance(v, Tensor)}
    betas = together.param_groups[0]["betas"]
    smaller = optim.Muon(fewer, **numbers, betas=(betas[0][keep], betas[1]), stacked=True)
    kept = {i: {n: v[keep] if v.dim() else v for n, v in each.items()} for i, each in state.items()}
    smaller.load_state_dict({"state": kept, "param_groups": smaller.state_dict()["param_groups"]})
    for seed in range(3, 6):
        give_gradients(stack, seed)
        for p, q in zip(stack, fewer, strict=True):
            q.grad = p.grad[keep]
        together.step()
        smaller.step()
    close([p.detach()[keep] for p in stack], fewer, 1e-12)
