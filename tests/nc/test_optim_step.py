"""Steps: one launch, when tables are prepared again, stacked runs, observed quantities."""

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse import optim
from ncollapse.kernels import operators

CLASSES = [optim.SGD, optim.SGDW, optim.Signum, optim.SignumW, optim.Adam, optim.AdamW, optim.Lion]


def parameters(count: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(3 + i, 2, generator=generator).to(dtype)) for i in range(count)]
    give_gradients(params, seed)
    return params


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 100)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def take(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> Tensor:
    for seed in steps:
        give_gradients(params, seed)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize(
    ("ours", "theirs", "kwargs"),
    [
        (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        (optim.Adam, torch.optim.Adam, {"weight_decay": 0.01}),
        (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_a_thousand_steps_stay_with_torch(ours: Any, theirs: Any, kwargs: dict[str, Any]) -> None:
    """Gradients depend on the weights, so that errors grow. A float64 run of torch gives the tolerance for float32."""
    ends = []
    for cls, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(20, 10, generator=generator, dtype=torch.float64).to(dtype))
        x = torch.randn(50, 20, generator=generator, dtype=torch.float64).to(dtype)
        optimizer = cls([w], lr=0.01, **kwargs)
        for _ in range(1000):
            w.grad = x.T @ (torch.tanh(x @ w) - 0.3) / 50
            optimizer.step()
        ends.append(w.detach().double())
    exact = ends[2]
    bound = 4 * (ends[1] - exact).abs().max() + 1e-6
    assert (ends[0] - exact).abs().max() <= bound


@pytest.mark.compiled  # only kernels count as launches
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_one_launch_whatever_the_number_of_groups(cls: Any) -> None:
    params = parameters(300)
    together = cls([{"params": [p], "lr": 0.001 * i, "weight_decay": 0.01 * (i % 3)} for i, p in enumerate(params)])
    take(together, params, range(3))
    assert together._stepper._update.launches == 1
    again = parameters(300)
    for i, p in enumerate(again):  # one optimizer for each
        take(cls([p], lr=0.001 * i, weight_decay=0.01 * (i % 3)), [p], range(0))
    separate = [cls([p], lr=0.001 * i, weight_decay=0.01 * (i % 3)) for i, p in enumerate(again)]
    for seed in range(3):
        give_gradients(again, seed)
        for optimizer in separate:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.compiled
def test_a_launch_for_each_dtype() -> None:
    params = parameters(2) + parameters(2, torch.bfloat16) + parameters(1, torch.float64)
    optimizer = optim.AdamW(params)
    optimizer.step()
    assert optimizer._stepper._update.launches == 3
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32] * 4 + [torch.float64]


def test_new_numbers_do_not_prepare_again(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = optim.Adam(params, lr=0.1)
    take(optimizer, params, range(2))
    prepared: list[int] = []
    real = optimizer._stepper.prepare
    monkeypatch.setattr(optimizer._stepper, "prepare", lambda *args: (prepared.append(1), real(*args)))
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[0].update(weight_decay=0.01 * step, betas=(0.8, 0.99))
        take(optimizer, params, range(step, step + 1))
    assert not prepared
    optimizer.param_groups[0]["maximize"] = True
    take(optimizer, params, range(1))
    assert prepared


@pytest.mark.filterwarnings("ignore:plain PyTorch updates")  # of the gradient in another layout
def test_whatever_is_exchanged_is_seen() -> None:
    """Replaced gradients, parameter data and states, and missing gradients: as in torch.optim."""

    def run(cls: Any) -> list[Tensor]:
        params = parameters()
        optimizer = cls(params, lr=0.1, weight_decay=0.1)
        take(optimizer, params, range(2))
        params[0].data = params[0].data.clone() * 2
        take(optimizer, params, range(2, 3))
        optimizer.state[params[1]]["exp_avg"] = torch.ones_like(params[1])
        take(optimizer, params, range(3, 4))
        params[2].grad = None
        optimizer.step()
        optimizer.state[params[3]] = {key: value.clone() for key, value in optimizer.state[params[3]].items()}
        optimizer.state[params[3]]["exp_avg_sq"].fill_(3.0)
        take(optimizer, params, range(4, 5))
        optimizer.state.clear()
        take(optimizer, params, range(5, 7))
        optimizer.param_groups[0]["params"].pop()
        take(optimizer, params, range(7, 8))
        params[0].grad = params[0].grad.T.contiguous().T
        optimizer.step()
        return [p.detach() for p in params]

    for ours, theirs in zip(run(optim.Adam), run(torch.optim.Adam), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_copies_and_pickles_go_on_by_themselves(cls: Any) -> None:
    params = parameters()
    optimizer = cls(params, lr=0.1, weight_decay=0.1)
    take(optimizer, params, range(3))
    both = {"params": params, "optimizer": optimizer}
    others = [copy.deepcopy(both), pickle.loads(pickle.dumps(both))]
    expected = take(optimizer, params, range(3, 6))
    for other in others:
        assert torch.equal(take(other["optimizer"], other["params"], range(3, 6)), expected)


def test_a_tensor_as_learning_rate_is_read_at_every_step() -> None:
    params, twins = parameters(), parameters()
    rate = torch.tensor(0.1)
    ours, theirs = optim.SGD(params, lr=rate), torch.optim.SGD(twins, lr=0.1)
    for step in range(4):
        rate.fill_(0.1 / (step + 1))
        theirs.param_groups[0]["lr"] = float(rate)
        take(ours, params, range(step, step + 1))
        take(theirs, twins, range(step, step + 1))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(params, twins, strict=True))


def test_strided_parameters_go_to_the_reference_and_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    rows = nn.Parameter(torch.ones(8, 6)[::2])
    plain = nn.Parameter(torch.ones(4, 6))
    for p in (rows, plain):
        p.grad = torch.full(p.shape, 0.5)
    optimizer = optim.AdamW([rows, plain], lr=0.1)
    seen = optimizer.observe(norms=True, head=rows)
    with pytest.warns(UserWarning, match="plain PyTorch updates some parameters, slowly"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(rows, plain)
    assert seen.grad_norm.item() == pytest.approx(0.5 * 48**0.5)
    assert torch.equal(seen.row_sum, rows.detach().double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_tells_norms_nc0_and_bf16_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)
    params = list(model.parameters())
    optimizer = optim.SGDW(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    seen = optimizer.observe(head=model[1].weight, norms=True, bf16=True)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        model(torch.ones(2, 6, dtype=dtype)).square().sum().backward()
        optimizer.step()
        grads = torch.stack([p.grad.double().norm() for p in params]).norm()
        changes = torch.stack([(p.double() - b.double()).norm() for p, b in zip(params, before, strict=True)]).norm()
        assert seen.grad_norm.item() == pytest.approx(grads.item(), rel=1e-6)
        assert seen.update_norm.item() == pytest.approx(changes.item(), rel=1e-5 if dtype == torch.float32 else 0.05)
        assert seen.nc0.item() == pytest.approx(model[1].weight.double().sum(0).square().sum().item(), rel=1e-12)
        assert all(torch.equal(seen.weights[p], p.detach().bfloat16()) for p in params)
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="not among the optimizer's parameters"):
        optimizer.observe(head=nn.Parameter(torch.ones(3, 5)))
    with pytest.raises(RuntimeError, match="call observe"):
        _ = optimizer.observe(norms=True).nc0


ALONE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "sgdw": (optim.SGDW, {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.2}),
    "signum": (optim.Signum, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "signumw": (optim.SignumW, {"lr": 0.02, "momentum": 0.0, "weight_decay": 0.3}),
    "adam": (optim.Adam, {"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "adamw": (optim.AdamW, {"lr": 0.04, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    "lion": (optim.Lion, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}),
}


@pytest.mark.compiled
def test_stacked_runs_with_a_rule_each_are_the_classes_alone() -> None:
    rules = list(ALONE)
    params = [torch.randn(7, 3), torch.randn(5)]
    stack = [nn.Parameter(p.repeat(len(rules), *[1] * p.dim())) for p in params]

    def vector(name: str, default: float = 0.0) -> Tensor:
        return torch.tensor([ALONE[r][1].get(name, default) for r in rules], dtype=torch.float64)

    pairs = [ALONE[r][1].get("betas", (0.9, 0.999)) for r in rules]
    together = optim.Stacked(
        stack,
        rules,
        lr=vector("lr"),
        momentum=vector("momentum"),
        betas=tuple(torch.tensor([b[i] for b in pairs], dtype=torch.float64) for i in range(2)),
        weight_decay=vector("weight_decay"),
    )
    seen = together.observe(norms=True, head=stack[0])
    single = [[nn.Parameter(p.clone()) for p in params] for _ in rules]
    alone = [ALONE[r][0](ps, **ALONE[r][1]) for r, ps in zip(rules, single, strict=True)]
    watched = [o.observe(norms=True, head=ps[0]) for o, ps in zip(alone, single, strict=True)]
    for step in range(6):
        for i, p in enumerate(stack):
            p.grad = torch.randn(p.shape)
            p.grad[3] = float("nan") if step == 3 else p.grad[3]  # a neighbour that diverges
            for r, ps in enumerate(single):
                ps[i].grad = p.grad[r].clone()
        together.step()
        for optimizer in alone:
            optimizer.step()
        assert together._stepper._update.launches == 1
        for r, ps in enumerate(single):
            for p, q in zip(stack, ps, strict=True):
                assert torch.equal(p[r].nan_to_num(7), q.nan_to_num(7)), rules[r]
            torch.testing.assert_close(seen.nc0[r], watched[r].nc0, rtol=1e-12, atol=0, equal_nan=True)
            torch.testing.assert_close(seen.update_norm[r], watched[r].update_norm, rtol=1e-12, atol=0, equal_nan=True)
    assert stack[0][3].isnan().any()
    stack_again, copied = copy.deepcopy((stack, together))
    for p, q in zip(stack, stack_again, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(p)
    together.step()
    copied.step()
    assert all(torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(stack, stack_again, strict=True))
    with pytest.raises(ValueError, match="unknown optimizer 'sgg'; there are adam"):
        optim.Stacked(stack, ["sgd", "sgg"])
    with pytest.raises(ValueError, match="2 stacked runs"):
        optim.Stacked(stack, ["sgd", "adam"])


SHARDED = """
import os, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from ncollapse import optim

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
sharded, plain = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
plain.load_state_dict(sharded.state_dict())
fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
pair = [(m, optim.AdamW(m.parameters(), lr=0.1)) for m in (sharded, plain)]
for _ in range(3):
    x = torch.randn(2, 4)
    for model, optimizer in pair:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
assert type(next(sharded.parameters())).__name__ == "DTensor"
assert all(torch.equal(a.full_tensor(), b) for a, b in zip(sharded.parameters(), plain.parameters()))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_fully_sharded_parameters_are_updated_shard_by_shard() -> None:
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
