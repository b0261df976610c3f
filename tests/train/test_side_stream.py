"""Convolutions whose weights' gradients have a node of their own: on a CPU, where that node has no stream of its own.

tests/gpu/test_side_stream_gpu.py has the streams.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ncollapse.kernels.convolution import op as small
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.networks import side_stream
from ncollapse.train.training.loop import Training
from side_stream_cases import CASES, Layer, gradients, layer


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a captured graph, but for the stream."""
    monkeypatch.setattr(side_stream, "_forks", lambda x, weight: True)
    monkeypatch.setattr(side_stream, "_side_stream", nullcontext)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_are_autograds(case: Layer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    x, weight, bias = layer(case)
    expected = gradients(case, x, weight, bias)
    vector = None if bias is None else bias.view(-1).to(x.dtype)
    plain = F.conv2d(x, weight.flatten(0, 1).to(x.dtype), vector, *case.settings)
    assert torch.equal(expected[0], plain)
    request.getfixturevalue("forked")
    found = gradients(case, x, weight, bias)
    assert len(found) == len(expected) == (3 if bias is None else 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()


def test_padding_by_name_is_left_to_torch(forked: None) -> None:
    x, weight, _ = layer(CASES[0])
    out = side_stream.conv2d(x, weight, None, (1, 1), "same", (1, 1), 1)
    assert out.grad_fn is not None
    assert "Convolution" in out.grad_fn.name()


def run_twice(x: Tensor, weight: Tensor) -> Tensor:
    """A weight that two layers share, and a penalty on it."""
    maps = side_stream.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1).relu_()  # in place on the result
    return side_stream.conv2d(maps, weight, None, (1, 1), (1, 1), (1, 1), 1).square().sum() + weight.square().sum()


def test_a_weight_of_two_layers_gets_the_sum(request: pytest.FixtureRequest) -> None:
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(1, 4, 4, 3, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(run_twice(x, weight), weight)
    request.getfixturevalue("forked")
    (found,) = torch.autograd.grad(run_twice(x, weight), weight)
    torch.testing.assert_close(found, expected)


def test_what_needs_no_gradient_gets_none(forked: None) -> None:
    """The images, a frozen weight, or a frozen bias."""
    x, weight, bias = layer(Layer(bias=True))
    arguments = (1, 1), (1, 1), (1, 1), 1
    for taken in ({0}, {1}, {2}, {1, 2}):
        given = [t.detach().requires_grad_(i in taken) for i, t in enumerate((x, weight, bias))]
        out = side_stream.conv2d(*given, *arguments)  # type: ignore[arg-type]
        out.sum().backward()
        assert {i for i, t in enumerate(given) if t.grad is not None} == taken


def test_a_changed_input_is_refused_as_ever(forked: None) -> None:
    """The backward pass would read what is no longer there."""
    x, weight, _ = layer(CASES[0])
    maps = x.detach() * 1
    out = side_stream.conv2d(maps, weight, None, (1, 1), (1, 1), (1, 1), 1)
    maps.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_twice_are_refused(forked: None) -> None:
    x, weight, _ = layer(CASES[0])
    out = side_stream.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("in_graph", [False, True])
def test_maps_of_few_pixels_have_kernels_of_ours(
    in_graph: bool, values: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Whether values or gradients, in a captured graph or not; a bias leaves values to torch."""
    without, with_bias = layer(Layer()), layer(Layer(bias=True))
    expected = [gradients(Layer(), *without), gradients(Layer(bias=True), *with_bias)]
    called: list[str] = []

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        called.append("values")
        return F.conv2d(x, weight, padding=1)

    def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
        called.append("gradient")
        assert grad.is_contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(grad, weight, padding=1)

    monkeypatch.setattr(small, "VALUES", values)
    monkeypatch.setattr(small, "GRADIENTS", not values)
    monkeypatch.setattr(small, "fits", lambda x, weight, *settings: settings == ((1, 1), (1, 1), (1, 1), 1))
    monkeypatch.setattr(small, "small_convolution", convolution)
    monkeypatch.setattr(small, "small_convolution_input_grad", input_grad)
    if in_graph:
        request.getfixturevalue("forked")
    found = [gradients(Layer(), *without), gradients(Layer(bias=True), *with_bias)]
    assert called == (["values"] if values else ["gradient", "gradient"])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    strided = Layer(stride=2)
    gradients(strided, *layer(strided))
    assert len(called) == 2 - values


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("runs", [1, 2])
def test_a_network_trains_to_the_same_bits(
    runs: int, settings: dict[str, Any], digits: Dataset, request: pytest.FixtureRequest
) -> None:
    given = [
        RunConfig(model="resnet9", width=4, epochs=1, limit=64, batch_size=32, seed=seed, **settings)
        for seed in range(runs)
    ]

    def trained() -> dict[str, Tensor]:
        training = Training(given, digits, torch.device("cpu"))
        for _ in training:
            pass
        return training.stack.tensors()

    expected = trained()
    request.getfixturevalue("forked")
    for name, value in trained().items():
        assert torch.equal(value, expected[name]), name
