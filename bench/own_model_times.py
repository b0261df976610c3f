"""A model of the user's beside the same network of ncollapse's, and beside the loop that the user would write.

python -m bench.own_model_times      records bench/results/own-cpu.json

An MLP and a small CNN on digits, batches of 128, one thread, each in the form that a sweep gives it ("as chosen") and
run by run as the module computes itself ("alone", for models that do not stack). "plain loop": the data in memory,
the module, `F.cross_entropy` and torch.optim. Times are of a training step of one run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import timing
from bench.record import Record, timing_options
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import load
from ncollapse.train.networks import forms
from ncollapse.train.plugins import Plugins
from ncollapse.train.training import step as step_module
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "torch.optim:AdamW": torch.optim.AdamW}
SIZES = (1, 4, 16)


class OwnMLP(nn.Module):
    """As `mlp` of ncollapse."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


class OwnCNN(nn.Module):
    """As `cnn` of ncollapse."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.maps, self.head = nn.Sequential(*layers), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x).amax((-2, -1)))


PLUGINS = Plugins(given={"model": {"own_mlp": OwnMLP, "own_cnn": OwnCNN}})


def runs(model: str, optimizer: str, count: int) -> list[RunConfig]:
    """So many runs that differ in the learning rate."""
    code = PLUGINS.code_of({"model": model}) if model.startswith("own") else ""
    shared = {"model": model, "code": code, "optimizer": optimizer, "epochs": 1_000}
    return [RunConfig(**shared, lr=0.01 * 0.99**i) for i in range(count)]  # type: ignore[arg-type]


def epoch_of(training: Training) -> Callable[[], None]:
    return training._train_epoch


def alone(training: Callable[[], Training]) -> Training:
    """Make a training whose module computes itself, as of a model that does not stack."""
    before = forms.form_of, step_module.form_of
    forms.form_of = step_module.form_of = lambda *_: forms.Form("alone", "for the benchmark")  # type: ignore[assignment]
    try:
        return training()
    finally:
        forms.form_of, step_module.form_of = before


def plain(model: nn.Module, optimizer: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The loop that a user would write, over data in memory."""
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 5e-4} | ({"momentum": 0.9} if optimizer == "sgd" else {})
    optim = OPTIMIZERS[optimizer](model.parameters(), **settings)

    def epoch() -> None:
        for batch in torch.randperm(len(x)).split(128):
            optim.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optim.step()

    return epoch


def main(arguments: list[str] | None = None) -> None:
    options = timing_options(__doc__, arguments, seconds=20.0)
    torch.set_num_threads(1)
    data = load("digits", CPU, data_dir=None, download=False)
    steps_of_an_epoch = runs("mlp", "sgd", 1)[0].steps_per_epoch(len(data.train_y))
    record = Record(options.out / "own-cpu.json", "python -m bench.own_model_times", "cpu", options.commit)
    cases: dict[str, Any] = {}
    record.data["cases"] = cases
    for name, own in (("mlp", OwnMLP), ("cnn", OwnCNN)):
        for optimizer in ("sgd", "adamw", "torch.optim:AdamW"):
            if options.only not in f"{name}, {optimizer}":
                continue

            def training(model: str, count: int, optimizer: str = optimizer) -> Training:
                return Training(runs(model, optimizer, count), data, CPU, plugins=PLUGINS)

            steps = {"plain loop": plain(own(**_arguments(own)), optimizer, data.train_x, data.train_y)}
            steps["alone"] = epoch_of(alone(lambda name=name: training(f"own_{name}", 1)))  # type: ignore[misc]
            for count in SIZES:
                steps[f"own, {count}"] = epoch_of(training(f"own_{name}", count))
                steps[f"built-in, {count}"] = epoch_of(training(name, count))
            timings, _ = timing.interleaved(steps, timing.wall_cpu, options.seconds)
            per_step = {key: one.median / steps_of_an_epoch / int(key.rpartition(", ")[2] if "," in key else 1)
                        for key, one in timings.items()}  # fmt: skip
            cases[f"{name}, {optimizer}"] = {
                "us_per_run_and_step": {key: round(us, 1) for key, us in per_step.items()},
                "plain loop / alone": round(per_step["plain loop"] / per_step["alone"], 3),
                "plain loop / own, 1": round(per_step["plain loop"] / per_step["own, 1"], 3),
                **{f"built-in / own, {n}": round(per_step[f"built-in, {n}"] / per_step[f"own, {n}"], 3) for n in SIZES},
                "timings": {key: one.record() for key, one in timings.items()},
            }
            record.save()
            print(f"{name}, {optimizer}:", {k: v for k, v in cases[f"{name}, {optimizer}"].items() if k != "timings"})


def _arguments(own: type[nn.Module]) -> dict[str, int]:
    return {"num_classes": 10} | ({"channels": 1} if own is OwnCNN else {})


if __name__ == "__main__":
    main()
