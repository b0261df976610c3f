"""The side branch of captured graphs: the bits of a graph without it, streams of their own, memory that none reuses.

tests/train/test_side_stream.py compares the same convolutions with autograd's on a CPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_training import trained_in_graphs
from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.networks import side_stream
from ncollapse.train.networks.precision import arithmetic
from ncollapse.train.networks.side_stream import main_stream
from side_stream_cases import CASES, Layer, gradients, layer

HALF = {"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}
LARGE = [
    Layer(inputs=64, outputs=128, **HALF),
    Layer(inputs=512, outputs=512, **HALF),
    Layer(runs=2, inputs=64, outputs=64, bias=True, **HALF),
]


def captured(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Call some work, by which libraries choose their kernels, then record it; return its graph and its results."""
    with arithmetic("bf16"):
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=main_stream()):
            results = work()
    return graph, results


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.cuda.Stream]]:
    """The streams on which gradients of maps, and of weights, are computed within graphs."""
    found: dict[str, list[torch.cuda.Stream]] = {"maps": [], "weights": []}
    compute = side_stream._gradients

    def recorded(*arguments: Any) -> Any:
        found["maps" if arguments[-1][0] else "weights"].append(torch.cuda.current_stream())
        return compute(*arguments)

    monkeypatch.setattr(side_stream, "_gradients", recorded)
    return found


@pytest.mark.parametrize("maps", [3, 14])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_the_bits_are_those_without(
    case: Layer, maps: int, device: torch.device, monkeypatch: pytest.MonkeyPatch,
    seen: dict[str, list[torch.cuda.Stream]],
) -> None:  # fmt: skip
    if maps == 3 and case.padding == 0 and case.size[0] > 1:
        maps = 5
    x, weight, bias = layer(case, device, maps)
    beside, found = captured(lambda: gradients(case, x, weight, bias))
    assert len(seen["weights"]) == len(seen["maps"]) == 1
    monkeypatch.setattr(side_stream, "BESIDE", False)
    without, expected = captured(lambda: gradients(case, x, weight, bias))
    for _ in range(5):
        with torch.no_grad():
            x.mul_(-0.5)
        for graph in (beside, without):
            graph.replay()
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.stride() == theirs.stride()
    with arithmetic("bf16"):
        for ours, theirs in zip(found, gradients(case, x, weight, bias), strict=True):
            assert torch.equal(ours, theirs)


def test_the_branch_has_a_stream_of_lower_priority(
    device: torch.device, seen: dict[str, list[torch.cuda.Stream]]
) -> None:
    x, weight, bias = layer(CASES[0], device)
    captured(lambda: gradients(CASES[0], x, weight, bias))
    (maps,), (weights,) = seen["maps"], seen["weights"]
    assert maps == main_stream()
    assert weights != maps
    assert maps.priority < weights.priority  # lower numbers go first


def test_runs_side_by_side_have_a_branch_each(device: torch.device, seen: dict[str, list[torch.cuda.Stream]]) -> None:
    given = [layer(case, device, 14) for case in LARGE[:2]]
    main, lanes = main_stream(), [main_stream(1), main_stream(2)]
    alone = [captured(lambda i=i: gradients(LARGE[i], *given[i])) for i in range(2)]
    seen["maps"].clear()
    seen["weights"].clear()

    def together() -> list[tuple[Tensor, ...]]:
        results = []
        for i, lane in enumerate(lanes):
            lane.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(lane):
                results.append(gradients(LARGE[i], *given[i]))
        for lane in lanes:
            torch.cuda.current_stream().wait_stream(lane)
        return results

    graph, results = captured(together)
    streams = [*seen["maps"], *seen["weights"], main]
    assert len({stream.cuda_stream for stream in streams}) == 5
    for _ in range(10):
        graph.replay()
        for (one, expected), found in zip(alone, results, strict=True):
            one.replay()
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_weight_of_two_layers_gets_the_sum(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd adds up where all of it is ready."""
    x, weight = torch.randn(64, 32, 14, 14, device=device), torch.randn(1, 32, 32, 3, 3, device=device) / 17
    weight.requires_grad_()

    def twice() -> tuple[Tensor, ...]:
        maps = side_stream.conv2d(x, weight, None, (1, 1), (1, 1), (1, 1), 1).relu_()
        out = side_stream.conv2d(maps, weight, None, (1, 1), (1, 1), (1, 1), 1)
        return torch.autograd.grad(out.square().sum() + weight.square().sum(), weight)

    beside, found = captured(twice)
    monkeypatch.setattr(side_stream, "BESIDE", False)
    without, expected = captured(twice)
    for _ in range(10):
        beside.replay()
        without.replay()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_a_forward_pass_alone_is_recorded(device: torch.device) -> None:
    x, weight, bias = layer(CASES[1], device)
    graph, out = captured(lambda: side_stream.conv2d(x, weight, bias, *CASES[1].settings).detach())
    graph.replay()
    with arithmetic("bf16"):
        assert torch.equal(out, side_stream.conv2d(x, weight, bias, *CASES[1].settings))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["resnet9", "vgg9"])
def test_networks_train_to_the_same_bits(
    model: str, precision: str, device: torch.device, monkeypatch: pytest.MonkeyPatch,
    seen: dict[str, list[torch.cuda.Stream]],
) -> None:  # fmt: skip
    """Batches of 128, 128 and 44: two graphs, whose memory is in use at the same time."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(320, 1, 28, 28, generator=generator).to(device), (torch.arange(320) % 10).to(device)
    data = Dataset(x[:300], y[:300], x[300:], y[300:], tuple("0123456789"), "")
    run = RunConfig(model=model, width=32, precision=precision, lr=0.01, epochs=8, eval_every=8)  # type: ignore[arg-type]

    found = trained_in_graphs(run, data, device)
    assert {s.cuda_stream for s in seen["maps"]} == {main_stream().cuda_stream}
    assert seen["weights"]
    assert main_stream() not in seen["weights"]
    monkeypatch.setattr(side_stream, "BESIDE", False)
    for name, theirs in trained_in_graphs(run, data, device).items():
        assert torch.equal(found[name], theirs), name
