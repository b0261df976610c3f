"""The gradient of the cross-entropy: the kernel, in Triton's interpreter and on a GPU, and the public function."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import interpreter
from devices import cases, only
from ncollapse.kernels import operators
from ncollapse.kernels.cross_entropy import cross_entropy_grad
from ncollapse.kernels.cross_entropy.op import grad_op, why_no_kernel
from ncollapse.kernels.cross_entropy.reference import cross_entropy_grad_reference

SHAPES = [(1, 1, 2), (3, 37, 10), (2, 130, 3), (1, 5, 1), (2, 3, 1000), (1, 2, 1024), (24, 16, 10)]
LARGE = [(1, 128, 10), (24, 128, 10), (3, 1000, 100), (2, 77, 1000)]
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["labels per run", "shared labels"])


def kernel(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The kernel: on a GPU through the public function, on the CPU in Triton's interpreter."""
    if logits.is_cuda:
        return cross_entropy_grad(logits, labels, label_smoothing)
    with interpreter.quiet():
        return grad_op(logits, labels, label_smoothing)


def logits_and_labels(
    runs: int, batch: int, classes: int, *, size: float = 3.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    return size * torch.randn(runs, batch, classes, device=device), torch.randint(classes, (runs, batch), device=device)


def exact(logits: Tensor, labels: Tensor) -> Tensor:
    """By autograd in float64."""
    x = logits.detach().double().requires_grad_()
    labels = labels.expand(x.shape[:2])
    losses = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return torch.autograd.grad(losses.mean(1).sum(), x)[0]


@shared_or_not
@cases("shape", SHAPES, LARGE)
def test_label_smoothing(device: torch.device, shape: tuple[int, int, int], shared: bool) -> None:
    logits, labels = logits_and_labels(*shape, device=device)
    labels = labels[0] if shared else labels
    for smoothing in (0.1, 1.0):
        x = logits.double().requires_grad_()
        losses = F.cross_entropy(
            x.flatten(0, 1), labels.expand(x.shape[:2]).flatten(), reduction="none", label_smoothing=smoothing
        )
        expected = torch.autograd.grad(losses.view(x.shape[:2]).mean(1).sum(), x)[0]
        for implementation in (kernel, cross_entropy_grad):
            ours = implementation(logits, labels, smoothing)
            torch.testing.assert_close(ours.double(), expected, rtol=4e-6, atol=2**-22 / shape[1])
            assert ours.double().sum(-1).abs().max() <= 2**-21 / shape[1]


@shared_or_not
@cases("shape", SHAPES, LARGE)
def test_the_kernel(device: torch.device, shape: tuple[int, int, int], shared: bool) -> None:
    logits, labels = logits_and_labels(*shape, device=device)
    labels = labels[0] if shared else labels
    ours = kernel(logits, labels)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    rtol, unit = 4e-6 if ours.is_cuda else 2e-6, 2**-23 / shape[1]
    torch.testing.assert_close(ours.double(), exact(logits, labels), rtol=rtol, atol=2 * unit)
    torch.testing.assert_close(ours, cross_entropy_grad_reference(logits, labels), rtol=rtol, atol=2 * unit)
    assert ours.double().sum(-1).abs().max() <= 4 * unit
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(kernel(strided, labels), ours)


@pytest.mark.parametrize("implementation", [kernel, cross_entropy_grad], ids=["kernel", "function"])
@pytest.mark.parametrize("size", [0.01, 3.0, 200.0])
@pytest.mark.parametrize("shape", [(3, 40, 10), (1, 64, 2), (2, 9, 1000)], ids=str)
def test_it_adds_up_to_zero_over_the_classes(
    device: torch.device, shape: tuple[int, int, int], size: float, implementation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Relative to the largest entry of the row, however small: these sums move the row sum of a classifier."""
    logits, labels = logits_and_labels(*shape, size=size, device=device)
    for extra in (0.0, 12.0, 60.0):  # added to the label's logit: its softmax becomes 1 up to rounding
        logits.scatter_add_(-1, labels.unsqueeze(-1), logits.new_full((*shape[:2], 1), extra))
        ours = implementation(logits, labels).double()
        assert (ours.sum(-1).abs() <= 4 * 2**-23 * ours.abs().amax(-1)).all()
        theirs = cross_entropy_grad_reference(logits.double(), labels)
        torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=2**-126)


@pytest.mark.parametrize("layout", ["classes first", "samples first", "every other"])
def test_any_strides(device: torch.device, layout: str) -> None:
    logits, labels = logits_and_labels(3, 20, 12, device=device)
    expected = kernel(logits, labels)
    strided = {
        "classes first": lambda: logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "samples first": lambda: logits.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": lambda: logits.repeat_interleave(2, -1)[..., ::2],
    }[layout]()
    assert not strided.is_contiguous()
    assert torch.equal(kernel(strided, labels.T.contiguous().T), expected)
    assert kernel(strided, labels).is_contiguous()


def test_logits_that_exp_cannot_take(device: torch.device) -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-200.0, -201.0, -202.0], [3e38, 3e38, -3e38]]], device=device)
    labels = torch.tensor([1, 0, 2], device=device)
    rtol = 4e-6 if device.type == "cuda" else 2e-6
    torch.testing.assert_close(kernel(logits, labels).double(), exact(logits, labels), rtol=rtol, atol=1e-8)


@pytest.mark.parametrize("k", [0, 3, 9])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_logit_affects_its_row_alone(device: torch.device, value: float, k: int) -> None:
    logits, labels = logits_and_labels(2, 30, 10, device=device)
    clean = kernel(logits, labels)
    logits[1, 17, k] = value
    ours = kernel(logits, labels)
    assert ours[1, 17].isnan().all()
    reference = cross_entropy_grad_reference(logits, labels)
    assert torch.equal(ours.isnan(), reference.isnan())
    ours[1, 17] = clean[1, 17]
    assert torch.equal(ours, clean)


def test_logits_of_minus_infinity(device: torch.device) -> None:
    """One gives its class no probability; a row of them gives NaN."""
    logits, labels = logits_and_labels(2, 30, 10, device=device)
    logits[0, 0, 3] = -math.inf
    rtol = 4e-6 if device.type == "cuda" else 2e-6
    torch.testing.assert_close(
        kernel(logits, labels), cross_entropy_grad_reference(logits, labels), rtol=rtol, atol=1e-8
    )
    logits[0, 0] = -math.inf
    assert kernel(logits, labels)[0, 0].isnan().all()


def test_no_samples(device: torch.device) -> None:
    logits, labels = logits_and_labels(3, 0, 10, device=device)
    assert kernel(logits, labels[0]).shape == (3, 0, 10)


@shared_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_on_a_cpu_it_equals_softmax_minus_target(dtype: torch.dtype, shared: bool) -> None:
    """With the same bits, except for the label's entry, which is equal up to rounding."""
    logits, labels = logits_and_labels(3, 40, 10)
    logits, labels = logits.to(dtype).requires_grad_(), labels[0] if shared else labels
    targets = torch.eye(10, dtype=dtype)
    with torch.no_grad():
        target = targets[labels].expand_as(logits)
        plain = (logits.softmax(-1) - target) / logits.shape[1]
    ours = cross_entropy_grad(logits, labels)
    assert torch.equal(ours[target == 0], plain[target == 0])
    torch.testing.assert_close(ours, plain, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert ours.dtype == dtype
    assert not ours.requires_grad
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact(logits, labels))


def wrong(name: str) -> tuple[Tensor, Tensor]:
    logits, labels = logits_and_labels(3, 40, 10)
    return {
        "no runs": (logits[0], labels[0]),
        "other runs": (logits, labels[:2]),
        "other samples": (logits, labels[:, :9]),
        "int32 labels": (logits, labels.int()),
    }[name]


@pytest.mark.parametrize("name", ["no runs", "other runs", "other samples", "int32 labels"])
def test_wrong_shapes_and_dtypes(name: str) -> None:
    with pytest.raises(ValueError, match=r"takes logits \[R, B, K\] and int64 labels \[B\] or \[R, B\], not "):
        cross_entropy_grad(*wrong(name))


def test_labels_on_another_device_and_out_of_range() -> None:
    logits, labels = logits_and_labels(3, 40, 10)
    with pytest.raises(ValueError, match="logits are on cpu, labels on meta"):
        cross_entropy_grad(logits, labels.to("meta"))
    with pytest.raises(RuntimeError, match=r"index 1. is out of bounds"):
        cross_entropy_grad(logits, labels + 10)


@pytest.mark.parametrize(
    ("classes", "dtype", "reason"),
    [
        (1024, torch.float32, None),
        (1025, torch.float32, "there are more than 1024 classes"),
        (3, torch.float64, "there is no kernel for torch.float64 logits"),
    ],
    ids=["most classes", "too many classes", "float64"],
)
def test_what_the_kernel_takes(
    classes: int, dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "why_no_kernel", lambda device: None)
    assert why_no_kernel(torch.randn(1, 2, classes, dtype=dtype)) == reason


def test_there_is_no_kernel_for_other_devices() -> None:
    assert why_no_kernel(torch.randn(1, 2, 3, device="meta")) == "there is no kernel for meta tensors"


@pytest.mark.usefixtures("no_warning_given_yet")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_it_warns_once_if_there_is_no_kernel(mode: str) -> None:
    function = cross_entropy_grad
    if mode == "compiled":
        function = torch.compile(cross_entropy_grad, fullgraph=True, backend="aot_eager")
    logits, labels = (t.to("meta") for t in logits_and_labels(3, 40, 10))
    with pytest.warns(
        UserWarning, match="plain PyTorch computes the gradient of the cross-entropy, slowly: there is no kern"
    ):
        assert function(logits, labels).shape == (3, 40, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(logits, labels)


@only("interpreter")
@shared_or_not
def test_the_operator(device: torch.device, shared: bool) -> None:
    """torch checks the schema, the fake tensor and the tracing."""
    logits, labels = logits_and_labels(3, 40, 10, device=device)
    logits, labels = logits.transpose(0, 1).contiguous().transpose(0, 1), labels[0] if shared else labels
    with interpreter.quiet():
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        result = torch.library.opcheck(grad_op, (logits, labels), test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}
