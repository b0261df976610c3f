"""Runs in bfloat16 and tf32: which tensors are rounded, the exact law of the row sum, and networks that learn."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ncollapse import ufm
from ncollapse.kernels.newton_schulz.reference import ReferenceMatrices
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.networks import whole_module
from ncollapse.train.networks.model_parts import Parts
from ncollapse.train.networks.models import build
from ncollapse.train.networks.precision import arithmetic, exact_products, rounds_products
from ncollapse.train.networks.whole_module import WholeModule
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.columns import METRICS
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.lane import Lane, TrainingSamples
from ncollapse.train.training.loop import Training
from ncollapse.train.training.stack import Stack
from ncollapse.train.training.step import Step
from ncollapse.train.training.updates import make_updates

CPU = torch.device("cpu")
FASHION = Path(os.environ.get("NCOLLAPSE_DATA", "data"))
needs_fashion = pytest.mark.skipif(
    not (FASHION / "FashionMNIST" / "raw").is_dir(), reason="Fashion-MNIST is not in $NCOLLAPSE_DATA"
)


def trained(run: RunConfig, data: Dataset) -> tuple[Training, list[Evaluation]]:
    training = Training([run], data, CPU)
    return training, [event for event in training if isinstance(event, Evaluation)]


def stack_and_step(model: str, data: Dataset, precision: str, **settings: Any) -> tuple[Stack, Step, torch.Tensor]:
    run = RunConfig(model=model, width=8, precision=precision, **settings)  # type: ignore[arg-type]
    stack = Stack.of([build(model, data.channels, data.size, 10, 0, width=8)], CPU)
    return stack, Step([Lane(stack, make_updates(stack, [run], Plugins()), TrainingSamples(data))]), torch.arange(64)


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet9", "vit", "densenet"])
def test_bf16_forward_and_gradients_match_fp32_up_to_rounding(model: str, digits: Dataset) -> None:
    grads, outputs = [], []
    for precision in ("fp32", "bf16"):
        stack, step, batch = stack_and_step(model, digits, precision)
        features, logits = stack(digits.train_x[:64], train=True)
        # A transformer ends in a layer norm, which autocast leaves in float32.
        assert features.dtype == (torch.bfloat16 if precision == "bf16" and model != "vit" else torch.float32)
        assert logits.dtype == torch.float32
        outputs.append(logits.detach())
        step(batch)
        grads.append({name: p.grad for name, p in stack.params.items()})
        rounded = {name: p.grad.dtype == torch.bfloat16 for name, p in stack.params.items() if p.grad is not None}
        assert rounded == {name: name in stack.copies for name in stack.params}
        assert (len(stack.copies) > 0) == (precision == "bf16")
        assert not any(name.startswith("fc.") for name in stack.copies)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.05)
    assert not torch.equal(outputs[1], outputs[0])
    exact, half = (torch.cat([g.double().flatten() for g in of_run.values()]) for of_run in grads)  # type: ignore[union-attr]
    assert torch.dot(exact, half) / (exact.norm() * half.norm()) > 0.95  # rounding flips some ReLU gates


def test_copies_follow_the_weights(digits: Dataset) -> None:
    for optimizer in ("adam", "muon"):
        stack, step, batch = stack_and_step("cnn", digits, "bf16", optimizer=optimizer)
        before = {name: copy.clone() for name, copy in stack.copies.items()}
        for _ in range(3):
            step(batch)
        for name, copy in stack.copies.items():
            assert stack.params[name].dtype == torch.float32
            assert torch.equal(copy, stack.params[name].bfloat16())
            assert not torch.equal(copy, before[name])


def test_the_cpu_rounds_bf16_as_a_gpu_does(digits: Dataset) -> None:
    """Inputs in bfloat16, accumulated in float32, the result rounded once."""
    stack, _, _ = stack_and_step("cnn", digits, "bf16")
    _, logits = stack(digits.train_x[:8], train=False)
    x = digits.train_x[:8].bfloat16().double()
    norms = {name: value[0].double() for name, value in stack.tensors().items()}
    for i in (0, 1):
        weight = stack.copies[f"features.{i}.0.weight"][0].detach().double()
        x = torch.nn.functional.conv2d(x, weight, padding=1).bfloat16().double()
        gain, bias, mean, var = (
            norms[f"features.{i}.1.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = torch.nn.functional.batch_norm(x, mean, var, gain, bias, eps=1e-5).bfloat16().double()
        x = torch.nn.functional.max_pool2d(x.relu(), 2)
    expected = x.amax((-2, -1)) @ norms["fc.weight"].mT + norms["fc.bias"]
    torch.testing.assert_close(logits[0].double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("model", "optimizer", "precision"),
    [*itertools.product(["resnet9", "cnn"], ["sgdw"], ["fp32", "tf32", "bf16"]), ("vgg9", "sgd", "bf16")],
)
def test_the_row_sum_follows_theory(model: str, optimizer: str, precision: str, digits: Dataset) -> None:
    """Under SGDW the norm of Wᵀ1 ends at ∏(1 − η_t λ) of its start up to float32 rounding, in every network."""
    run = RunConfig(
        model=model, width=8, optimizer=optimizer, precision=precision,  # type: ignore[arg-type]
        lr=0.0679, weight_decay=0.05, epochs=6, limit=400,
    )  # fmt: skip
    _, events = trained(run, digits)
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(run.epochs) for _ in range(run.steps_per_epoch(400))]
    decay = {"weight_decay": run.weight_decay, "coupling": run.decay_coupling}
    factor = ufm.row_sum_factor(lrs, momentum=run.momentum, **decay)[-1]
    if optimizer == "sgdw":
        assert factor == pytest.approx(np.prod([1 - lr * run.weight_decay for lr in lrs]), rel=1e-12)
    start, end = (event.values["nc0"][0] ** 0.5 for event in (events[0], events[-1]))
    assert factor < 0.98
    assert end / start == pytest.approx(abs(factor), rel=1e-3)


def test_a_bf16_checkpoint_continues_bit_for_bit(digits: Dataset) -> None:
    sgd = RunConfig(model="cnn", lr=1e-2, epochs=4, limit=300, precision="bf16")
    runs = [sgd, dataclasses.replace(sgd, optimizer="adam")]
    whole = Training(runs, digits, CPU)
    *_, expected = (event for event in whole if isinstance(event, Evaluation))
    half = Training(runs, digits, CPU)
    checkpoint = next(half.checkpoint() for event in half if event == 2)
    resumed = Training(runs, digits, CPU, checkpoint=checkpoint)
    *_, last = (event for event in resumed if isinstance(event, Evaluation))
    assert last.values == expected.values
    for i in range(2):
        for name, value in whole.stack.state_dict(i).items():
            assert torch.equal(resumed.stack.state_dict(i)[name], value)


def test_arithmetic_is_set_and_restored() -> None:
    def flags() -> tuple[Any, ...]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision, matmul.fp32_precision

    before = flags()
    for precision, product in (("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")):
        with arithmetic(precision):
            assert flags() == (False, True, product, product)
            with exact_products():
                assert flags() == (False, True, product, "ieee")
            assert flags() == (False, True, product, product)
        assert flags() == before
    with pytest.raises(KeyError), arithmetic("tf32"):
        raise KeyError
    assert flags() == before


def test_muon_multiplies_the_heads_gradient_without_rounding(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the head itself: on a GPU tf32 would end the law of the row sum."""
    run, seen = RunConfig(model="mlp", optimizer="muonw", precision="tf32", limit=64), list[str]()
    step = Training([run], digits, CPU)._step
    products = ReferenceMatrices.orthogonalise

    def noted(self: Any, *arguments: Any) -> None:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        products(self, *arguments)

    monkeypatch.setattr(ReferenceMatrices, "orthogonalise", noted)
    with arithmetic("tf32"):
        step(torch.arange(16))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert set(seen) == {"ieee"}


@pytest.mark.parametrize(("model", "precision"), [("resnet9", "fp32"), ("resnet9", "bf16"), ("vgg9", "bf16")])
def test_small_networks_memorise_digits(model: str, precision: str, digits: Dataset) -> None:
    run = RunConfig(model=model, width=8, lr=0.02, epochs=16, limit=256, batch_size=32, precision=precision)  # type: ignore[arg-type]
    _, events = trained(run, digits)
    assert_learnt(events, 0.99)


def assert_learnt(events: list[Evaluation], accuracy: float) -> None:
    """Assert that the run fits the training data, collapses clearly, and has every metric."""
    first, last = ({name: values[0] for name, values in event.values.items()} for event in (events[0], events[-1]))
    assert set(last) == set(METRICS)
    assert all(np.isfinite(value) for value in last.values())
    assert last["train_accuracy"] >= accuracy
    assert last["nc1"] < 0.2 * first["nc1"]
    assert last["nc4"] < 0.06


@needs_fashion
@pytest.mark.parametrize(("model", "precision"), [("resnet9", "bf16"), ("vgg9", "fp32")])
def test_2000_images_of_fashion_mnist_are_memorised(model: str, precision: str) -> None:
    data = load("fashion-mnist", CPU, data_dir=FASHION, download=False)
    small = Dataset(data.train_x, data.train_y, data.val_x[:500], data.val_y[:500], data.classes, "")
    run = RunConfig(
        model=model, data="fashion-mnist", width=8, lr=0.02, weight_decay=5e-4, epochs=24, limit=2000, eval_every=24,
        optimizer="sgdw", precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip
    _, events = trained(run, small)
    assert_learnt(events, 0.99)
    assert events[-1].values["val_accuracy"][0] > 0.8
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(run.epochs) for _ in range(16)]
    start, end = (event.values["nc0"][0] ** 0.5 for event in (events[0], events[-1]))
    assert end / start == pytest.approx(np.prod([1 - lr * run.weight_decay for lr in lrs]), rel=1e-3)


def test_the_head_of_a_single_run_of_a_model_of_the_users_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are rounded, it is computed again, and gets the gradient."""

    class Rounding(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.01 * super().forward(x)

    module = nn.Sequential(nn.Linear(5, 6), Rounding(6, 3))
    program = WholeModule(module, Parts("1", "1.weight", "1.bias", ()), 1, vmapped=False)
    stack = Stack.of([module], torch.device("cpu"), program)
    x = torch.randn(4, 5)
    for rounds, factor in ((False, 1.01), (True, 1.0)):
        monkeypatch.setattr(whole_module, "rounds_products", lambda _, rounds=rounds: rounds)
        features, logits = stack(x, train=True)
        weight, bias = stack.rows["1.weight"], stack.rows["1.bias"]
        torch.testing.assert_close(logits[0], factor * (features[0] @ weight.T + bias))
        (grad,) = torch.autograd.grad(logits.sum(), weight)
        torch.testing.assert_close(grad, factor * features[0].sum(0).expand(3, 6))
    assert not rounds_products(torch.device("cpu"))
