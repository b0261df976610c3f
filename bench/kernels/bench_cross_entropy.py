"""The mean cross-entropy of R stacked runs with its gradient, whose row sum is zero, beside torch's.

`gradient` is `kernels.cross_entropy_grad` alone (a kernel on a GPU, on a CPU the reference) beside softmax − one-hot.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.conftest import DEVICE
from ncollapse.kernels.cross_entropy import cross_entropy, cross_entropy_grad

#: Of loss and gradient from float64, ‖difference‖/‖value‖.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """Logits `[runs, samples, classes]`."""

    runs: int
    samples: int
    classes: int
    what: str  # "loss" or "gradient"

    def __str__(self) -> str:
        said = "loss and gradient" if self.what == "loss" else "gradient"
        return f"cross-entropy [{self.runs}, {self.samples}, {self.classes}], {said}"


def cases(device: str, *, everything: bool) -> list[tuple[Case, tuple[str, ...]]]:
    shapes = [(1, 128, 10), (24, 128, 10), (1, 1024, 1000)]
    shapes += [(24, 512, 10), (8, 1024, 1000)] if everything else []
    return [(Case(*shape, what), ("nc", "torch")) for what in ("loss", "gradient") for shape in shapes]


def marks(name: str) -> list[pytest.MarkDecorator]:
    return []


def torchs_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of each run, `[R]`."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def torchs_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    grad = logits.softmax(-1)
    label = labels.unsqueeze(-1)
    return grad.scatter_add_(-1, label, torch.full_like(label, -1, dtype=grad.dtype)).div_(logits.shape[1])


_WAYS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "loss": {"nc": cross_entropy, "torch": torchs_loss},
    "gradient": {"nc": cross_entropy_grad, "torch": torchs_gradient},
}


class Prepared:
    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.logits = torch.randn(case.runs, case.samples, case.classes, device=DEVICE)
        self.labels = torch.randint(case.classes, (case.runs, case.samples), device=DEVICE)

    def step(self, way: Callable[[Tensor, Tensor], Tensor], logits: Tensor) -> tuple[Tensor, ...]:
        """The gradient, or loss and gradient."""
        if self.case.what == "gradient":
            return (way(logits, self.labels),)
        leaf = logits.detach().requires_grad_()
        losses = way(leaf, self.labels)
        return losses.detach(), *torch.autograd.grad(losses.sum(), leaf)


def test_cross_entropy(case: Case, name: str, prepared: Callable[[Case], Prepared], timed: Callable[..., None]) -> None:
    made, ways = prepared(case), _WAYS[case.what]
    exact = made.step(ways["torch"], made.logits.double())
    parts = zip(made.step(ways[name], made.logits), exact, strict=True)
    apart = max(float((one - right).norm() / right.norm()) for one, right in parts)
    assert apart <= _TOLERANCE, f"{name} is {apart:.1e} from float64"
    # The logits are read and their gradient written.
    timed(str(case), name, lambda: made.step(ways[name], made.logits), 2 * made.logits.nbytes, difference=apart)
