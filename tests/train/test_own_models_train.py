"""Models of the user's in the training loop: random numbers, streamed data, errors, checkpoints, and bad data."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.networks.architecture import Architecture, build
from ncollapse.train.networks.model_trial import try_model
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training
from ncollapse.train.training.step import captured

CPU = torch.device("cpu")


class Mine(nn.Module):
    def __init__(self, channels: int, size: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels * size * size, 16)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.hidden(x.flatten(1)).relu()))


class Drawing(Mine):
    """Draws from the generators of Python and NumPy too."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * random.uniform(0.9, 1.1) + float(np.random.normal(0, 0.01))
        return super().forward(x)


class Failing(Mine):
    """Fails in the training of the second epoch."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__(channels, size, num_classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
            if float(self.steps) > 3:
                raise ValueError("enough")
        return super().forward(x)


PLUGINS = Plugins(given={"model": {"mine": Mine, "drawing": Drawing, "failing": Failing}})


def run_of(model: str = "mine", **settings: Any) -> RunConfig:
    base: dict[str, Any] = {"epochs": 3, "limit": 200, "lr": 0.05, "eval_every": 1, "code": f"model {model}=1"}
    return RunConfig(model=model, **(base | settings))


def values_of(runs: list[RunConfig], data: Dataset, checkpoint: bytes | None = None) -> tuple[Training, list[Any]]:
    training = Training(runs, data, CPU, plugins=PLUGINS, checkpoint=checkpoint)
    return training, [event.values for event in training if isinstance(event, Evaluation)]


@pytest.mark.parametrize("run", [run_of(model_options={"dropout": 0.5}), run_of("drawing")], ids=["dropout", "drawing"])
def test_random_models_depend_on_seed_and_epoch_alone(run: RunConfig, digits: Dataset) -> None:
    training = Training([run], digits, CPU, plugins=PLUGINS)
    expected, content = [], b""
    for event in training:
        torch.rand(1), random.random(), np.random.rand()  # what the caller draws does not matter
        if isinstance(event, Evaluation):
            expected.append(event.values)
        elif event == 1:
            content = training.checkpoint()
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    _, again = values_of([run], digits)
    resumed, rest = values_of([run], digits, content)
    assert again == expected
    assert rest == expected[2:]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for name, value in training.stack.tensors().items():
        assert torch.equal(resumed.stack.tensors()[name], value)
    _, other = values_of([dataclasses.replace(run, seed=1)], digits)
    assert other != expected


def test_an_error_in_a_model_names_it_and_the_run(digits: Dataset) -> None:
    run = run_of("failing")
    with pytest.raises(
        OwnCodeError, match=r"model failing: test_own_models_train.py, line \d+: ValueError: enough"
    ) as raised:
        values_of([run], digits)
    assert raised.value.run == run.id
    assert "in forward" in raised.value.log


def test_errors_of_ncollapse_stay_what_they_are(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Training) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Training, "_train_epoch", broken)
    for settings in ({}, {"optimizer": "torch.optim:SGD"}):
        with pytest.raises(ZeroDivisionError):
            list(Training([RunConfig(limit=200, epochs=1, **settings)], digits, CPU))


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self.targets = x, y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self._x[i], self.targets[i]


def test_streamed_data_give_the_numbers_of_data_in_memory(digits: Dataset) -> None:
    data = digits.limited(150)
    streamed = Streamed.of(Pairs(data.train_x, data.train_y), Pairs(data.val_x[:60], data.val_y[:60]), "digits")
    memory = dataclasses.replace(data, val_x=data.val_x[:60], val_y=data.val_y[:60])
    for runs in ([run_of(limit=100, epochs=2)], [RunConfig(model="cnn", epochs=1, lr=lr) for lr in (0.1, 0.2)]):
        assert values_of(runs, streamed)[1] == values_of(runs, memory)[1]
    with pytest.raises(UserError, match="runs of several seeds cannot train together"):
        values_of([run_of(seed=seed) for seed in (0, 1)], streamed)
    with pytest.raises(UserError, match="augment = flip needs data in memory"):
        values_of([run_of(augment="flip")], streamed)


def test_data_that_do_not_fit_are_refused(digits: Dataset) -> None:
    wrong = dataclasses.replace(digits, train_y=digits.train_y + 1)
    with pytest.raises(UserError, match=r"labels lie in \[0, 10\), but training labels go from 1 to 10"):
        values_of([run_of()], wrong)
    with pytest.raises(UserError, match=r"labels lie in \[0, 10\), but validation labels go from -1 to 8"):
        values_of([run_of()], dataclasses.replace(digits, val_y=digits.val_y - 1))
    vectors = dataclasses.replace(digits, train_x=digits.train_x.flatten(1), val_x=digits.val_x.flatten(1))
    with pytest.raises(UserError, match=r"model cnn takes square images \[C, H, W\]; .* are \[64\] of torch.float32"):
        values_of([RunConfig(model="cnn")], vectors)
    assert len(values_of([RunConfig(epochs=1, limit=200)], vectors)[1]) == 2
    wide = dataclasses.replace(digits, train_x=digits.train_x[..., :4], val_x=digits.val_x[..., :4])
    with pytest.raises(UserError, match=r"model mlp takes square images .* are \[1, 8, 4\]"):
        values_of([RunConfig()], wide)


def test_what_a_graph_holds_is_said_in_words(digits: Dataset) -> None:
    runs = [run_of(), run_of(model_options={"dropout": 0.5}), RunConfig(), RunConfig(optimizer="torch.optim:SGD")]
    words = [Training([run], digits.limited(64), CPU, plugins=PLUGINS)._step.captured for run in runs]
    assert [text.partition(":")[0] for text in words] == [
        "forward pass, backward pass and update", "nothing", "forward pass, backward pass and update",
        "forward and backward pass",
    ]  # fmt: skip
    assert "random numbers" in words[1]
    assert captured("", "") == "forward pass, backward pass and update"
    assert captured("SOAP cannot be captured", "") == "forward and backward pass: SOAP cannot be captured"
    assert captured("SOAP cannot be captured", "it draws random numbers") == "nothing: it draws random numbers"


class InPlace(Mine):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        x *= 0.9
        return super().forward(x)


class Bounded(Mine):
    """Assigns other memory to a weight and to a buffer, as EEGNet bounds its norms."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__(channels, size, num_classes)
        self.register_buffer("centre", torch.zeros(channels, size, size))

    def forward(self, x: Tensor) -> Tensor:
        self.hidden.weight.data = torch.renorm(self.hidden.weight.data, 2, 0, 0.3)
        if self.training:
            self.centre.data = 0.5 * self.centre.data + 0.5 * x.mean(0)  # type: ignore[union-attr]
        return super().forward(x - self.centre)  # type: ignore[operator]


def plainly(model: Mine, run: RunConfig, data: Dataset, epochs: int) -> Mine:
    """Train as a plain loop does, with an evaluation after each epoch."""
    order, optimizer = (
        torch.Generator().manual_seed(run.seed),
        torch.optim.SGD(model.parameters(), weight_decay=run.weight_decay),
    )
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = run.lr * run.lr_factor(epoch)
        for batch in torch.randperm(run.limit or 0, generator=order).split(run.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("optimizer", ["sgd", "torch.optim:SGD"])
@pytest.mark.parametrize("model", [InPlace, Bounded])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_works_in_place_trains_as_in_a_plain_loop(
    model: type[Mine], optimizer: str, precision: str, digits: Dataset
) -> None:
    plugins = Plugins(given={"model": {"mine": model}})
    run = run_of(optimizer=optimizer, precision=precision, momentum=0.0)
    architecture = Architecture.of(run, digits)
    copies = [tensor.clone() for tensor in (digits.train_x, digits.train_y, digits.val_x)]
    try_model(architecture, plugins, digits.train_x[:8], digits.train_y[:8])
    training = Training([run], digits, CPU, plugins=plugins)
    list(training)
    for tensor, copy in zip((digits.train_x, digits.train_y, digits.val_x), copies, strict=True):
        assert torch.equal(tensor, copy)
    built = build(architecture, run.seed, plugins)
    assert isinstance(built, Mine)
    plain = plainly(built, run, digits, run.epochs)
    with torch.no_grad():
        plain.eval()(digits.val_x.clone())  # the last evaluation bounds the weights once more
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(training.stack.state_dict(0)[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("model", [InPlace, Bounded])
def test_what_works_in_place_does_not_reach_other_runs(model: type[Mine], digits: Dataset) -> None:
    plugins = Plugins(given={"model": {"mine": model}})
    runs = [run_of(momentum=0.0, lr=lr, epochs=2) for lr in (0.05, 0.1)]
    alone = []
    for run in runs:
        training = Training([run], digits, CPU, plugins=plugins)
        list(training)
        alone.append(training.stack.state_dict(0))
    together = Training(runs, digits, CPU, plugins=plugins)
    list(together)
    for r, expected in enumerate(alone):
        for name, value in together.stack.state_dict(r).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_metrics_and_losses_that_work_in_place_change_nothing_else(digits: Dataset) -> None:
    def metric(weight: Tensor, statistics: Any) -> float:
        weight -= weight.mean(0)
        return float(weight.norm())

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(labels, 10)
        labels.fill_(0)
        return -(logits.log_softmax(-1) * one_hot).sum(-1)

    plugins = Plugins(given={"metric": {"centred": metric}, "loss": {"mine": loss}})
    labels = digits.train_y.clone(), digits.val_y.clone()
    settings: dict[str, Any] = {"limit": 200, "epochs": 2, "eval_every": 1}
    plain = Training([RunConfig(**settings)], digits, CPU)
    own = Training(
        [RunConfig(loss="mine", code="loss mine=1", **settings)], digits, CPU, plugins=plugins, metrics=["centred"]
    )
    list(plain), list(own)
    assert torch.equal(digits.train_y, labels[0])
    assert torch.equal(digits.val_y, labels[1])
    torch.testing.assert_close(own.stack.weight, plain.stack.weight, rtol=1e-4, atol=1e-5)


class Contracted(Mine):
    """Its gradients are not contiguous, and two parameters get the same one."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__(channels, size, num_classes)
        self.w, self.p, self.q = (nn.Parameter(0.1 * torch.randn(n)) for n in ((16, 16), (16,), (16,)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x.flatten(1)).relu()
        return self.head(torch.einsum("bi,oi->bo", h, self.w) + (self.p + self.q))


class Decaying(torch.optim.Optimizer):
    """Adds weight decay to the gradients, in place, which it views as vectors."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.add_(param, alpha=group["weight_decay"])
                param.view(-1).sub_(group["lr"] * param.grad.view(-1))


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, None], ids=str)
def test_each_gradient_has_memory_of_its_own(runs: int, options: dict[str, bool] | None, digits: Dataset) -> None:
    plugins = Plugins(given={"model": {"mine": Contracted}, "optimizer": {"decaying": Decaying}})
    settings: dict[str, Any] = {"optimizer": "decaying", "code": "model mine=1; optimizer decaying=1"}
    if options is not None:
        settings = {"optimizer": "torch.optim:SGD", "optimizer_options": options}
    run = run_of(momentum=0.0, weight_decay=0.1, **settings)
    training = Training([run, dataclasses.replace(run, lr=0.1)][:runs], digits, CPU, plugins=plugins)
    list(training)
    model = build(Architecture.of(run, digits), run.seed, plugins)
    assert isinstance(model, Mine)
    plainly(model, run, digits, run.epochs)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(training.stack.state_dict(0)[name], value, rtol=1e-4, atol=1e-4)


class Tracking(Mine):
    """Assigns a buffer that has a history, and reads it in evaluations alone."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__(channels, size, num_classes)
        self.register_buffer("centre", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x.flatten(1))
        if self.training:
            self.centre = h.mean(0)
        return self.head((h if self.training else h - self.centre).relu())  # type: ignore[operator]


@pytest.mark.parametrize("runs", [1, 2])
def test_a_buffer_keeps_no_history(runs: int, digits: Dataset) -> None:
    plugins = Plugins(given={"model": {"mine": Tracking}})
    run = run_of(epochs=1)
    training = Training([run, dataclasses.replace(run, lr=0.1)][:runs], digits, CPU, plugins=plugins)
    list(training)
    centre = training.stack.buffers["centre"]
    assert bool(centre.any(1).all())
    assert not centre.requires_grad
