"""The batch-norm kernels in Triton's interpreter against torch's operations in float64.

The interpreter cuts bfloat16 and float16 off where a GPU rounds: maps are held to a whole unit in their last place, and
gradients arrive where no rounding decides what ReLU or pooling chooses.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import interpreter
from batch_norm_cases import (
    DTYPES,
    EPS,
    KINDS,
    MOMENTUM,
    Case,
    case,
    channels_last,
    check,
    close,
    forward,
    gradient,
    kernels,
    normalised,
    poisoned,
    run,
    same_bits,
)
from ncollapse.kernels.batch_norm import gpu
from ncollapse.kernels.batch_norm.op import moments_op
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are tested on it (tests/gpu)")

SHAPES = [(2, 3, 7, 7), (1, 64, 2, 3), (2, 100, 3, 2), (1, 1, 28, 28), (2, 64, 1, 1), (2, 1, 1, 2), (3, 130, 1, 7)]


def pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "kind"), [(s, k) for s in SHAPES for k in KINDS if k != "pool" or min(s[2:]) > 1], ids=str
)
def test_odd_shapes(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    given = case(shape, dtype, kind)
    grad = gradient(given)
    with poisoned():
        ours = run(kernels, given, grad)
    check(ours, given, grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 5, 512])
def test_sums_in_parts(parts: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last one is shorter, or has less than a tile."""
    monkeypatch.setattr(gpu, "PROGRAMS", parts)
    monkeypatch.setattr(gpu, "SUMMED", 64)
    monkeypatch.setattr(gpu, "WINDOWS", 32)
    given = case((2, 5, 9, 7), kind=kind, mean=30.0)
    grad = gradient(given, 1e-4)
    with poisoned():
        ours = run(kernels, given, grad)
    check(ours, given, grad)


def run_moments(*arguments: object) -> tuple[Tensor, Tensor]:
    with interpreter.quiet(), poisoned():
        return moments_op(*arguments)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, as the kernels have them."""
    running_mean, running_var = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
    mean, rstd = run_moments(x, running_mean, running_var, 1.0, 0.0)
    assert torch.equal(mean, running_mean)
    close("running_var", running_var * (1 - 1 / pixels(x)), rstd.double() ** -2, rtol=1e-6, atol=0.0)
    return mean, rstd.double() ** -2


@pytest.mark.parametrize("programs", [1, 9])
def test_the_variance_keeps_its_digits_far_from_zero(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean 1,000, spread 0.01, which float32 resolves in steps of 6e-5: E[x²] − E[x]² has an error of 0.1 here."""
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    x = case((4, 5, 31, 29), mean=1e3, std=1e-2).x
    mean, var = statistics(x)
    close("mean", mean, x.double().mean((0, 2, 3)), rtol=6e-8, atol=0.0)
    close("variance", var, x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0.0)


def test_the_variance_keeps_its_digits_where_the_first_pixels_are_unlike_the_others() -> None:
    x = case((2, 4, 40, 40), mean=-3.0, std=1.0).x
    for channel, first in enumerate((slice(0, 1), slice(0, 13), slice(0, 20))):
        x[0, channel, first, : 1 if channel == 0 else None] = 1e4
    _, var = statistics(x)
    close("variance", var, x.double().var((0, 2, 3), unbiased=False), rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1])
def test_a_channel_that_is_constant(value: float, kind: str) -> None:
    given = case((2, 5, 6, 7), kind=kind)
    given.x[:, 2] = value
    given.bias[2] = 0.75
    grad = gradient(given)
    with poisoned():
        ours = run(kernels, given, grad)
    theirs = check(ours, given, grad, torch.arange(5) != 2)
    # There the mean is off by half a unit in its last place, which 1/√eps enlarges.
    off = 2 * value * 2**-24 * EPS**-0.5
    close("y", ours.y[:, 2], theirs.y[:, 2], rtol=0.0, atol=1e-6 + off * given.weight[2].abs().item())
    close("x", ours.x[:, 2], theirs.x[:, 2], rtol=1e-5, atol=1e-3 + off * 100)
    close("bias", ours.bias[2], theirs.bias[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_its_channel_alone(value: float, kind: str) -> None:
    given = case((2, 5, 6, 7), kind=kind)
    given.x[1, 3, 2, 4] = value
    grad = gradient(replace(given, x=given.x.nan_to_num(0.0, 0.0, 0.0)))
    with poisoned():
        ours = run(kernels, given, grad)
    theirs = check(ours, given, grad, torch.arange(5) != 3)
    for name in ("y", "x", "weight"):
        channel = getattr(ours, name).movedim(-3, 0)[3] if name != "weight" else ours.weight[3]
        assert channel.isnan().all(), name
    assert theirs.y[:, 3].isnan().all()
    assert theirs.x[:, 3].isnan().all()
    # ReLU lets NaN through, and pooling takes the last one.
    close("bias", ours.bias, theirs.bias, rtol=1e-5, atol=1e-5)
    assert not ours.running_var[3].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_mode(kind: str, dtype: torch.dtype) -> None:
    """Values that are not finite reach themselves and their pooling window alone."""
    given = replace(case((2, 19, 7, 6), dtype, kind), train=False)
    for channel, pixel in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):  # of a window
        given.x[0, channel, pixel[0], pixel[1]] = math.nan
    given.x[0, 4, 1, 1], given.x[1, 3, 4, 4] = math.inf, -math.inf
    theirs = forward(batch_norm_relu_reference, given.copy(torch.float64))
    before = given.copy()
    with poisoned():
        ours = forward(kernels, given)
    assert ours.dtype == dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().sum() == 4
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    close("y", ours, theirs, rtol=2 * unit, atol=8 * unit)
    assert torch.equal(given.running_mean, before.running_mean)
    assert torch.equal(given.running_var, before.running_var)


def test_running_statistics_over_several_steps() -> None:
    """As views of what a stack of runs keeps, whose neighbours stay as they are."""
    kept = torch.arange(40.0).view(2, 20).repeat(1, 1)
    before = kept.clone()
    first = case((2, 20, 5, 3))
    theirs = first.copy(torch.float64)
    for step in range(5):
        given = replace(first, x=case((2, 20, 5, 3), mean=3.0 * step, std=1.0 + step).x)
        if step == 0:
            kept[1].copy_(given.running_mean)
        given.running_mean = kept[1]
        forward(kernels, given)
        theirs.x = given.x.double()
        forward(batch_norm_relu_reference, theirs)
        close("running_mean", kept[1], theirs.running_mean, rtol=1e-6, atol=1e-6)
        close("running_var", given.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)
    assert torch.equal(kept[0], before[0])
    assert MOMENTUM == 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_in_a_pooling_window(dtype: torch.dtype) -> None:
    """Of three values there are nothing but ties: the first largest one gets the gradient, all of it."""
    given = case((2, 21, 9, 8), dtype, "pool")
    given.x = channels_last(torch.randint(3, given.x.shape).to(dtype))
    grad = gradient(given)
    with poisoned():
        ours = run(kernels, given, grad)
    check(ours, given, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rounded_to_zero_has_no_gradient(kind: str) -> None:
    """ReLU looks at the float16 number, of which 1e-9 is none."""
    for dtype, passed in ((torch.float16, False), (torch.float32, True)):
        given = case((2, 3, 4, 4), dtype, kind)
        given.weight.zero_()
        given.bias.fill_(1e-9)
        grad = torch.ones(2, 3, *((2, 2) if kind == "pool" else (4, 4)))
        ours, theirs = run(kernels, given, grad), run(batch_norm_relu_reference, given, grad)
        assert ours.bias.tolist() == theirs.bias.tolist() == [float(grad[:, 0].sum()) if passed else 0.0] * 3


def test_odd_rows_and_columns_that_pooling_drops_count_in_the_statistics() -> None:
    """Their gradient is that of mean and variance alone, and not zero."""
    given = case((2, 6, 5, 3), kind="pool")
    given.bias.fill_(4.0)  # every channel has a gradient
    grad = gradient(given)
    with poisoned():
        ours = run(kernels, given, grad)
    assert (ours.x[:, :, 4].abs() > 0).all()
    assert (ours.x[:, :, :, 2].abs() > 0).all()
    check(ours, given, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_that_is_not_aligned_and_a_gradient_of_any_layout(kind: str) -> None:
    given = case((3, 17, 4, 6), kind=kind)
    whole = torch.randn(given.x.numel() + 1)
    view = whole[1:].view(3, 4, 6, 17).permute(0, 3, 1, 2)
    given.x = view.copy_(given.x)
    grad = gradient(given)
    layouts = [grad.contiguous(), grad.transpose(2, 3).contiguous().transpose(2, 3)]
    for layout in [*layouts, grad[:1, :1, :1, :1].expand_as(grad)]:
        leaf = given.x.detach().requires_grad_()
        y = forward(kernels, replace(given, x=leaf))
        with interpreter.quiet(), poisoned():
            (ours,) = torch.autograd.grad(y, leaf, layout)
        theirs = run(batch_norm_relu_reference, given.copy(torch.float64), layout).x
        close("x", ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind: str) -> None:
    given = case((2, 40, 9, 9), torch.bfloat16, kind)
    grad = gradient(given)
    first = run(kernels, given, grad)
    assert all(same_bits(run(kernels, given, grad), first) for _ in range(2))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_a_map_is_kept_but_x(kind: str) -> None:
    given = case((2, 8, 6, 6), kind=kind)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    leaves = replace(given, x=given.x.requires_grad_(), weight=given.weight.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        forward(kernels, leaves)
    assert [t.data_ptr() for t in kept if t.numel() > 8] == [given.x.data_ptr()]
    assert len(kept) == 5


def test_gradients_stop_where_none_is_wanted() -> None:
    given = case((2, 8, 3, 3), kind="residual")
    grad = gradient(given)
    theirs = run(batch_norm_relu_reference, given.copy(torch.float64), grad)

    def one(name: str) -> Tensor:
        leaf = getattr(given, name).detach().requires_grad_()
        y = forward(kernels, replace(given.copy(), **{name: leaf}))
        with interpreter.quiet():
            return torch.autograd.grad(y, leaf, grad)[0]

    for name in ("x", "weight", "bias", "residual"):
        close(name, one(name), getattr(theirs, name), rtol=1e-5, atol=1e-4)
    assert one("residual") is not None


def test_z_is_what_the_test_takes_it_for() -> None:
    """`gradient` leaves out what roundings decide: most must be left, and what is left must be decided."""
    given = case((2, 8, 9, 9), torch.bfloat16)
    z, grad = normalised(given), gradient(given)
    assert (grad[z.abs() <= 2**-6] == 0).all()
    assert (grad != 0).double().mean() > 0.9


def test_a_case_is_copied_whole() -> None:
    given = case((2, 3, 4, 4), kind="residual")
    copy = given.copy(torch.float64)
    assert isinstance(copy, Case)
    assert copy.residual is not None
    assert {t.dtype for t in vars(copy).values() if torch.is_tensor(t)} == {torch.float64}
    assert copy.x.is_contiguous(memory_format=torch.channels_last)
