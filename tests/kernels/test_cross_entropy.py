"""The gradient of the cross-entropy: the kernel in Triton's interpreter (tests/gpu: on a GPU), and the function."""

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import interpreter
from ncollapse.kernels import operators
from ncollapse.kernels.cross_entropy import cross_entropy_slope, op
from ncollapse.kernels.cross_entropy.op import slope_op, why_no_kernel
from ncollapse.kernels.cross_entropy.reference import cross_entropy_slope_reference

SHAPES = [(1, 1, 2), (3, 37, 10), (2, 130, 3), (1, 5, 1), (2, 3, 1000), (1, 2, 1024), (24, 16, 10)]


def slope(logits: Tensor, labels: Tensor) -> Tensor:
    """By the kernel, or on a machine with a GPU by what CPUs use."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernel is tested on it (tests/gpu)")
    with interpreter.quiet():
        return slope_op(logits, labels)


def logits_and_labels(runs: int, batch: int, classes: int, size: float = 3.0) -> tuple[Tensor, Tensor]:
    return size * torch.randn(runs, batch, classes), torch.randint(classes, (runs, batch))


def exact(logits: Tensor, labels: Tensor) -> Tensor:
    """By autograd in float64."""
    x = logits.detach().double().requires_grad_()
    labels = labels.expand(x.shape[:2])
    losses = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return torch.autograd.grad(losses.mean(1).sum(), x)[0]


@pytest.mark.parametrize("shared", [False, True], ids=["labels of each run", "labels of all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel(shape: tuple[int, int, int], shared: bool) -> None:
    logits, labels = logits_and_labels(*shape)
    labels = labels[0] if shared else labels
    ours = slope(logits, labels)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    unit = 2**-23 / shape[1]
    torch.testing.assert_close(ours.double(), exact(logits, labels), rtol=2e-6, atol=2 * unit)
    torch.testing.assert_close(ours, cross_entropy_slope_reference(logits, labels), rtol=2e-6, atol=2 * unit)


@pytest.mark.parametrize("how", ["kernel", "function"])
@pytest.mark.parametrize("size", [0.01, 3.0, 200.0])
def test_it_adds_up_to_zero_over_the_classes(size: float, how: str) -> None:
    """To rounding of what a row holds, however small: a classifier's row sum moves by these sums."""
    for runs, batch, classes in ((3, 40, 10), (1, 64, 2), (2, 9, 1000)):
        logits, labels = logits_and_labels(runs, batch, classes, size)
        for right in (0.0, 12.0, 60.0):  # of the label's logit: a softmax that is 1 to some digits
            logits.scatter_add_(-1, labels.unsqueeze(-1), torch.full((runs, batch, 1), right))
            ours = (slope if how == "kernel" else cross_entropy_slope)(logits, labels).double()
            assert (ours.sum(-1).abs() <= 4 * 2**-23 * ours.abs().amax(-1)).all()
            theirs = cross_entropy_slope_reference(logits.double(), labels)
            torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=2**-126)


@pytest.mark.parametrize("layout", ["classes first", "samples first", "every other"])
def test_any_strides(layout: str) -> None:
    logits, labels = logits_and_labels(3, 20, 12)
    expected = slope(logits, labels)
    strided = {
        "classes first": lambda: logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "samples first": lambda: logits.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": lambda: logits.repeat_interleave(2, -1)[..., ::2],
    }[layout]()
    assert not strided.is_contiguous()
    assert torch.equal(slope(strided, labels.T.contiguous().T), expected)
    assert slope(strided, labels).is_contiguous()


def test_logits_that_exp_cannot_take() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-200.0, -201.0, -202.0], [3e38, 3e38, -3e38]]])
    labels = torch.tensor([1, 0, 2])
    torch.testing.assert_close(slope(logits, labels).double(), exact(logits, labels), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_row_alone(value: float) -> None:
    logits, labels = logits_and_labels(2, 30, 10)
    clean = slope(logits, labels)
    for k in (0, 9):
        spoilt = logits.clone()
        spoilt[1, 17, k] = value
        ours = slope(spoilt, labels)
        assert ours[1, 17].isnan().all()
        assert torch.equal(ours.isnan(), cross_entropy_slope(spoilt, labels).isnan())
        ours[1, 17] = clean[1, 17]
        assert torch.equal(ours, clean)
    logits[0, 0, 3] = -math.inf  # a class that is out of the question
    torch.testing.assert_close(
        slope(logits, labels), cross_entropy_slope_reference(logits, labels), rtol=2e-6, atol=1e-8
    )
    logits[0, 0] = -math.inf
    assert slope(logits, labels)[0, 0].isnan().all()


def test_no_sample() -> None:
    assert slope(torch.randn(3, 0, 10), torch.empty(0, dtype=torch.int64)).shape == (3, 0, 10)


@pytest.mark.parametrize("shared", [False, True], ids=["labels of each run", "labels of all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_on_a_cpu_it_is_softmax_minus_target(dtype: torch.dtype, shared: bool) -> None:
    """The label's entry to rounding, all others to the last bit."""
    logits, labels = logits_and_labels(3, 40, 10)
    logits, labels = logits.to(dtype).requires_grad_(), labels[0] if shared else labels
    targets = torch.eye(10, dtype=dtype)
    with torch.no_grad():
        target = targets[labels].expand_as(logits)
        plain = (logits.softmax(-1) - target) / logits.shape[1]
    ours = cross_entropy_slope(logits, labels)
    assert torch.equal(ours[target == 0], plain[target == 0])
    torch.testing.assert_close(ours, plain, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert ours.dtype == dtype
    assert not ours.requires_grad
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact(logits, labels))


def test_wrong_arguments() -> None:
    logits, labels = logits_and_labels(3, 40, 10)
    for wrong in ((logits[0], labels[0]), (logits, labels[:2]), (logits, labels[:, :9]), (logits, labels.int())):
        with pytest.raises(ValueError, match=r"takes logits \[R, B, K\] and int64 labels \[B\] or \[R, B\], not "):
            cross_entropy_slope(*wrong)
    with pytest.raises(ValueError, match="logits are on cpu, labels on meta"):
        cross_entropy_slope(logits, labels.to("meta"))
    with pytest.raises(RuntimeError, match=r"index 1. is out of bounds"):
        cross_entropy_slope(logits, labels + 10)


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_kernel(torch.randn(1, 2, 3, device="meta")) == "there is no kernel for meta tensors"
    monkeypatch.setattr(operators, "why_no_kernel", lambda device: None)
    assert why_no_kernel(torch.randn(1, 2, 1024)) is None
    assert why_no_kernel(torch.randn(1, 2, 1025)) == "there are more than 1024 classes"
    assert why_no_kernel(torch.randn(1, 2, 3).double()) == "there is no kernel for torch.float64 logits"


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_where_there_is_no_kernel_it_says_so(how: str) -> None:
    function = cross_entropy_slope
    if how == "compiled":
        function = torch.compile(cross_entropy_slope, fullgraph=True, backend="aot_eager")
    logits, labels = (t.to("meta") for t in logits_and_labels(3, 40, 10))
    operators._warned.clear()
    with pytest.warns(
        UserWarning, match="plain PyTorch takes the slope of the cross-entropy, slowly: there is no kern"
    ):
        assert function(logits, labels).shape == (3, 40, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(logits, labels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is tested there (tests/gpu)")
def test_the_operator() -> None:
    """Schema, fake tensor and tracing are checked by torch."""
    logits, labels = logits_and_labels(3, 40, 10)
    for arguments in ((logits, labels), (logits.transpose(0, 1).contiguous().transpose(0, 1), labels[0])):
        with interpreter.quiet():
            checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
            result = torch.library.opcheck(slope_op, arguments, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}
