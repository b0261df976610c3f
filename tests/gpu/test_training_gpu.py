"""Training on a GPU: replayed CUDA graphs equal single steps, the last batch included; checkpoints; networks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse.optimizer_table import PAPER_OPTIMIZERS
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.networks.models import build
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.networks.stacked_layers import convolve
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training import step
from ncollapse.train.training.loop import Training


def data_on(device: torch.device) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 8, 8, generator=generator)
    y = (x.flatten(1).sum(1) > 0).long() + 2 * (x[:, 0, 0, 0] > 0).long()
    return Dataset(*(part.to(device) for part in (x[:260], y[:260], x[260:], y[260:])), tuple("0123"), "")  # type: ignore[arg-type]


def trained(
    runs: list[RunConfig], device: torch.device, checkpoint_at: int | None = None, plugins: Plugins | None = None
) -> tuple[Any, dict[str, Any]]:
    training = Training(runs, data_on(device), device, plugins=plugins)
    values: dict[str, Any] = {}
    for event in training:
        if isinstance(event, Evaluation):
            values = event.values
        elif event == checkpoint_at:
            training = Training(runs, data_on(device), device, checkpoint=training.checkpoint(), plugins=plugins)
            *_, last = (e for e in training if isinstance(e, Evaluation))
            return training, last.values
    return training, values


def stack_of(model: str) -> list[RunConfig]:
    """Return a run for each optimizer, with batches of 128, 128 and 4; learning rates drop at epochs 3 and 6."""
    return [
        RunConfig(model=model, optimizer=name, lr=1e-2 if name.startswith("sgd") else 1e-3, epochs=9, eval_every=9)  # type: ignore[arg-type]
        for name in PAPER_OPTIMIZERS
    ]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_graphs_train_as_single_steps_do(model: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = stack_of(model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    captured, values = trained(runs, device)
    assert len(captured._step._replays) == 2
    monkeypatch.setattr(step, "_WARM_UP", 10**9)
    eager, expected = trained(runs, device)
    assert not eager._step._replays
    for i, run in enumerate(runs):
        # A GPU may sum in another order, which may flip a sign.
        bound = 2e-2 if run.family != "sgd" else 1e-4
        for name, theirs in eager.stack.state_dict(i).items():
            torch.testing.assert_close(captured.stack.state_dict(i)[name], theirs, rtol=bound, atol=bound)
        assert values["train_loss"][i] == pytest.approx(expected["train_loss"][i], rel=5 * bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_layer_is_a_convolution(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    images = torch.randn(128, channels, 28, 28, device=device).to(dtype)
    weight = torch.randn(64, channels, 3, 3, device=device).to(dtype).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    with arithmetic("fp32"):
        maps = convolve(images, weight, (1, 1))
        expected = torch.nn.functional.conv2d(images.double(), exact, padding=1)
        grad = torch.randn_like(maps)
        maps.backward(grad)
    expected.backward(grad.double())
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in ((maps, expected), (weight.grad, exact.grad)):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    assert maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("model", ["resnet9", "vgg9"])
def test_the_same_seed_gives_the_same_bits(model: str, precision: str, device: torch.device) -> None:
    """Twice, and from a checkpoint up to rounding; the row sum of SGDW follows theory."""
    run = RunConfig(
        model=model, width=16, precision=precision, optimizer="sgdw", lr=0.02, weight_decay=0.05,  # type: ignore[arg-type]
        epochs=6, eval_every=6,
    )  # fmt: skip
    first, values = trained([run], device)
    again, same = trained([run], device)
    resumed, later = trained([run], device, checkpoint_at=3)
    assert values == same
    for name, theirs in first.stack.state_dict(0).items():
        assert torch.equal(again.stack.state_dict(0)[name], theirs), name
        # Graphs are captured again, and libraries may choose other kernels: equal up to rounding.
        torch.testing.assert_close(resumed.stack.state_dict(0)[name], theirs, rtol=1e-2, atol=1e-2)
    assert later["train_loss"] == pytest.approx(values["train_loss"], rel=0.05)
    start = build(model, 1, 8, 4, 0, width=16).fc.weight.detach().sum(0).norm().item()
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(6) for _ in range(3)]
    factor = math.prod(1 - lr * run.weight_decay for lr in lrs)
    assert values["nc0"][0] ** 0.5 == pytest.approx(factor * start, rel=1e-3)


@pytest.mark.parametrize("model", ["vit", "densenet"])
def test_networks_of_any_layers_train_in_graphs(model: str, device: torch.device) -> None:
    run = RunConfig(model=model, width=16, precision="bf16", epochs=6, eval_every=6, lr=0.01)  # type: ignore[arg-type]
    training, values = trained([run], device)
    assert len(training._step._replays) == 2
    assert values == trained([run], device)[1]


def test_augmentation_and_muon_train_in_graphs(device: torch.device) -> None:
    run = RunConfig(model="cnn", optimizer="muonw", augment="flip-crop", epochs=6, eval_every=6, lr=1e-3)
    training, values = trained([run], device)
    assert len(training._step._replays) == 2
    assert values == trained([run], device)[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("optimizer", ["sgd", "muonw"])
def test_a_gpu_need_not_be_the_current_one(optimizer: str) -> None:
    run = RunConfig(model="resnet9", width=16, precision="bf16", optimizer=optimizer, epochs=6, eval_every=6, lr=1e-3)  # type: ignore[arg-type]
    assert torch.cuda.current_device() == 0
    training, values = trained([run], torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    assert len(training._step._replays) == 2
    assert values["train_loss"] == pytest.approx(trained([run], torch.device("cuda", 0))[1]["train_loss"], rel=0.05)


def test_a_checkpoint_continues_on_a_gpu(device: torch.device) -> None:
    whole, values = trained(stack_of("mlp"), device)
    resumed, again = trained(stack_of("mlp"), device, checkpoint_at=4)
    assert resumed.epoch == whole.epoch == 9
    assert again["train_loss"] == pytest.approx(values["train_loss"], rel=0.05)


def test_finished_runs_leave_the_graph(device: torch.device) -> None:
    runs = [RunConfig(epochs=epochs, eval_every=20) for epochs in (6, 12, 12)]
    training, values = trained(runs, device)
    assert training.stack.runs == 2
    assert all(loss < 1.4 for loss in values["train_loss"])


@pytest.mark.parametrize(
    ("optimizer", "holds"),
    [("torch.optim:AdamW", "forward pass, backward pass and update"), ("torch.optim:Adagrad", "forward and backward")],
)
def test_other_optimizers_train_with_graphs_as_without(
    optimizer: str, holds: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule reaches an update within a graph, and one after it; a checkpoint continues."""
    runs = [RunConfig(model="mlp", optimizer=optimizer, lr=lr, epochs=9, eval_every=9) for lr in (1e-3, 3e-3)]
    captured, values = trained(runs, device)
    assert captured._step.captured.startswith(holds)
    assert len(captured._step._replays) == 2
    _, resumed = trained(runs, device, checkpoint_at=4)
    monkeypatch.setattr(step, "_WARM_UP", 10**9)
    _, expected = trained(runs, device)
    for found in (values, resumed):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)


class Scaled(nn.Module):
    """A parameter that no layer holds: a single run is computed by the module itself."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.head, self.scale = nn.Linear(64, 16), nn.Linear(16, num_classes), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.hidden(x.flatten(1)) * self.scale).relu())


class Waiting(Scaled):
    """Makes a tensor of a number, for which the processor waits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.tensor(0.5, device=x.device))


class Recurrent(nn.Module):
    """cuDNN moves its weights into memory of their own."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, 0])[0][:, -1])


def chosen(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy by a mask as index, for which the processor waits."""
    return -logits.log_softmax(-1)[nn.functional.one_hot(labels, logits.shape[-1]).bool()]


GIVEN: dict[str, Any] = {
    "model": {"scaled": Scaled, "waiting": Waiting, "recurrent": Recurrent}, "loss": {"chosen": chosen},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("optimizer", ["sgd", "torch.optim:Adagrad", "torch.optim:AdamW"])
@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({"model": "scaled"}, "forward"),
        ({"model": "scaled", "loss": "chosen"}, "nothing: it waits for the GPU (test_training_gpu.py, line "),
        ({"model": "waiting"}, "nothing: it waits for the GPU (test_training_gpu.py, line "),
        ({"model": "recurrent"}, "nothing"),
    ],
    ids=["graph", "loss", "model", "lstm"],
)
def test_a_run_of_a_model_of_the_users_trains_as_on_the_cpu(
    settings: dict[str, Any], holds: str, optimizer: str, device: torch.device
) -> None:
    """With a graph or without; a checkpoint continues, with the schedule of its learning rate."""
    plugins = Plugins(given=GIVEN)
    run = RunConfig(code=plugins.code_of(settings), optimizer=optimizer, lr=3e-3, epochs=9, eval_every=9, **settings)
    training, values = trained([run], device, plugins=plugins)
    assert training._step.captured.startswith(holds)
    _, resumed = trained([run], device, checkpoint_at=4, plugins=plugins)
    _, expected = trained([run], torch.device("cpu"), plugins=plugins)
    for found in (values, resumed):
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)


def test_the_head_of_a_model_of_the_users_is_exact_in_tf32(device: torch.device) -> None:
    plugins = Plugins(given=GIVEN)
    run = RunConfig(model="scaled", precision="tf32", code=plugins.code_of({"model": "scaled"}), epochs=1)
    training, _ = trained([run], device, plugins=plugins)
    with torch.no_grad(), arithmetic("tf32"):
        features, logits = training.stack(data_on(device).val_x, train=False)
    tensors = {name: value[0].double() for name, value in training.stack.tensors().items()}
    expected = features[0].double() @ tensors["head.weight"].T + tensors["head.bias"]
    assert (logits[0].double() - expected).norm() <= 1e-6 * expected.norm()
