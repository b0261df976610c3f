"""Muon: its rule by singular values, torch.optim.Muon, the law of the row sum, stacked runs, states, refusals."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon as torch_muon

from nc import optim, ufm
from nc.optim.muon import newton_schulz

# Wide, tall, a row, a column, a convolution; a bias and a number.
SHAPES = [(4, 7), (7, 4), (1, 6), (6, 1), (5, 3, 2, 2), (5,), ()]
MATRICES = [shape for shape in SHAPES if len(shape) > 1]


def direction(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz by what it does to singular values."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


def parameters(shapes: Any = SHAPES, dtype: torch.dtype = torch.float64, runs: tuple[int, ...] = ()) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn((*runs, *shape), generator=generator, dtype=dtype)) for shape in shapes]


def give_gradients(params: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for p in params:
        # Of the seed and the weights, which a difference would make grow.
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) + 0.1 * p.detach().sin()


def take(optimizer: torch.optim.Optimizer, params: Any, steps: range) -> list[Tensor]:
    for seed in steps:
        give_gradients(params, seed)
        optimizer.step()
    return [p.detach().clone() for p in params]


def close(ours: Any, theirs: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


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
    # bfloat16 keeps three digits, of directions of size 1, in five steps of 0.02.
    close(ours, take(torch.optim.Muon(twins, **settings), twins, range(5)), 5 * 0.02 * 1.3e-2)
    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", lambda g, *_: direction(g))
    params, twins = parameters(shapes), parameters(shapes)
    first, second = optim.Muon(params, **settings), torch.optim.Muon(twins, **settings)
    close(take(first, params, range(5)), take(second, twins, range(5)))
    # State dicts go both ways, settings included.
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
        slope = logits.detach().softmax(1)
        label = y[batch].unsqueeze(1)
        if exact:  # the label's entry is minus the sum of the others
            slope.scatter_(1, label, 0).scatter_(1, label, -slope.sum(1, keepdim=True))
        else:
            slope.scatter_add_(1, label, -torch.ones_like(slope[:, :1]))
        optimizer.zero_grad()
        logits.backward(slope / len(batch))
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
    # p − 1 of the label has lost its digits by now.
    distance, loss = off(lambda p: optim.Muon(p, **settings), torch.float32, exact=False)
    assert loss < 1e-5
    assert distance > 1e-2


def stack_of(runs: int, dtype: torch.dtype, **settings: Any) -> tuple[Any, optim.Muon, list[tuple[Any, optim.Muon]]]:
    """A stack whose runs differ in every number, and each run by itself, with the same gradients."""
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
        own = [nn.Parameter(p[r].detach().clone()) for p in stack]
        floats = {name: value[r].item() for name, value in numbers.items()}
        alone.append((own, optim.Muon(own, betas=(betas[0][r].item(), 0.99), **floats, **settings)))
    return stack, together, alone


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("settings", [{}, {"nesterov": False, "adjust_lr_fn": "original"}], ids=["default", "other"])
def test_stacked_runs_are_runs_alone(dtype: torch.dtype, tolerance: float, settings: dict[str, Any]) -> None:
    stack, together, alone = stack_of(4, dtype, **settings)
    lr = together.param_groups[0]["lr"]
    seen = together.observe(norms=True, head=stack[0], bf16=True)
    watched = [optimizer.observe(head=own[0]) for own, optimizer in alone]
    for seed in range(6):
        if seed == 3:  # as a schedule does it, in place
            lr.mul_(0.1)
        give_gradients(stack, seed)
        if seed == 4:
            stack[0].grad[1, 0, 0] = torch.nan
        before, weights = ([t.detach().clone() for t in ts] for ts in ([p.grad for p in stack], stack))
        together.step()
        close([p.grad for p in stack], before, 0.0)
        for r, (own, optimizer) in enumerate(alone):
            optimizer.param_groups[0]["lr"] = lr[r].item()
            for p, q in zip(stack, own, strict=True):
                q.grad = p.grad[r].clone()
            optimizer.step()
            for p, q in zip(stack, own, strict=True):
                close(p[r], q, tolerance)
            changes = [p[r].detach() - w[r] for p, w in zip(stack, weights, strict=True)]
            for norm, tensors in ((seen.grad_norm[r], [g[r] for g in before]), (seen.update_norm[r], changes)):
                close(norm, torch.cat([t.double().flatten() for t in tensors]).norm(), 10 * tolerance)
            close(seen.nc0[r], stack[0][r].detach().double().sum(0).square().sum())
            close(watched[r].nc0, own[0].detach().double().sum(0).square().sum())
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
    assert {name for each in state.values() for name in each} == {*together.names, "step"}
    assert together.counts
    for i, p in enumerate(stack):
        assert all(v.shape == (() if name == "step" else p.shape) for name, v in state[i].items())
    # Runs that have ended are taken out: the rest goes on as it would have.
    keep = torch.tensor([0, 2, 3])
    fewer = [nn.Parameter(p.detach()[keep].clone()) for p in stack]
    numbers = {n: v[keep] for n, v in together.param_groups[0].items() if isinstance(v, Tensor)}
    betas = together.param_groups[0]["betas"]
    smaller = optim.Muon(fewer, **numbers, betas=(betas[0][keep], betas[1]), stacked=True)
    kept = {i: {n: v[keep] if v.dim() else v for n, v in own.items()} for i, own in state.items()}
    smaller.load_state_dict({"state": kept, "param_groups": smaller.state_dict()["param_groups"]})
    for seed in range(3, 6):
        give_gradients(stack, seed)
        for p, q in zip(stack, fewer, strict=True):
            q.grad = p.grad[keep]
        together.step()
        smaller.step()
    close([p.detach()[keep] for p in stack], fewer, 1e-12)


@pytest.mark.parametrize("how", ["state dict", "copy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_goes_on_bit_for_bit(how: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = optim.Muon(params, lr=0.03, weight_decay=0.2, coupling=0.5, momentum=0.8, nesterov=False)
    take(optimizer, params, range(3))
    if how == "state dict":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = optim.Muon(others, lr=0.5)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        both = (params, optimizer)
        others, other = copy.deepcopy(both) if how == "copy" else pickle.loads(pickle.dumps(both))
    expected = take(optimizer, params, range(3, 6))
    assert all(map(torch.equal, take(other, others, range(3, 6)), expected))
    for p, q in zip(params, others, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(
            v.dtype == torch.float32 and torch.equal(v, other.state[q][n]) for n, v in optimizer.state[p].items()
        )


def test_a_tensor_or_a_number_may_be_written_between_steps_and_groups_added() -> None:
    """By tensors and by floats alike; and states are loaded into the tensors that there are."""
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
    buffer = second.state[b[0]]["momentum_buffer"]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[b[0]]["momentum_buffer"] is buffer


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


def test_autocast_has_no_say_in_it() -> None:
    a, b = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = take(optim.Muon(a, lr=0.02), a, range(3))
    close(take(optim.Muon(b, lr=0.02), b, range(3)), inside, 0.0)


def test_nothing_is_worked_out_again_for_new_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a second step could not be captured in a CUDA graph."""
    params, prepared = parameters(), []
    optimizer = optim.Muon(params)
    take(optimizer, params, range(1))
    real = optimizer._plan.prepare
    monkeypatch.setattr(optimizer._plan, "prepare", lambda *args: (prepared.append(1), real(*args)))
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


@pytest.mark.filterwarnings("ignore:plain PyTorch updates some parameters")  # Adam's kernel has no such vectors
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


def test_bad_input_is_refused_before_anything_changed() -> None:
    w = nn.Parameter(torch.ones(3, 2))
    vector = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    for kwargs, message in (
        ({"lr": -1.0}, "Muon: lr must be"),
        ({"momentum": 1.0}, r"Muon: momentum must be a number, or one per stacked run, in \[0, 1\)"),
        ({"weight_decay": float("nan")}, "Muon: weight_decay must be"),
        ({"coupling": 1.5}, "Muon: coupling must be"),
        ({"betas": (0.9, 1.0)}, "Muon: betas must be"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn must be one of match_rms_adamw, original; got 'spectral'"),
        ({"ns_steps": 0}, r"ns_steps must be an integer in \[1, 100\); got 0"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
        ({"lr": vector}, "lr has a value for each of 3 stacked runs; say stacked=True"),
        ({"betas": (0.9, vector)}, "beta2 has a value for each of 3 stacked runs"),
        ({"stacked": True, "eps": vector[:2]}, "eps has a value for each of 2 stacked runs, but a parameter has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.Muon([w], **kwargs)
    for others in ((2, 3), ()):
        with pytest.raises(ValueError, match=r"stacked parameters are \[R, …\] of one R; their first dimensions are"):
            optim.Muon([w, nn.Parameter(torch.ones(others))], stacked=True)
    with pytest.raises(TypeError, match="complex"):
        optim.Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    shard = nn.Parameter(torch.ones(3, 2))
    shard.to_local = lambda: shard  # as a DTensor has it
    with pytest.raises(TypeError, match="whole matrices; got a DTensor"):
        optim.Muon([shard])
    optimizer = optim.Muon([w], stacked=True)
    for group, message in (
        ({"params": [nn.Parameter(torch.ones(2, 2))]}, "first dimensions"),
        ({"params": [nn.Parameter(torch.ones(3, 2))], "stacked": False}, "same for all param groups"),
        ({"params": [nn.Parameter(torch.ones(3, 2))], "nesterov": False, "momentum": 2.0}, "momentum must be"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    params = parameters([(3, 2), (5, 2)])
    optimizer = optim.Muon(params)
    before = take(optimizer, params, range(1))
    params[1].grad = torch.ones(5, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="Muon does not take sparse gradients"):
        optimizer.step()
    close([p.detach() for p in params], before, 0.0)


def test_a_state_that_does_not_fit_is_refused_before_anything_changed() -> None:
    params = parameters()
    optimizer = optim.Muon(params, lr=0.02)
    take(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    shape, number, stacked = (copy.deepcopy(before) for _ in range(3))
    shape["state"][0]["momentum_buffer"] = torch.ones(7, 4)
    number["param_groups"][0]["momentum"] = 1.0
    stacked["param_groups"][0]["stacked"] = True
    adam = optim.Adam(parameters())
    take(adam, adam.param_groups[0]["params"], range(1))
    for state, message in (
        (shape, r"other parameters: \{'momentum_buffer': \(7, 4\)\}, not \{'momentum_buffer': \(4, 7\)\}"),
        (number, "momentum must be"),
        (stacked, "stacked must be the same"),
        (adam.state_dict(), "another optimizer or other parameters: {'exp_avg'"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(optim.Muon(params[:2]).state_dict())
    optimizer.state[params[0]]["momentum_buffer"] = torch.ones(4, 7, device="meta")
    with pytest.raises(RuntimeError, match="a parameter is on cpu, its momentum_buffer on meta"):
        optimizer.step()
