"""Convolutions of maps of few pixels on a GPU: in CUDA graphs, on two streams, in training, without synchronisation.

tests/kernels/test_convolution.py compares the same kernels with float64.
"""

import pytest
import torch
from torch import Tensor

from gpu_training import trained_in_graphs
from ncollapse.kernels.convolution import fits, op, small_convolution, small_convolution_input_grad
from ncollapse.kernels.convolution.reference import (
    small_convolution_input_grad_reference,
    small_convolution_reference,
)
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.networks import side_stream
from ncollapse.train.networks.precision import arithmetic
from waiting import nothing_waits


def tensors(device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps of 512 channels, and weights whose products are about as large."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(128, 512, 3, 3, generator=generator), torch.randn(512, 512, 3, 3, generator=generator) / 50

    def half(t: Tensor) -> Tensor:
        return t.to(device, torch.bfloat16).contiguous(memory_format=torch.channels_last)

    return half(x), half(weight)


def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return small_convolution(x, weight), small_convolution_input_grad(x, weight)


def test_equals_cudnns(device: torch.device) -> None:
    """Up to a rounding to bfloat16."""
    x, weight = tensors(device)
    if not fits(x, weight, (1, 1), (1, 1), (1, 1), 1):
        pytest.skip("this GPU has no kernels for it")
    theirs = small_convolution_reference(x, weight), small_convolution_input_grad_reference(x, weight)
    for ours, their in zip(both(x, weight), theirs, strict=True):
        torch.testing.assert_close(ours, their, rtol=2**-7, atol=1e-3)
        assert ours.stride() == their.stride()


def test_a_replayed_cuda_graph_gives_the_same_bits(device: torch.device) -> None:
    static, weight = tensors(device)
    both(static, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = both(static, weight)
    for seed in range(1, 6):
        static.copy_(tensors(device, seed)[0])
        graph.replay()
        for replayed, eager in zip(outputs, both(static, weight), strict=True):
            assert torch.equal(replayed, eager)


def test_branches_of_a_graph_do_not_disturb_each_other(device: torch.device) -> None:
    """Each has parts of its own."""
    given = [tensors(device, seed) for seed in range(2)]
    expected = [both(*each) for each in given]
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream(device) for _ in given]
    with torch.cuda.graph(graph):
        found = []
        for stream, each in zip(streams, given, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append([both(*each) for _ in range(4)])
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
    for _ in range(10):
        graph.replay()
        for results, right in zip(found, expected, strict=True):
            for result in results:
                assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, right, strict=True))


def test_does_not_wait_for_the_gpu(device: torch.device) -> None:
    x, weight = tensors(device)
    both(x, weight)
    with nothing_waits():
        fits(x, weight, (1, 1), (1, 1), (1, 1), 1)
        both(x, weight)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The switches turned on; for each call of a kernel, whether it was for a gradient."""
    called: list[bool] = []
    compute = op._computed

    def recorded(x: Tensor, weight: Tensor, *, flip: bool) -> Tensor:
        called.append(flip)
        return compute(x, weight, flip=flip)

    monkeypatch.setattr(op, "_computed", recorded)
    monkeypatch.setattr(op, "VALUES", True)
    monkeypatch.setattr(op, "GRADIENTS", True)
    return called


def layer(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The result of a layer of the trainer's, and the gradients of maps and weights."""
    leaves = x.detach().requires_grad_(), weight.detach()[None].requires_grad_()
    with arithmetic("bf16"):
        out = side_stream.conv2d(*leaves, None, (1, 1), (1, 1), (1, 1), 1)
        return out.detach(), *torch.autograd.grad(out, leaves, x)


def test_a_layer_of_the_trainers(device: torch.device, ours: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the side branch of a graph, eagerly, and without the kernels."""
    given = tensors(device)
    if not fits(*given, (1, 1), (1, 1), (1, 1), 1):
        pytest.skip("this GPU has no kernels for it")
    eager = layer(*given)
    assert ours == [False, True]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side_stream.main_stream()):
        captured = layer(*given)
    graph.replay()
    assert ours == [False, True] * 2
    for name in ("VALUES", "GRADIENTS"):
        monkeypatch.setattr(op, name, False)
    theirs = layer(*given)
    assert ours == [False, True] * 2
    for one, other, cudnns in zip(eager, captured, theirs, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == cudnns.stride()
        torch.testing.assert_close(one, cudnns, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("model", ["resnet9", "vgg9"])
def test_networks_train_to_the_same_bits(model: str, device: torch.device, ours: list[bool]) -> None:
    given = tensors(device)
    if not fits(*given, (1, 1), (1, 1), (1, 1), 1):
        pytest.skip("this GPU has no kernels for it")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 1, 28, 28, generator=generator).to(device), (torch.arange(256) % 10).to(device)
    data = Dataset(x, y, x[:20], y[:20], tuple("0123456789"), "")
    run = RunConfig(model=model, width=32, precision="bf16", lr=1e-3, epochs=8, eval_every=8)  # type: ignore[arg-type]

    first = trained_in_graphs(run, data, device)
    assert set(ours) == {False, True}
    for name, value in trained_in_graphs(run, data, device).items():
        assert torch.equal(value, first[name]), name
