"""The batch-norm kernels, in Triton's interpreter and on a GPU, against torch's operations in float64.

The interpreter truncates bfloat16 and float16 where a GPU rounds, so maps may differ by one unit in the last place.
Gradients are zero where rounding could change what ReLU or pooling selects.
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
from devices import Backend, cases
from ncollapse.kernels.batch_norm import gpu
from ncollapse.kernels.batch_norm.op import moments_op
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

Shape = tuple[int, int, int, int]
SHAPES = [(2, 3, 7, 7), (1, 64, 2, 3), (2, 100, 3, 2), (1, 1, 28, 28), (2, 64, 1, 1), (2, 1, 1, 2), (3, 130, 1, 7)]
# Layers of ResNet9 and of stacked runs; odd sizes; few and many pixels; more partial sums than PARTS; channel counts
# that are no multiple of a power of two. (tests/kernels/test_batch_norm_ways.py takes small maps in all ways.)
LARGE = [
    (128, 64, 28, 28), (128, 512, 3, 3), (32, 24 * 128, 7, 7), (300, 1, 33, 31), (7, 3, 61, 59), (2, 100, 3, 3),
    (1, 64, 1, 2), (2, 1000, 2, 2), (64, 96, 15, 13),
]  # fmt: skip


def pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def checked(given: Case, grad: Tensor) -> None:
    """Run the kernels and compare with the reference."""
    with poisoned():
        ours = run(kernels, given, grad)
    check(ours, given, grad)


def with_kinds(shapes: list[Shape]) -> list[tuple[Shape, str]]:
    return [(shape, kind) for shape in shapes for kind in KINDS if kind != "pool" or min(shape[2:]) > 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases("shape, kind", with_kinds(SHAPES), with_kinds(LARGE))
def test_shapes(device: torch.device, shape: Shape, kind: str, dtype: torch.dtype) -> None:
    given = case(shape, dtype, kind, device=device)
    checked(given, gradient(given))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]`, by the kernels."""
    running_mean, running_var = x.new_zeros(2, x.shape[1], dtype=torch.float32)
    with interpreter.quiet(), poisoned():
        mean, rstd = moments_op(x, running_mean, running_var, 1.0, 0.0)
    assert torch.equal(mean, running_mean)
    close("running_var", running_var * (1 - 1 / pixels(x)), rstd.double() ** -2, rtol=1e-6, atol=0.0)
    return mean, rstd.double() ** -2


@cases("shape, programs", [((4, 5, 31, 29), 1), ((4, 5, 31, 29), 9)], [((128, 64, 28, 28), 1)])
def test_the_variance_is_accurate_far_from_zero(
    backend: Backend, shape: Shape, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean 1,000, deviation 0.01: float32 has steps of 6e-5 there, and E[x²] − E[x]² an error of 0.1."""
    if backend.name == "interpreter":
        monkeypatch.setattr(gpu, "multiprocessors", lambda device: programs)
    x = case(shape, mean=1e3, std=1e-2, device=backend.device).x
    mean, var = statistics(x)
    # A GPU adds up more parts, each of which may round.
    close("mean", mean, x.double().mean((0, 2, 3)), rtol=6e-8 if backend.name == "interpreter" else 3e-7, atol=0.0)
    close("variance", var, x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0.0)


def test_the_variance_is_accurate_if_the_first_pixels_differ_from_the_rest(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = backend.device
    if backend.name == "interpreter":  # as many parts as a GPU would make: NumPy adds the rows of a tile one by one
        monkeypatch.setattr(gpu, "multiprocessors", lambda device: 4)
    x = case((2, 4, 40, 40), mean=-3.0, std=1.0, device=device).x
    for channel, rows in enumerate((slice(0, 1), slice(0, 13), slice(0, 20))):
        x[0, channel, rows, : 1 if channel == 0 else None] = 1e4
    _, var = statistics(x)
    close("variance", var, x.double().var((0, 2, 3), unbiased=False), rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.1])
def test_a_constant_channel(device: torch.device, value: float, kind: str) -> None:
    given = case((2, 5, 6, 7), kind=kind, device=device)
    given.x[:, 2] = value
    given.bias[2] = 0.75
    grad = gradient(given)
    with poisoned():
        ours = run(kernels, given, grad)
    theirs = check(ours, given, grad, torch.arange(5, device=device) != 2)
    # The mean is off by half a unit in its last place, which 1/√eps magnifies.
    off = 2 * value * 2**-24 * EPS**-0.5
    close("y", ours.y[:, 2], theirs.y[:, 2], rtol=0.0, atol=1e-6 + off * given.weight[2].abs().item())
    close("x", ours.x[:, 2], theirs.x[:, 2], rtol=1e-5, atol=1e-3 + off * 100)
    close("bias", ours.bias[2], theirs.bias[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@cases("shape, atol", [((2, 5, 6, 7), 1e-5)], [((16, 70, 9, 9), 1e-4)])
def test_a_non_finite_value_affects_its_channel_alone(
    device: torch.device, shape: Shape, atol: float, value: float, kind: str
) -> None:
    given = case(shape, kind=kind, device=device)
    grad = gradient(given)
    channel = shape[1] - 2
    given.x[-1, channel, 2, 4] = value
    with poisoned():
        ours = run(kernels, given, grad)
    theirs = check(ours, given, grad, torch.arange(shape[1], device=device) != channel)
    for result in (ours, theirs):
        assert result.y[:, channel].isnan().all()
        assert result.x[:, channel].isnan().all()
    assert ours.weight[channel].isnan()
    # ReLU passes NaN on, and pooling selects the last one.
    close("bias", ours.bias, theirs.bias, rtol=1e-5, atol=atol)
    assert not ours.running_var[channel].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@cases("shape", [(2, 19, 7, 6)], [(32, 100, 9, 8)])
def test_evaluation_mode(backend: Backend, shape: Shape, kind: str, dtype: torch.dtype) -> None:
    """A non-finite value affects itself and its pooling window alone."""
    given = replace(case(shape, dtype, kind, device=backend.device), train=False)
    for channel, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):  # the corners of a window
        given.x[0, channel, i, j] = math.nan
    given.x[0, 4, 1, 1], given.x[1, 3, 4, 4] = math.inf, -math.inf
    theirs = forward(batch_norm_relu_reference, given.copy(torch.float64))
    before = given.copy()
    with poisoned():
        ours = forward(kernels, given)
    assert ours.dtype == dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan().sum() == 4
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    if backend.name == "interpreter" and dtype != torch.float32:
        unit *= 2
    close("y", ours, theirs, rtol=2 * unit, atol=8 * unit)
    assert torch.equal(given.running_mean, before.running_mean)
    assert torch.equal(given.running_var, before.running_var)


def test_running_statistics_over_several_steps(device: torch.device) -> None:
    """They are a row of a larger tensor, as in stacked runs; the other rows do not change."""
    stacked = torch.arange(40.0, device=device).view(2, 20).clone()
    before = stacked.clone()
    first = case((2, 20, 5, 3), device=device)
    theirs = first.copy(torch.float64)
    for step in range(5):
        given = replace(first, x=case((2, 20, 5, 3), mean=3.0 * step, std=1.0 + step, device=device).x)
        if step == 0:
            stacked[1].copy_(given.running_mean)
        given.running_mean = stacked[1]
        forward(kernels, given)
        theirs.x = given.x.double()
        forward(batch_norm_relu_reference, theirs)
        close("running_mean", stacked[1], theirs.running_mean, rtol=1e-6, atol=1e-6)
        close("running_var", given.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)
    assert torch.equal(stacked[0], before[0])
    assert MOMENTUM == 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases("shape", [(2, 21, 9, 8)], [(16, 70, 9, 8)])
def test_ties_in_a_pooling_window(device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """With three distinct values most windows have ties: the first maximum gets the whole gradient."""
    given = case(shape, dtype, "pool", device=device)
    given.x = channels_last(torch.randint(3, given.x.shape, device=device).to(dtype))
    checked(given, gradient(given))


@pytest.mark.parametrize(("dtype", "passed"), [(torch.float16, False), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_rounds_to_zero_has_no_gradient(
    device: torch.device, kind: str, dtype: torch.dtype, passed: bool
) -> None:
    """ReLU sees the rounded value: 1e-9 is zero in float16."""
    given = case((2, 3, 4, 4), dtype, kind, device=device)
    given.weight.zero_()
    given.bias.fill_(1e-9)
    grad = torch.ones(2, 3, *((2, 2) if kind == "pool" else (4, 4)), device=device)
    ours, theirs = run(kernels, given, grad), run(batch_norm_relu_reference, given, grad)
    assert ours.bias.tolist() == theirs.bias.tolist() == [float(grad[:, 0].sum()) if passed else 0.0] * 3


def test_odd_rows_and_columns_that_pooling_drops_count_in_the_statistics(device: torch.device) -> None:
    """Their gradient comes from mean and variance alone, and is not zero."""
    given = case((2, 6, 5, 3), kind="pool", device=device)
    given.bias.fill_(4.0)  # so that every channel has a gradient
    grad = gradient(given)
    with poisoned():
        ours = run(kernels, given, grad)
    assert (ours.x[:, :, 4].abs() > 0).all()
    assert (ours.x[:, :, :, 2].abs() > 0).all()
    check(ours, given, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unaligned_view_and_gradients_of_any_layout(device: torch.device, kind: str) -> None:
    given = case((3, 17, 4, 6), kind=kind, device=device)
    buffer = torch.randn(given.x.numel() + 1, device=device)
    view = buffer[1:].view(3, 4, 6, 17).permute(0, 3, 1, 2)
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
@cases("shape, dtype", [((2, 40, 9, 9), torch.bfloat16)], [((128, 128, 14, 14), dtype) for dtype in DTYPES])
def test_the_same_bits_every_time(device: torch.device, shape: Shape, dtype: torch.dtype, kind: str) -> None:
    given = case(shape, dtype, kind, device=device)
    grad = gradient(given)
    first = run(kernels, given, grad)
    repeats = 4 if device.type == "cuda" else 2
    assert all(same_bits(run(kernels, given, grad), first) for _ in range(repeats))


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_maps_only_x_is_saved_for_the_backward_pass(device: torch.device, kind: str) -> None:
    given = case((2, 8, 6, 6), kind=kind, device=device)
    saved: list[Tensor] = []

    def save(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    leaves = replace(given, x=given.x.requires_grad_(), weight=given.weight.requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        forward(kernels, leaves)
    assert [t.data_ptr() for t in saved if t.numel() > 8] == [given.x.data_ptr()]
    assert len(saved) == 5


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_the_gradient_of_one_input_alone(device: torch.device, name: str) -> None:
    given = case((2, 8, 3, 3), kind="residual", device=device)
    grad = gradient(given)
    theirs = run(batch_norm_relu_reference, given.copy(torch.float64), grad)
    leaf = getattr(given, name).detach().requires_grad_()
    y = forward(kernels, replace(given.copy(), **{name: leaf}))
    with interpreter.quiet():
        (ours,) = torch.autograd.grad(y, leaf, grad)
    close(name, ours, getattr(theirs, name), rtol=1e-5, atol=1e-4)


def test_gradients_are_zero_only_where_rounding_decides() -> None:
    """Guards `gradient`, without which these tests would prove little."""
    given = case((2, 8, 9, 9), torch.bfloat16)
    z, grad = normalised(given), gradient(given)
    assert (grad[z.abs() <= 2**-6] == 0).all()
    assert (grad != 0).double().mean() > 0.9


def test_a_case_is_copied_whole() -> None:
    given = case((2, 3, 4, 4), kind="residual")
    copy = given.copy(torch.float64)
    assert copy.residual is not None
    assert {t.dtype for t in vars(copy).values() if torch.is_tensor(t)} == {torch.float64}
    assert copy.x.is_contiguous(memory_format=torch.channels_last)
