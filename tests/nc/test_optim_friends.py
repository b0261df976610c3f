"""Ours in the hands of those who use torch.optim's: schedules, GradScaler, DDP, Lightning, the Hugging Face Trainer."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedule

from nc import optim

PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: schedule.StepLR(o, 3),
    "multistep": lambda o: schedule.MultiStepLR(o, [2, 6]),
    "exponential": lambda o: schedule.ExponentialLR(o, 0.8),
    "cosine": lambda o: schedule.CosineAnnealingLR(o, 10),
    "restarts": lambda o: schedule.CosineAnnealingWarmRestarts(o, 4),
    "one-cycle": lambda o: schedule.OneCycleLR(o, max_lr=0.1, total_steps=20),  # momentum and betas too
    "cyclic": lambda o: schedule.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=False),
    "lambda": lambda o: schedule.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "multiplicative": lambda o: schedule.MultiplicativeLR(o, lambda epoch: 0.9),
    "linear": lambda o: schedule.LinearLR(o, 0.1, total_iters=5),
    "polynomial": lambda o: schedule.PolynomialLR(o, 10, power=2.0),
    "sequential": lambda o: schedule.SequentialLR(
        o, [schedule.ConstantLR(o, 0.1, 4), schedule.ExponentialLR(o, 0.8)], milestones=[4]
    ),
    "chained": lambda o: schedule.ChainedScheduler([schedule.ConstantLR(o, 0.1, 4), schedule.ExponentialLR(o, 0.8)]),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(x), torch.arange(16) % 3)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ours", "theirs", "kwargs"), PAIRS.values(), ids=PAIRS)
def test_schedules(ours: Any, theirs: Any, kwargs: dict[str, Any], name: str, tensor_lr: bool) -> None:
    ends, rates = [], []
    for cls in (ours, theirs):
        model = network()
        optimizer = cls(model.parameters(), lr=torch.tensor(0.05) if tensor_lr else 0.05, **kwargs)
        scheduler = SCHEDULES[name](optimizer)
        for seed in range(12):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            optimizer.step()
            scheduler.step()
        ends.append(weights(model))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_the_plateau_schedule() -> None:
    model = network()
    optimizer = optim.Signum(model.parameters(), lr=0.1)
    plateau = schedule.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.025
    loss_of(model, 0).backward()
    before = weights(model)
    optimizer.step()
    torch.testing.assert_close((weights(model) - before).abs(), torch.full_like(before, 0.025))


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "unscale-and-clip"])
@pytest.mark.parametrize(("ours", "theirs", "kwargs"), PAIRS.values(), ids=PAIRS)
def test_grad_scaler(ours: Any, theirs: Any, kwargs: dict[str, Any], clip: bool) -> None:
    """The scale is taken out in the kernel; a step with an inf is no step, and not counted."""
    ends: list[Any] = []
    for cls in (ours, theirs):
        model = network()
        optimizer = cls(model.parameters(), lr=0.05, **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        for seed in range(8):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed)).backward()
            if seed == 4:
                next(model.parameters()).grad[0] = float("inf")
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        steps = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
        ends.append((weights(model), scaler.get_scale(), steps))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)
    assert ends[0][1:] == ends[1][1:]


PARALLEL = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from nc import optim

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
store = dist.FileStore(folder + "/store", 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
torch.manual_seed(0)
plain = nn.Linear(6, 3)
parallel = nn.parallel.DistributedDataParallel(plain)
optimizer = optim.AdamW(parallel.parameters(), lr=0.1)
for step in range(5):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[rank::2]
    optimizer.zero_grad()
    parallel(x).square().mean().backward()
    optimizer.step()
torch.save(plain.state_dict(), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_with_ddp_train_as_one(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PARALLEL, str(r), str(tmp_path)]) for r in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    torch.manual_seed(0)
    alone = nn.Linear(6, 3)
    optimizer = optim.AdamW(alone.parameters(), lr=0.1)
    for step in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        alone(x).square().mean().backward()
        optimizer.step()
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # theirs
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = optim.Adam(self.parameters(), lr=0.05, weight_decay=5e-4)
            return {"optimizer": optimizer, "lr_scheduler": schedule.CosineAnnealingLR(optimizer, 10)}

    data = torch.utils.data.TensorDataset(torch.eye(6).repeat(8, 1), torch.arange(48) % 3)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    module = Module()
    trainer = lightning.Trainer(max_epochs=10, gradient_clip_val=1.0, **options)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    x, y = data.tensors
    assert (module.net(x).argmax(1) == y).all()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = lightning.Trainer(max_epochs=12, **options)
    again.fit(Module(), torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=tmp_path / "end.ckpt")
    assert float(again.optimizers[0].state_dict()["state"][0]["step"]) == 36


@pytest.mark.filterwarnings("ignore")  # theirs
def test_the_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.eye(6)[i % 6], "labels": i % 3} for i in range(48)]
    model = Model()
    optimizer = optim.Adam(model.parameters(), lr=0.05, weight_decay=5e-4)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=12, per_device_train_batch_size=16, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="epoch", save_total_limit=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    x = torch.eye(6)
    assert (model.net(x).argmax(1) == torch.arange(6) % 3).all()
    assert float(optimizer.state_dict()["state"][0]["step"]) == 36
