"""Where a network ends with the maximum over space, training takes the fused operation; nothing else does."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import interpreter
from ncollapse.kernels import pooled_head as fused
from ncollapse.train.networks import stacked_layers
from ncollapse.train.networks.forms import stacked_tensors
from ncollapse.train.networks.layer_graph import LayerGraph
from ncollapse.train.networks.model_parts import Parts
from ncollapse.train.networks.models import Classifier, build
from ncollapse.train.networks.stacked_layers import ForwardContext


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of the maps that the kernels take, in Triton's interpreter; on a CPU they take none."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton's kernels run on it: tests/gpu/test_pooled_head_gpu.py")
    shapes: list[torch.Size] = []

    def counted(maps: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        shapes.append(maps.shape)
        return pooled_head(maps, weight, bias)

    pooled_head = fused.pooled_head
    monkeypatch.setattr(fused, "pooled_head", counted)
    with interpreter.quiet():
        yield shapes


def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "why_no_kernel", lambda *tensors: None)


def step(graph: LayerGraph, context: ForwardContext, samples: Tensor) -> dict[str, Tensor]:
    """Features, logits, and the gradients of all parameters, the same samples for all runs."""
    params = {name: value for name, value in context.tensors.items() if value.requires_grad}
    features, logits = graph(samples, context)
    by = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(logits, list(params.values()), by)
    return {"features": features.detach(), "logits": logits.detach(), **dict(zip(params, grads, strict=True))}


def stacked(models: list[Classifier]) -> tuple[LayerGraph, ForwardContext]:
    tensors = stacked_tensors(models)
    for name, _ in models[0].named_parameters():
        tensors[name].requires_grad_()
    graph = LayerGraph(models[0], Parts.of(models[0]))
    return graph, ForwardContext(len(models), tensors, train=True)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_step_is_the_same_with_the_kernels(
    half: bool, taken: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, context = stacked([build("cnn", 1, 12, 3, seed, 4) for seed in range(2)])
    context, samples = dataclasses.replace(context, half=half), torch.randn(3, 1, 12, 12)
    before = step(graph, context, samples)
    assert taken == []
    on_kernels(monkeypatch)
    ours = step(graph, context, samples)
    assert taken == [(3, 2 * 8, 3, 3)]
    assert torch.equal(ours["features"], before["features"])
    assert ours["features"].dtype == (torch.bfloat16 if half else torch.float32)
    assert ours["logits"].dtype == torch.float32
    for name, value in before.items():
        # The maps' gradient is rounded once less, and truncated by the interpreter.
        torch.testing.assert_close(ours[name], value, rtol=0.05 if half else 1e-4, atol=0.05 if half else 1e-5)


def test_evaluation_and_watched_outputs_are_as_before(taken: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    graph, context = stacked([build("cnn", 1, 8, 3, 0, 4)])
    evaluating = dataclasses.replace(context, train=False)
    with torch.no_grad():
        before = graph(torch.ones(2, 1, 8, 8), evaluating)
        on_kernels(monkeypatch)
        after = graph(torch.ones(2, 1, 8, 8), evaluating)
        outputs: dict[str, Tensor] = {}
        graph(torch.ones(2, 1, 8, 8), dataclasses.replace(evaluating, outputs=outputs))
    assert taken == []
    assert len(outputs) == 2
    for ours, theirs in zip(after, before, strict=True):
        assert torch.equal(ours, theirs)


#: What follows the maps, and how many features come out of 4 maps of 3 × 3.
ENDINGS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "maximum": (lambda maps: torch.amax(maps, dim=(-1, -2)), 4),
    "mean": (lambda maps: maps.mean((2, 3)), 4),
    "flatten": (lambda maps: maps.flatten(1), 36),
    "twice": (lambda maps: torch.add(maps.amax((2, 3)), maps.amax((2, 3))), 4),
    "then ReLU": (lambda maps: torch.relu(maps.amax((-2, -1))), 4),
    "kept": (lambda maps: maps.amax((2, 3), keepdim=True).flatten(1), 4),
}


class Ending(nn.Module):
    """A convolution, and a way from its maps to the features."""

    def __init__(self, ending: str) -> None:
        super().__init__()
        self.convolution, self.end = nn.Conv2d(1, 4, 3), ENDINGS[ending][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.convolution(x))


@pytest.mark.parametrize("ending", ENDINGS)
def test_only_a_maximum_right_before_the_head(
    ending: str, taken: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    graph, context = stacked([Classifier(Ending(ending), ENDINGS[ending][1], 3)])
    samples = torch.randn(2, 1, 5, 5)
    before = step(graph, context, samples)
    on_kernels(monkeypatch)
    ours = step(graph, context, samples)
    assert bool(taken) == (ending == "maximum")
    for name, value in before.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_maps_that_the_kernels_refuse_take_torchs_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of the maximum and the head one after the other, and the same gradients."""
    maps, weight = torch.randn(2, 8, 3, 3, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    bias = torch.randn(2, 3, requires_grad=True)
    features, logits = stacked_layers.pooled_head(stacked_layers.Batch(maps), weight, bias)
    pooled = maps.amax((-2, -1)).unflatten(1, (2, 4)).transpose(0, 1)
    assert torch.equal(features, pooled)
    assert torch.equal(logits, stacked_layers.head(pooled, weight, bias))
    shared, _ = stacked_layers.pooled_head(stacked_layers.Batch(maps, shared=True), torch.randn(2, 3, 8), None)
    assert torch.equal(shared, maps.amax((-2, -1)).expand(2, 2, 8))
