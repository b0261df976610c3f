"""The gradient of the cross-entropy on a GPU: in CUDA graphs and compiled functions, without synchronisation.

tests/kernels/test_cross_entropy.py compares the same kernel with float64.
"""

import pytest
import torch
from torch import Tensor

from ncollapse.kernels.cross_entropy import cross_entropy_grad
from ncollapse.kernels.cross_entropy.reference import cross_entropy_grad_reference
from waiting import nothing_waits


def logits_and_labels(runs: int, batch: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(runs, batch, classes, device=device), torch.randint(classes, (runs, batch), device=device)


def test_in_a_cuda_graph_without_synchronisation(device: torch.device) -> None:
    logits, labels = logits_and_labels(24, 128, 10, device)
    cross_entropy_grad(logits, labels)
    graph = torch.cuda.CUDAGraph()
    with nothing_waits(), torch.cuda.graph(graph):
        ours = cross_entropy_grad(logits, labels)
    other_logits, other_labels = logits_and_labels(24, 128, 10, device)
    logits.copy_(other_logits)
    labels.copy_(other_labels)
    graph.replay()
    assert torch.equal(ours, cross_entropy_grad(other_logits, other_labels))


def test_in_a_compiled_function(device: torch.device) -> None:
    logits, labels = logits_and_labels(24, 128, 10, device)
    compiled = torch.compile(cross_entropy_grad, fullgraph=True)
    assert torch.equal(compiled(logits, labels), cross_entropy_grad(logits, labels))


@pytest.mark.usefixtures("no_warning_given_yet")
def test_more_classes_than_the_kernel_takes(device: torch.device) -> None:
    logits, labels = logits_and_labels(1, 7, 1025, device)
    with pytest.warns(UserWarning, match="there are more than 1024 classes"):
        ours = cross_entropy_grad(logits, labels)
    torch.testing.assert_close(ours, cross_entropy_grad_reference(logits, labels))
