"""torch.compile over steps: the same bits, and no new graph for new numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ncollapse import optim
from small_network import network

# Raised by torch: a schedule does not notice that a compiled step has run.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "SGD-momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGDW": (optim.SGDW, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "Signum": (optim.Signum, {"lr": 0.01, "weight_decay": 0.1}),
    "SignumW": (optim.SignumW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam": (optim.Adam, {"lr": 0.1, "weight_decay": 0.1, "coupling": 0.5}),
    "AdamW": (optim.AdamW, {"lr": 0.1}),
    "Lion": (optim.Lion, {"lr": 0.01, "weight_decay": 0.1}),
}


def stacked(runs: int) -> nn.Module:
    """The network with parameters of `runs` stacked runs; it only holds them and cannot be called."""
    model = network()
    for p in model.parameters():
        p.data = p.data.repeat(runs, *[1] * p.dim())
    return model


def compiled(optimizer: Any, backend: str = "aot_eager") -> tuple[Callable[[], None], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(optimizer.step, fullgraph=True, backend=counter), counter


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def both(a: nn.Module, b: nn.Module, first: Any, second: Any, steps: range) -> None:
    for seed in steps:
        for model, step in ((a, first), (b, second)):
            give_gradients(model, seed)
            step()


@pytest.mark.parametrize(("cls", "kwargs"), CASES.values(), ids=CASES)
def test_same_bits_and_one_graph_whatever_the_numbers(cls: Any, kwargs: dict[str, Any]) -> None:
    a, b = network(), network()
    pair = [cls(m.parameters(), **kwargs) for m in (a, b)]
    step, counter = compiled(pair[1])  # before the schedule, which wraps the step in code that Dynamo does not trace
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in pair]
    for seed in range(8):
        both(a, b, pair[0].step, step, range(seed, seed + 1))
        for optimizer, schedule in zip(pair, schedules, strict=True):
            schedule.step()
            group = optimizer.param_groups[0]
            group["weight_decay"], group["coupling"] = 0.01 * seed, 0.1 * seed
            if "betas" in group:
                group["betas"] = (0.9 - 0.01 * seed, 0.99)
            elif group["momentum"]:
                group.update(momentum=0.9 - 0.1 * seed / 8)
    assert same(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW], ids=lambda c: c.__name__)
def test_a_learning_rate_in_a_tensor_is_changed_in_place(cls: Any) -> None:
    a, b = network(), network()
    pair = [cls(m.parameters(), lr=torch.tensor(0.1), weight_decay=0.1) for m in (a, b)]
    step, counter = compiled(pair[1])
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in pair]
    for seed in range(6):
        both(a, b, pair[0].step, step, range(seed, seed + 1))
        for schedule in schedules:
            schedule.step()
    assert same(a, b)
    assert counter.frame_count == 1


def test_stacked_runs() -> None:
    rules = ["sgd", "adamw", "signum", "lion"]
    lr = torch.tensor([0.1, 0.01, 0.01, 0.01], dtype=torch.float64)
    a, b = stacked(len(rules)), stacked(len(rules))
    first, second = (optim.Stacked(m.parameters(), rules, lr=lr, momentum=0.9) for m in (a, b))
    step, counter = compiled(second)
    for seed in range(4):
        both(a, b, first.step, step, range(seed, seed + 1))
        lr.mul_(0.5)
    assert same(a, b)
    assert counter.frame_count == 1


def test_a_first_step_with_dampening_is_a_separate_graph() -> None:
    a, b = network(), network()
    first, second = (optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.3) for m in (a, b))
    step, counter = compiled(second)
    both(a, b, first.step, step, range(5))
    assert same(a, b)
    assert counter.frame_count == 2


def test_structural_changes_are_traced_again() -> None:
    a, b = network(), network()
    first, second = (optim.SGD(m[0].parameters(), lr=0.1) for m in (a, b))
    step, counter = compiled(second)
    both(a, b, first.step, step, range(2))
    for optimizer, model in ((first, a), (second, b)):
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
    both(a, b, first.step, step, range(2, 4))
    for optimizer in (first, second):
        optimizer.param_groups[0]["momentum"] = 0.9
    both(a, b, first.step, step, range(4, 7))
    for optimizer in (first, second):
        optimizer.param_groups[1]["maximize"] = True
    both(a, b, first.step, step, range(7, 9))
    assert same(a, b)
    assert counter.frame_count == 4
    assert torch.equal(second.state[b[0].weight]["momentum_buffer"], first.state[a[0].weight]["momentum_buffer"])


def test_a_loaded_state_goes_on_in_the_same_graph() -> None:
    a, b = network(), network()
    first, second = optim.AdamW(a.parameters(), lr=0.1), optim.AdamW(b.parameters(), lr=0.1)
    step, counter = compiled(second)
    both(a, b, first.step, step, range(3))
    saved = copy.deepcopy((b.state_dict(), second.state_dict()))
    both(a, b, first.step, step, range(3, 5))
    b.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for seed in range(3, 5):
        give_gradients(b, seed)
        step()
    assert same(a, b)
    assert counter.frame_count == 1


def test_parameters_without_gradients_stay() -> None:
    model = network()
    step, counter = compiled(optim.Adam(model.parameters(), lr=0.1))
    give_gradients(model, 0)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    step()
    assert torch.equal(model[0].weight, before)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads the loss's
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # in the inductor of torch 2.11
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.compiled)])
def test_a_whole_training_step(backend: str) -> None:
    """As with torch's classes, `backward` breaks the graph; a schedule must not break it again."""
    a, b = network(), network()
    pair = [optim.AdamW(m.parameters(), lr=0.1) for m in (a, b)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = torch.compile(train, backend=counter)
    graphs = []
    for seed in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        losses = train(a, pair[0], x), run(b, pair[1], x)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        graphs.append(counter.frame_count)
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] = 0.1 / (seed + 2)
    assert graphs[1:] == graphs[1:2] * 4  # in the first call there are no gradients yet
    assert "ncollapse.update" in counter.graphs[-1].code


def test_compiled_and_eager_steps_may_alternate() -> None:
    a, b = network(), network()
    first, second = (optim.AdamW(m.parameters(), lr=0.1) for m in (a, b))
    step, counter = compiled(second)
    for seed in range(6):
        both(a, b, first.step, second.step if seed % 3 == 1 else step, range(seed, seed + 1))
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = 0.1 / (seed + 2)
    assert same(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("kwargs", "key", "value"),
    [
        ({"momentum": 0.9}, "momentum", 0.0),
        ({}, "lr", torch.tensor(0.01)),
        ({"momentum": 0.9}, "nesterov", True),
        ({"weight_decay": torch.tensor(0.1)}, "weight_decay", 0.2),
    ],
    ids=["momentum-off", "lr-to-tensor", "nesterov", "decay-to-float"],
)
def test_other_changes_are_traced_again(kwargs: dict[str, Any], key: str, value: Any) -> None:
    a, b = network(), network()
    first, second = (optim.SGD(m.parameters(), lr=0.1, **kwargs) for m in (a, b))
    step, counter = compiled(second)
    both(a, b, first.step, step, range(3))
    for optimizer in (first, second):
        optimizer.param_groups[0][key] = copy.deepcopy(value)
    both(a, b, first.step, step, range(3, 6))
    assert same(a, b)
    assert counter.frame_count == 2


def test_a_state_of_torch_with_other_numbers_is_loaded_into_the_same_graph() -> None:
    a, b = network(), network()
    theirs = torch.optim.AdamW(a.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
    second = optim.AdamW(b.parameters(), lr=0.1)
    step, counter = compiled(second)
    both(a, b, theirs.step, step, range(3))
    b.load_state_dict(a.state_dict())
    second.load_state_dict(theirs.state_dict())
    both(a, b, theirs.step, step, range(3, 6))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_gradients_that_disappear_and_return() -> None:
    a, b = network(), network()
    first, second = (optim.Adam(m.parameters(), lr=0.1) for m in (a, b))
    step, counter = compiled(second)
    for seed in range(9):
        for model, one in ((a, first.step), (b, step)):
            give_gradients(model, seed)
            if seed % 3 == 1:
                model[0].weight.grad = None
            one()
    assert same(a, b)
    assert counter.frame_count == 2


def test_a_scaler_around_a_compiled_step() -> None:
    a, b = network(), network()
    pair = [optim.AdamW(m.parameters(), lr=0.1) for m in (a, b)]
    pair[1].step, counter = compiled(pair[1])  # type: ignore[method-assign]
    scalers = [torch.amp.GradScaler("cpu", init_scale=16.0) for _ in pair]
    for seed in range(6):
        for model, optimizer, scaler in zip((a, b), pair, scalers, strict=True):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
            scaler.scale(model(x).square().mean()).backward()
            if seed == 2:
                model[0].weight.grad[0, 0] = float("nan")
            scaler.step(optimizer)
            scaler.update()
    assert same(a, b)
    assert pair[1].state[b[0].weight]["step"] == 5
    assert counter.frame_count == 1


def test_optimizers_in_one_compiled_function_stay_separate() -> None:
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(optimizer: Any) -> None:
        optimizer.step()

    models, twins = [network() for _ in range(3)], [network() for _ in range(3)]
    ours, theirs = ([optim.AdamW(m.parameters(), lr=0.1 * i) for i, m in enumerate(ms)] for ms in (models, twins))
    for seed in range(4):
        for model, twin, compiled_one, eager in zip(models, twins, ours, theirs, strict=True):
            give_gradients(model, seed)
            give_gradients(twin, seed)
            step(compiled_one)
            eager.step()
    assert all(same(a, b) for a, b in zip(models, twins, strict=True))


def _replace(optimizer: Any, model: nn.Module) -> None:
    optimizer.state[model[0].weight]["exp_avg"] = torch.ones_like(model[0].weight)


# Known limits: no guard of torch.compile covers these. load_state_dict and add_param_group are noticed.
_EXCHANGES: dict[str, tuple[Callable[[Any, nn.Module], Any], str]] = {
    "state-replaced": (_replace, "a compiled step keeps the states that it was traced with"),
    "state-cleared": (lambda o, _: o.state.clear(), "a compiled step keeps the states that it was traced with"),
    "parameter-removed": (lambda o, _: o.param_groups[0]["params"].pop(), "a list does not report its changes"),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(f, id=n, marks=pytest.mark.xfail(strict=True, reason=r)) for n, (f, r) in _EXCHANGES.items()],
)
def test_replaced_objects_are_noticed_as_in_eager_steps(change: Callable[[Any, nn.Module], Any]) -> None:
    a, b = network(), network()
    first, second = (optim.AdamW(m.parameters(), lr=0.1) for m in (a, b))
    step, _ = compiled(second)
    both(a, b, first.step, step, range(3))
    change(first, a)
    change(second, b)
    both(a, b, first.step, step, range(3, 5))
    assert same(a, b)


def test_a_frozen_parameter_with_a_gradient_is_updated_as_in_torch() -> None:
    a, b = network(), network()
    first, second = (optim.AdamW(m.parameters(), lr=0.1) for m in (a, b))
    step, _ = compiled(second)
    for seed in range(5):
        if seed == 3:
            a[0].weight.requires_grad_(False)
            b[0].weight.requires_grad_(False)
        both(a, b, first.step, step, range(seed, seed + 1))
    assert same(a, b)


def test_observed_in_a_compiled_step() -> None:
    model = network()
    optimizer = optim.SGDW(model.parameters(), lr=0.1, weight_decay=0.1)
    seen = optimizer.observe(head=model[2].weight, norms=True, bf16=True)
    step, _ = compiled(optimizer)
    for seed in range(3):
        give_gradients(model, seed)
        step()
        grads = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        assert seen.grad_norm.item() == pytest.approx(grads.norm().item(), rel=1e-6)
        assert torch.equal(seen.row_sum, model[2].weight.detach().double().sum(0))
        assert all(torch.equal(seen.weights[p], p.detach().bfloat16()) for p in model.parameters())
