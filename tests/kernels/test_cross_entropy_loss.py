"""`ncollapse.cross_entropy`: torch's loss and gradient, and what torch's gradient gets wrong near collapse."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ncollapse
from ncollapse import metrics, optim, ufm
from ncollapse.kernels.cross_entropy import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(7, 2), (5, 10), (3, 1), (2, 6, 4)], ids=str)
def test_it_is_the_loss_of_torch_and_its_gradient(shape: tuple[int, ...], smoothing: float) -> None:
    logits = (3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(shape[-1], shape[:-1], dtype=torch.int32)
    theirs = torch.stack(
        [
            F.cross_entropy(x, y.long(), label_smoothing=smoothing)
            for x, y in zip(logits.view(-1, *shape[-2:]), labels.view(-1, shape[-2]), strict=True)
        ]
    )
    ours = cross_entropy(logits, labels, smoothing)
    assert ours.shape == shape[:-2]
    torch.testing.assert_close(ours.reshape(-1), theirs)
    weights = torch.randn(theirs.shape, dtype=torch.float64)
    (ours_grad,) = torch.autograd.grad((ours * weights.view(ours.shape)).sum(), logits)
    (their_grad,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(ours_grad, their_grad, rtol=1e-10, atol=1e-14)
    assert ncollapse.cross_entropy is cross_entropy
    if len(shape) == 3:
        shared = cross_entropy(logits, labels[0], smoothing)
        torch.testing.assert_close(shared[0], ours[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_of_two_classes_the_row_sum_is_zero_in_every_bit(dtype: torch.dtype) -> None:
    logits = (20 * torch.randn(500, 2)).to(dtype).requires_grad_()
    loss = cross_entropy(logits, torch.randint(2, (500,)))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.dtype == dtype
    assert torch.equal(grad[:, 0], -grad[:, 1])


def test_loss_and_gradient_keep_their_digits_near_zero() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(2 * math.exp(-30), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    expected = [-2 * math.exp(-30), math.exp(-30), math.exp(-30)]
    assert logits.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def nc0_after(loss: object, k: int, steps: int, decay: float) -> tuple[float, float]:
    """NC0 of a network's last layer after steps of SignumW, and its bound."""
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    y = torch.bucketize(x[:, 0].contiguous(), torch.tensor([-0.4, 0.4] if k == 3 else [0.0]))
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, k))
    head: Tensor = net[2].weight
    start = metrics.nc0(head.detach()).item()
    ours = optim.SignumW([head], lr=0.05, weight_decay=decay, momentum=0.0)
    rest = torch.optim.SGD([p for p in net.parameters() if p is not head], lr=0.1)
    for _ in range(steps):
        net.zero_grad()
        loss(net(x), y).backward()  # type: ignore[operator]
        ours.step()
        rest.step()
    predicted = ufm.predict("signumw", k, 32, start=start, lr=0.05, steps=steps, weight_decay=decay)
    assert predicted is not None
    return metrics.nc0(head.detach()).item(), float(predicted.nc0[-1])


@pytest.mark.parametrize(("k", "decay"), [(2, 0.002), (2, 0.01), (3, 0.005)])
def test_a_sign_makes_steps_of_the_rounding_errors_of_torch(k: int, decay: float) -> None:
    ours, bound = nc0_after(cross_entropy, k, 600, decay)
    assert ours <= bound * (1 + 1e-3)
    theirs, _ = nc0_after(F.cross_entropy, k, 600, decay)
    assert theirs > 2 * bound


@pytest.mark.parametrize(
    ("logits", "labels", "smoothing", "error", "words"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 0.0, ValueError, r"got \(3,\) and \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(2).long(), 0.0, ValueError, r"got \(3, 2\) and \(2,\)"),
        (torch.zeros(3, 2), torch.zeros(3), 0.0, TypeError, "integer labels; got torch.float32 and torch.float32"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), 0.0, TypeError, "floating logits"),
        (torch.zeros(3, 2), torch.tensor([0, 2, -1]), 0.0, ValueError, r"labels lie in \[0, 2\); got -1 to 2"),
        (torch.zeros(3, 2), torch.zeros(3).long(), 1.5, ValueError, r"lies in \[0, 1\]; got 1.5"),
    ],
)
def test_refuses_in_words(logits: Tensor, labels: Tensor, smoothing: float, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cross_entropy(logits, labels, smoothing)


def test_in_a_compiled_function() -> None:
    step = torch.compile(lambda x, y: cross_entropy(2 * x, y, 0.1), backend="aot_eager", fullgraph=True)
    logits, labels = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    (compiled,) = torch.autograd.grad(step(logits, labels), logits)
    (eager,) = torch.autograd.grad(cross_entropy(2 * logits, labels, 0.1), logits)
    torch.testing.assert_close(compiled, eager)
