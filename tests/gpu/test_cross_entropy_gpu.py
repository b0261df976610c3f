"""The gradient of the cross-entropy on the GPU: against float64, in CUDA graphs, without waiting."""

import math

import pytest
import torch
from torch import Tensor

from ncollapse.kernels.cross_entropy import cross_entropy_slope
from ncollapse.kernels.cross_entropy.reference import cross_entropy_slope_reference
from waiting import nothing_waits


def logits_and_labels(runs: int, batch: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (3 * torch.randn(runs, batch, classes)).to(device), torch.randint(classes, (runs, batch)).to(device)


@pytest.mark.parametrize("shared", [False, True], ids=["labels of each run", "labels of all"])
@pytest.mark.parametrize("shape", [(1, 128, 10), (24, 128, 10), (3, 1000, 100), (2, 77, 1000), (1, 1, 2)], ids=str)
def test_against_float64(device: torch.device, shape: tuple[int, int, int], shared: bool) -> None:
    logits, labels = logits_and_labels(*shape, device)
    labels = labels[0] if shared else labels
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    ours = cross_entropy_slope(logits, labels)
    unit = 2**-23 / shape[1]
    theirs = cross_entropy_slope_reference(logits.double(), labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=4e-6, atol=2 * unit)
    assert ours.double().sum(-1).abs().max() <= 4 * unit
    assert torch.equal(cross_entropy_slope(strided, labels), ours)
    assert ours.is_contiguous()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_row_alone(device: torch.device, value: float) -> None:
    logits, labels = logits_and_labels(2, 30, 10, device)
    clean = cross_entropy_slope(logits, labels)
    logits[1, 17, 3] = value
    ours = cross_entropy_slope(logits, labels)
    assert ours[1, 17].isnan().all()
    ours[1, 17] = clean[1, 17]
    assert torch.equal(ours, clean)


def test_in_a_cuda_graph_without_waiting_and_in_a_compiled_function(device: torch.device) -> None:
    logits, labels = logits_and_labels(24, 128, 10, device)
    cross_entropy_slope(logits, labels)
    graph = torch.cuda.CUDAGraph()
    with nothing_waits(), torch.cuda.graph(graph):
        ours = cross_entropy_slope(logits, labels)
    other, others = logits_and_labels(24, 128, 10, device)
    logits.copy_(other)
    labels.copy_(others)
    graph.replay()
    expected = cross_entropy_slope(other, others)
    assert torch.equal(ours, expected)
    assert torch.equal(torch.compile(cross_entropy_slope, fullgraph=True)(other, others), expected)


def test_more_classes_than_the_kernel_takes(device: torch.device) -> None:
    logits, labels = logits_and_labels(1, 7, 1025, device)
    with pytest.warns(UserWarning, match="there are more than 1024 classes"):
        ours = cross_entropy_slope(logits, labels)
    torch.testing.assert_close(ours, cross_entropy_slope_reference(logits, labels))
