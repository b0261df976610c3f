"""With torch's schedules, gradient scaling, clipping and data parallelism, and under Lightning and Hugging Face."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from nc import optim

PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "Adam": (optim.Adam, torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}
# From here on a schedule of 24 steps, made for an optimizer with lr = 0.05.
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: schedules.StepLR(o, 5, 0.5),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [3, 9, 15], 0.3),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: schedules.ConstantLR(o, 0.3, 6),
    "LinearLR": lambda o: schedules.LinearLR(o, 0.1, 1.0, 10),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 20, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5, 2),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.95),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, 24),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 4, 6),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, threshold=0.05),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 5),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 5), schedules.CosineAnnealingLR(o, 15)], [5]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, 4), schedules.ExponentialLR(o, 0.9)]
    ),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), torch.arange(16) % 3)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, lr: Any, name: str) -> None:
    """The same weights and the same numbers in the groups; those with cycles turn momentum or β₁ too."""
    ours, theirs, kwargs = PAIRS[name]
    ends, numbers = [], []
    for cls in (ours, theirs):
        model = network(torch.float64)
        layers = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}]
        optimizer = cls(layers, lr=copy.deepcopy(lr), **kwargs)
        turned = SCHEDULES[schedule](optimizer)
        for seed in range(24):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            optimizer.step()
            turned.step(*(loss.item(),) if schedule == "ReduceLROnPlateau" else ())
            numbers.append([(float(g["lr"]), g.get("betas") or g["momentum"]) for g in optimizer.param_groups])
        assert all(isinstance(g["lr"], Tensor) == isinstance(lr, Tensor) for g in optimizer.param_groups)
        ends.append(weights(model))
    assert numbers[:24] == numbers[24:]
    assert len({row[0] for row in numbers}) > 1
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_a_schedule_goes_on_from_its_state_dict() -> None:
    model, twin = network(), network()
    pairs = []
    for m in (model, twin):
        optimizer = optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        pairs.append((m, optimizer, schedules.OneCycleLR(optimizer, 0.2, 20)))

    def run(pair: tuple[Any, Any, Any], steps: range) -> None:
        m, optimizer, schedule = pair
        for seed in steps:
            optimizer.zero_grad()
            loss_of(m, seed).backward()
            optimizer.step()
            schedule.step()

    run(pairs[0], range(8))
    run(pairs[1], range(3))
    for mine, saved in zip(pairs[1], pairs[0], strict=True):
        mine.load_state_dict(copy.deepcopy(saved.state_dict()))
    for pair in pairs:
        run(pair, range(8, 20))
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", PAIRS)
def test_gradient_scaler(name: str, clip: bool) -> None:
    """As torch's class: scaled gradients divided, steps with infinite gradients left out and not counted."""
    ours, theirs, kwargs = PAIRS[name]
    ends, scales, counts = [], [], []
    for cls in (ours, theirs):
        model = network()
        optimizer = cls(model.parameters(), lr=0.05, **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
        for seed in range(12):
            optimizer.zero_grad()
            before = weights(model).clone(), copy.deepcopy(optimizer.state_dict()["state"])
            scaler.scale(loss_of(model, seed)).backward()
            if bad := seed in (0, 5, 6):
                model[2].weight.grad[0, 0] = float("inf")
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=False)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            assert torch.equal(before[0], weights(model)) == bad
            state = optimizer.state_dict()["state"]
            if bad and seed:
                assert all(torch.equal(v, state[i][k]) for i, s in before[1].items() for k, v in s.items())
        counts.append([float(s["step"]) for s in state.values() if "step" in s])
        ends.append(weights(model))
    assert scales[:12] == scales[12:]
    assert counts[0] == counts[1] == [9.0] * (0 if name == "SGD" else 4)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_disabled_scaler_is_a_plain_step() -> None:
    a, b = network(), network()
    first, second = optim.AdamW(a.parameters()), optim.AdamW(b.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for seed in range(3):
        scaler.scale(loss_of(a, seed)).backward()
        scaler.step(first)
        scaler.update()
        loss_of(b, seed).backward()
        second.step()
    assert torch.equal(weights(a), weights(b))


PARALLEL = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from nc import optim

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

for cls, kwargs in ((optim.SGD, dict(lr=0.1, momentum=0.9)), (optim.AdamW, dict(lr=0.01))):
    alone = network()
    single = cls(alone.parameters(), **kwargs)
    models = [DistributedDataParallel(network()) for _ in range(2)]
    optimizers = [cls(models[0].parameters(), **kwargs), ZeroRedundancyOptimizer(models[1].parameters(), cls, **kwargs)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (single, *optimizers)]
    for seed in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for model, optimizer, batch in [
            (alone, single, x), *((m, o, x.chunk(2)[rank]) for m, o in zip(models, optimizers))
        ]:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    for model in models:
        for p, q in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_data_parallel_and_zero_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARALLEL]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(errors)
