"""Models of the user's: stacked as alone in every form, found heads, and what is refused before anything trains."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.throughput import DataFacts, bytes_per_run, measure_rate
from ncollapse.train.errors import OwnCodeError, UserError
from ncollapse.train.networks import architecture as architectures
from ncollapse.train.networks import forms
from ncollapse.train.networks.architecture import Architecture, build, parts_of
from ncollapse.train.networks.forms import form_of
from ncollapse.train.networks.model_trial import try_model
from ncollapse.train.networks.models import Residual
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.stack import Stack, make_stack

CPU = torch.device("cpu")


class Basic(nn.Module):
    """The basic block of a ResNet, as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.downsample = down if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, channels: int, num_classes: int, width: int = 4, scale: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.layer1, self.layer2 = Basic(width, width), Basic(width, 2 * width, 2)
        self.layer3 = nn.Sequential(Residual(2 * width), nn.AvgPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, num_classes)
        # A parameter that no layer holds: the model is no graph of layers.
        self.scale = nn.Parameter(torch.tensor([scale])) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        x = x if self.scale is None else x * self.scale
        return self.head(torch.flatten(self.pool(x), 1))


class Controlled(ResNet):
    """What it computes depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        while x.abs().mean() > 0.3:
            x = x / 2
        return self.head(self.pool(x).flatten(1))


class Transformer(nn.Module):
    """The rows of an image are its tokens."""

    def __init__(self, size: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(size, 16), nn.Parameter(torch.zeros(1, size, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x[:, 0]) + self.position).mean(1))


class Plain(nn.Module):
    """As tutorials write a small network."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc1 = nn.Conv2d(channels, 6, 3, padding="same"), nn.Linear(6 * (size // 2) ** 2, 20)
        self.norm, self.drop = nn.BatchNorm1d(20), nn.Dropout(0.0)
        self.fc2 = nn.Linear(20, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.gelu(self.conv(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(self.drop(F.relu(self.norm(self.fc1(x)))))


class Wide(nn.Module):
    """Branches that are concatenated, of the image itself and of its maps; grouped convolutions, other norms."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, 4, 3, padding=1, groups=2), nn.Conv2d(channels, 2, 1)
        self.norm, self.deep = nn.BatchNorm2d(6 + channels), nn.Conv2d(6 + channels, 8, 3, groups=4)
        self.groups, self.last = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([self.a(x), self.b(x).tanh(), x], dim=1)
        maps = torch.relu(self.groups(self.deep(F.relu(self.norm(maps)))))
        return self.head(self.last(2 * maps.mean(dim=(2, 3)) - 1).relu_())


class Counting(Plain):
    """Its first steps are smaller."""

    def forward(self, x: Tensor) -> Tensor:
        self.steps = getattr(self, "steps", 0) + 1
        return super().forward(x * min(1.0, self.steps / 10))


class Fading(Plain):
    """Each step changes a buffer."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__(channels, size, num_classes)
        self.register_buffer("seen", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)  # type: ignore[operator, union-attr]
        return super().forward(x / self.seen)  # type: ignore[arg-type, operator]


class Tokens(nn.Module):
    """The weights of the embedding are those of a layer too; the head's are frozen."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed, self.back = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.back.weight = self.embed.weight
        self.head = nn.Linear(20, num_classes).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.back(self.embed(x).mean(1))))


def recurrent(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(num_classes))


GIVEN = {f.__name__: f for f in (ResNet, Controlled, Transformer, Plain, Wide, Counting, Fading, Tokens, recurrent)}
PLUGINS = Plugins(given={"model": GIVEN})
IMAGES: tuple[tuple[int, ...], torch.dtype] = ((1, 8, 8), torch.float32)
TOKENS: tuple[tuple[int, ...], torch.dtype] = ((5,), torch.int64)


def of(model: str, kind: tuple[tuple[int, ...], torch.dtype] = IMAGES, **settings: Any) -> Architecture:
    return Architecture(model, 4, *kind, **settings)


@pytest.mark.parametrize(
    ("architecture", "kind", "reason"),
    [
        (of("ResNet"), "layers", ""),
        (of("ResNet", options='{"scale": 0.5}'), "vmap", "scale is used directly, not by a layer"),
        (of("Controlled"), "alone", "data-dependent control flow"),
        (of("Transformer"), "vmap", "getitem"),
        (of("Plain"), "layers", ""),
        (of("Plain", ((3, 6, 6), torch.float32)), "layers", ""),
        (of("Wide", ((2, 5, 5), torch.float32)), "layers", ""),
        (of("Fading"), "vmap", "seen is used directly"),
        (of("Tokens", TOKENS), "vmap", "Embedding"),
        (of("cnn"), "layers", ""),
    ],
    ids=lambda value: f"{value.model}{value.options}" if isinstance(value, Architecture) else "",
)
def test_stacked_runs_are_those_alone(architecture: Architecture, kind: str, reason: str) -> None:
    """Three steps of two models, with their own batches: logits, parameters and buffers; then evaluation."""
    form = form_of(architecture, "fp32", PLUGINS)
    assert (form.kind, reason in form.reason) == (kind, True), form
    models = [build(architecture, seed, PLUGINS) for seed in (0, 1)]
    stack = make_stack(models, architecture, CPU, "fp32", PLUGINS)
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(8) % 4
    for _ in range(3):
        batches = [architecture.example(8, generator) for _ in models]
        _, logits = stack(torch.stack(batches), train=True)
        loss = sum(F.cross_entropy(of_run, labels) for of_run in logits)
        grads = torch.autograd.grad(loss, list(stack.params.values()))  # type: ignore[arg-type]
        for model, batch, ours in zip(models, batches, logits, strict=True):
            theirs = model.train()(batch)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
            model.zero_grad()
            F.cross_entropy(theirs, labels).backward()
        with torch.no_grad():
            for param, grad in zip(stack.params.values(), grads, strict=True):
                param -= 0.1 * grad
            for parameter in (p for model in models for p in model.parameters() if p.requires_grad):
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    shared = architecture.example(8, generator)
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        _, logits = stack(shared, train=False, outputs=outputs)
    assert list(outputs) == list(stack.blocks)
    for r, model in enumerate(models):
        torch.testing.assert_close(logits[r], model.eval()(shared), rtol=1e-3, atol=1e-4)
        state = stack.state_dict(r)
        assert list(state) == list(model.state_dict())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    if kind != "alone":
        single = stack.select(torch.tensor([1]))
        torch.testing.assert_close(single(shared, train=False)[1], logits[1:].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", [of("Transformer", options='{"dropout": 0.1}'), of("recurrent", TOKENS)])
def test_runs_that_draw_random_numbers_are_alone(architecture: Architecture) -> None:
    before = torch.get_rng_state()
    form = form_of(architecture, "fp32", PLUGINS)
    assert (form.kind, form.reason) == ("alone", "it draws random numbers in training")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_model_counts_in_an_attribute_is_not_frozen() -> None:
    form = form_of(of("Counting"), "fp32", PLUGINS)
    assert (form.kind, form.reason) == ("alone", "it changes steps, which is no parameter or buffer")


def test_a_model_that_fills_a_processor_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_MOST_PARAMETERS", 10)
    form = form_of(of("ResNet", width=3), "fp32", PLUGINS)
    assert form.kind == "alone"
    assert form.reason.endswith("parameters keep a processor busy")


@pytest.mark.parametrize("model", ["ResNet", "Transformer", "Controlled"])
def test_in_bfloat16_all_but_the_head_is_rounded(model: str) -> None:
    models = [build(of(model), 0, PLUGINS)] * (1 if model == "Controlled" else 2)
    samples = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, half = (make_stack(models, of(model), CPU, precision, PLUGINS) for precision in ("fp32", "bf16"))
    features, logits = half(samples, train=True)
    expected = exact(samples, train=True)[1]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    head = dict(models[0].named_modules())["head"]
    of_head = F.linear(features[0].float(), head.weight, head.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(logits[0], of_head, rtol=1e-5, atol=1e-6)


def test_blocks_and_heads_are_found() -> None:
    assert parts_of(of("ResNet"), PLUGINS).blocks == ("stem", "layer1", "layer2", "layer3")
    parts = parts_of(of("Tokens", TOKENS), PLUGINS)
    assert (parts.head, parts.weight, parts.bias) == ("head", "head.weight", "head.bias")
    named = Plugins(given={"model": {"mine": lambda num_classes: _with_blocks(num_classes)}})
    assert parts_of(of("mine"), named).blocks == ("1",)


def _with_blocks(num_classes: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, num_classes))
    model.blocks = ["1"]  # type: ignore[assignment]
    return model


def test_frozen_and_tied_parameters() -> None:
    stack = make_stack([build(of("Tokens", TOKENS), 0, PLUGINS)] * 2, of("Tokens", TOKENS), CPU, "fp32", PLUGINS)
    assert list(stack.params) == ["embed.weight", "back.bias"]
    assert set(stack.buffers) == {"head.weight", "head.bias"}
    assert not stack.weight.requires_grad
    model = stack.model(1)
    assert isinstance(model, Tokens)
    assert model.back.weight is model.embed.weight


def test_the_seed_alone_makes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(num_classes: int) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, num_classes))
        model[3].bias.data.fill_(random.random() + np.random.rand())
        return model

    plugins = Plugins(given={"model": {"drawn": drawn}})
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    a, b, c = (build(of("drawn"), seed, plugins).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[union-attr]
    for name in a:
        assert torch.equal(a[name], b[name])
        assert not torch.equal(a[name], c[name])


def test_what_takes_any_argument_gets_the_number_of_classes() -> None:
    given: list[dict[str, Any]] = []

    def factory(depth: int = 1, **options: Any) -> nn.Module:
        given.append({"depth": depth, **options})
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    build(of("mine", options='{"depth": 3, "rate": 0.5}'), 0, Plugins(given={"model": {"mine": factory}}))
    assert given == [{"depth": 3, "num_classes": 4, "rate": 0.5}]


BAD = """
import torch
from torch import nn

def layers(last, **hidden):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), last)

def raises():
    raise KeyError("width")

def raises_forward(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(63, num_classes))

def returns_no_module():
    return [1]

def needs(num_classes, depth, *, width):
    return None

def takes(num_classes):
    return layers(nn.Linear(6, num_classes))

class Unused(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net, self.spare = layers(nn.Linear(6, num_classes)), nn.Linear(3, 3)
    def forward(self, x):
        return self.net(x)

class Soft(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = layers(nn.Linear(6, num_classes))
    def forward(self, x):
        return self.net(x).softmax(-1)

class Device(Soft):
    def forward(self, x):
        return self.net(x).to("meta")

class Loud(Soft):
    def forward(self, x):
        return self.net(x) if x.sum() > 1e9 else self.check(x)
    def check(self, x):
        raise RuntimeError("no such thing")

def wrong_shape():
    return layers(nn.Linear(6, 5))

def no_linear():
    return nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())

def not_finite(num_classes):
    model = layers(nn.Linear(6, num_classes))
    nn.init.constant_(model[1].weight, float("inf"))
    return model

def double(num_classes):
    return layers(nn.Linear(6, num_classes)).double()

def frozen(num_classes):
    return layers(nn.Linear(6, num_classes)).requires_grad_(False)

def on_meta(num_classes):
    return layers(nn.Linear(6, num_classes)).to("meta")
"""


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("raises", {}, r"bad.py, line 9: KeyError: 'width'"),
        (
            "raises_forward",
            {},
            r"model bad.py:raises_forward: RuntimeError: .*mat1 and mat2 shapes cannot be multiplied",
        ),
        ("returns_no_module", {}, r"\(bad.py, line 14\) must return a torch.nn.Module; it returned a list"),
        ("needs", {}, r"\(bad.py, line 17\) needs depth, width: give it in model_options"),
        ("takes", {"options": '{"depht": 3}'}, r"takes no argument 'depht'; it takes num_classes"),
        ("takes", {"width": 3}, r"takes no argument 'width'"),
        ("takes", {"head": "last"}, r"no module 'last'; .*linear layers: 1, 3"),
        ("Unused", {}, r"do not depend on its parameter spare.weight, which gets no gradient"),
        ("Soft", {}, r"\(bad.py, line 30\): the model must return the logits of its head net.3, without a softmax"),
        ("Device", {}, r"moves data to meta"),
        ("Loud", {}, r"bad.py, line 45: RuntimeError: no such thing"),
        ("wrong_shape", {}, r"must return logits \[B, K\] = \[8, 4\] .* it returns \[8, 5\]"),
        ("no_linear", {}, r"the head 0 must be a plain nn.Linear|the model has no linear layer|must make logits"),
        ("not_finite", {}, r"the cross-entropy of its first batch is nan"),
        ("double", {}, r"parameter 1.weight is torch.float64; ncollapse trains float32"),
        ("frozen", {}, r"has no parameter that is trained"),
        ("on_meta", {}, r"puts 1.weight on meta"),
    ],
)
def test_bad_models_are_refused_with_their_line(
    name: str, settings: dict[str, Any], text: str, tmp_path: Path, digits: Dataset
) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=text) as caught:
        try_model(of(f"bad.py:{name}", **settings), Plugins(tmp_path), digits.train_x[:8], torch.arange(8) % 4)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(caught.value, OwnCodeError) == name.lower().startswith(("raises", "loud"))


@pytest.mark.parametrize("model", ["ResNet", "Transformer", "Controlled"])
def test_good_models_are_not_refused(model: str, digits: Dataset) -> None:
    try_model(of(model), PLUGINS, digits.train_x[:8], torch.arange(8) % 4)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize(("model", "kind"), [("ResNet", IMAGES), ("Tokens", TOKENS)])
def test_rates_and_memory_are_those_of_the_runs_own_code(model: str, kind: Any) -> None:
    plugins = Plugins(given={"model": GIVEN, "loss": {"mine": _loss}})
    own = {"model": model, "loss": "mine", "optimizer": "torch.optim:NAdam"}
    runs = [RunConfig(code=plugins.code_of(own), lr=lr, **own) for lr in (0.1, 0.2)]  # type: ignore[arg-type]
    facts = DataFacts(kind[0], 4, 100, "", kind[1])
    key = StackKey.of(runs[0])
    rate = measure_rate(key, facts, 2, CPU, quick=True, runs=runs, plugins=plugins)
    assert rate is not None
    assert rate.steps > 0
    weights = sum(p.nbytes for p in build(Architecture.of(key, facts), 0, plugins).parameters())
    assert 5 * weights < bytes_per_run(key, facts, plugins) < 1e8


def test_a_program_of_the_layers_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of ncollapse are known to stack: no sweep of theirs waits for a trial."""
    monkeypatch.setattr(architectures, "find_parts", None)
    architecture = of("cnn", width=3)
    stack = make_stack([build(architecture, 0, PLUGINS)] * 2, architecture, CPU, "fp32", PLUGINS)
    assert isinstance(stack, Stack)
    assert form_of(architecture, "fp32", PLUGINS).kind == "layers"
