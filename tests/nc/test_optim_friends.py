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

from ncollapse import optim
from small_network import network, weights

PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "Adam": (optim.Adam, torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
}
# The following are schedules of 24 steps for an optimizer with lr = 0.05.
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


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), torch.arange(16) % 3)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, lr: Any, name: str) -> None:
    """The same weights and the same numbers in the groups; cyclic schedules change momentum or β₁ too."""
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


def test_the_plateau_schedule_of_a_class_that_torch_has_not() -> None:
    model = network()
    optimizer = optim.Signum(model.parameters(), lr=0.1)
    plateau = schedules.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.025
    loss_of(model, 0).backward()
    before = weights(model)
    optimizer.step()
    torch.testing.assert_close((weights(model) - before).abs(), torch.full_like(before, 0.025))


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
    """As torch's class: scaled gradients are divided, steps with infinite gradients are skipped and not counted."""
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


def test_a_first_step_left_out_is_still_to_come() -> None:
    ends = []
    for cls in (optim.SGD, torch.optim.SGD):
        model = network()
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for seed in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed)).backward()
            if seed == 0:
                model[2].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


PARALLEL = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from ncollapse import optim

torch.set_num_threads(1)
rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))

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
dist.barrier()  # no process exits while another still communicates
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


DATA = torch.utils.data.TensorDataset(torch.eye(6).repeat(8, 1), torch.arange(48) % 3)


@pytest.mark.filterwarnings("ignore")  # of the library
def test_lightning(tmp_path: Path) -> None:
    """With a schedule, clipping, accumulation and a checkpoint from which another trainer resumes."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self, cls: Any) -> None:
            super().__init__()
            self.net, self.cls = network(), cls

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = self.cls(self.parameters(), lr=0.05, weight_decay=5e-4)
            return {"optimizer": optimizer, "lr_scheduler": schedules.CosineAnnealingLR(optimizer, 12)}

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    ends = []
    for cls in (optim.Adam, torch.optim.Adam):
        module = Module(cls)
        for epochs, start in ((10, None), (12, tmp_path / "half.ckpt")):
            trainer = lightning.Trainer(max_epochs=epochs, gradient_clip_val=1.0, accumulate_grad_batches=2, **options)
            module = module if start is None else Module(cls)
            trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=8), ckpt_path=start)
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        assert float(trainer.optimizers[0].state_dict()["state"][0]["step"]) == 36
        ends.append(weights(module))
    assert (module.net(DATA.tensors[0]).argmax(1) == DATA.tensors[1]).all()
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the library
def test_the_hugging_face_trainer(tmp_path: Path) -> None:
    """As torch's class, also after resuming from a checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": x, "labels": int(y)} for x, y in zip(*DATA.tensors, strict=True)]

    def train(cls: Any, folder: str, resume: Any = None) -> Tensor:
        model = Model()
        optimizer = cls(model.parameters(), lr=0.05, weight_decay=5e-4)
        schedule = schedules.LambdaLR(optimizer, lambda step: 1 - step / 40)
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), num_train_epochs=12, per_device_train_batch_size=16, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=15,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        assert float(optimizer.state_dict()["state"][0]["step"]) == 36
        assert (model.net(torch.eye(6)).argmax(1) == torch.arange(6) % 3).all()
        return weights(model)

    ours, theirs = train(optim.AdamW, "ours"), train(torch.optim.AdamW, "theirs")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    again = train(optim.AdamW, "again", resume=str(tmp_path / "ours" / "checkpoint-15"))
    torch.testing.assert_close(again, ours, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")  # of the library
def test_accelerate(tmp_path: Path) -> None:
    """Its wrapper accumulates, clips, schedules, saves and loads."""
    accelerate = pytest.importorskip("accelerate")
    ends = []
    for cls in (optim.SGD, torch.optim.SGD):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = network()
        optimizer = cls(model.parameters(), lr=0.05, momentum=0.9)
        loader = torch.utils.data.DataLoader(DATA, batch_size=8)
        wrapped = accelerator.prepare(model, optimizer, loader, schedules.ExponentialLR(optimizer, 0.9))
        for epoch in range(3):
            for x, y in wrapped[2]:
                with accelerator.accumulate(wrapped[0]):
                    accelerator.backward(nn.functional.cross_entropy(wrapped[0](x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    wrapped[1].step()
                    wrapped[3].step()
                    wrapped[1].zero_grad()
            if epoch == 0:
                accelerator.save_state(str(tmp_path / cls.__module__))
            if epoch == 1:  # back to the end of the first
                accelerator.load_state(str(tmp_path / cls.__module__))
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_accelerates_wrapper_sees_a_step_that_the_scaler_skips() -> None:
    """Its mechanism without it: it replaces `step` for the scaler's call, and looks whether it was called."""
    ends, skipped = [], []
    for cls in (optim.Adam, torch.optim.Adam):
        model = network()
        optimizer: Any = cls(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        schedules.ExponentialLR(optimizer, 0.9)  # replaces `step` too
        own = optimizer.step
        for seed in range(6):
            called: list[int] = []

            def patched(*args: Any, step: Any = own, called: list[int] = called, **kwargs: Any) -> Any:
                called.append(1)
                return step(*args, **kwargs)

            patched.__module__ = "accelerate.optimizer"
            optimizer.zero_grad()
            scaler.scale(loss_of(model, seed)).backward()
            if seed in (1, 4):
                model[2].weight.grad[0, 0] = float("inf")
            optimizer.step = patched
            scaler.step(optimizer)
            scaler.update()
            optimizer.step = own
            skipped.append(not called)
        assert getattr(optimizer, "_step_supports_amp_scaling", False) == (cls is optim.Adam)
        ends.append(weights(model))
    assert skipped[:6] == skipped[6:] == [False, True, False, False, True, False]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
