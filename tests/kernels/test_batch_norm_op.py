"""Batch norm with ReLU as a function and as torch operators; which inputs go to the kernels, which to torch."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import interpreter
from batch_norm_cases import (
    DTYPES,
    EPS,
    KINDS,
    MOMENTUM,
    WAYS,
    Case,
    Implementation,
    case,
    channels_last,
    choose,
    forward,
    gradient,
    public,
    run,
    same_bits,
)
from devices import only
from ncollapse.kernels import operators
from ncollapse.kernels.batch_norm import op
from ncollapse.kernels.batch_norm.op import (
    backward_op,
    batch_norm_relu_op,
    fused,
    moments_op,
    small_op,
    why_no_kernel,
)
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "strided"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_equals_torchs_operations_bit_for_bit(kind: str, dtype: torch.dtype, layout: str) -> None:
    given = case((2, 6, 7, 5), dtype, kind)
    if layout != "channels-last":
        given.x = given.x.contiguous() if layout == "contiguous" else given.x.repeat(1, 2, 1, 1)[:, ::2]
    if dtype == torch.float64:
        given = given.copy(dtype)
    grad = torch.randn(2, 6, *((3, 2) if kind == "pool" else (7, 5)), dtype=dtype)
    for train in (True, False):
        in_mode = replace(given, train=train)

        def by_hand(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, train: bool, *_: Any) -> Tensor:
            y = F.relu(F.batch_norm(x, mean, var, weight, bias, train, MOMENTUM, EPS))
            y = F.max_pool2d(y, 2) if kind == "pool" else y
            return _[-1] + y if kind == "residual" else y

        assert same_bits(run(public, in_mode, grad), run(by_hand, in_mode, grad))


def test_on_a_cpu_it_calls_torchs_operators_alone() -> None:
    called: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        forward(public, case((2, 3, 4, 4), kind="pool"))
    assert any("max_pool2d" in name for name in called)
    assert not [name for name in called if "ncollapse" in name]


def test_the_formula() -> None:
    """Written out, in float64."""
    given = case((3, 4, 5, 6)).copy(torch.float64)
    x, mean, var = given.x, given.running_mean.clone(), given.running_var.clone()
    centred = x - x.mean((0, 2, 3), keepdim=True)
    z = centred * (centred.square().mean((0, 2, 3), keepdim=True) + EPS).rsqrt()
    z = z * given.weight.view(1, -1, 1, 1) + given.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(forward(public, given), z.clamp(min=0))
    torch.testing.assert_close(given.running_mean, 0.9 * mean + 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(given.running_var, 0.9 * var + 0.1 * x.var((0, 2, 3)))


@pytest.mark.parametrize("implementation", [public, batch_norm_relu_reference], ids=["function", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference(kind: str, implementation: Implementation) -> None:
    """By finite differences, where no value is near a tie or zero."""
    given = case((2, 2, 4, 3), kind=kind).copy(torch.float64)
    grad = gradient(given, 1e-3)
    leaves = [t.requires_grad_() for t in (given.x, given.weight, given.bias)]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fresh = given.running_mean.clone(), given.running_var.clone()
        return (implementation(x, weight, bias, *fresh, True, MOMENTUM, EPS, given.pool, given.residual) * grad).sum()

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-5)


@pytest.mark.usefixtures("no_warning_given_yet")
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_it_warns_once_if_there_is_no_kernel(mode: str) -> None:
    """A compiled function is one graph all the same, and warns while it compiles."""
    given = case((2, 3, 4, 4)).copy(device="meta")
    function = public if mode == "eager" else torch.compile(public, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="plain PyTorch normalises maps, slowly: there is no kernel for meta"):
        assert forward(function, given).shape == (2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(function, given)


def reason(given: Case, **changed: Any) -> str | None:
    """Why a case, with some arguments changed, has no kernel."""
    given = replace(given, **changed)
    vectors = given.weight, given.bias, given.running_mean, given.running_var
    return why_no_kernel(given.x, vectors, given.train, given.residual)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that every device has kernels."""
    monkeypatch.setattr(operators, "why_no_kernel", lambda device: None)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 4, 4), (2, 3, 1, 1), (1, 3, 4, 4)], ids=str)
def test_what_the_kernels_take(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = case(shape, dtype, "residual")
    assert reason(given) is None
    assert reason(given, train=False) is None
    stacked = torch.randn(4, 2, shape[1])
    assert reason(given, weight=stacked[0, 1], bias=stacked.view(8, -1)[3], running_mean=stacked[2, 0]) is None
    if shape[1] == 1 or shape[2] == 1:  # then both layouts are the same
        assert reason(given, x=given.x.contiguous()) is None
    given.weight.requires_grad_()
    assert reason(given) is None
    with torch.no_grad():
        assert reason(given, train=False) is None


UNSUPPORTED: dict[str, tuple[str, Callable[[Case], dict[str, Any]]]] = {
    "float64 maps": ("there is no batch-norm kernel for torch.float64", lambda c: {"x": c.x.double()}),
    "contiguous maps": ("not channels-last", lambda c: {"x": c.x.contiguous()}),
    "contiguous residual": ("not channels-last", lambda c: {"residual": _residual(c).contiguous()}),
    "every other row": ("not channels-last", lambda c: {"x": c.x[:, :, ::2]}),
    "some channels": ("not channels-last", lambda c: {"x": c.x[:, :2]}),
    "float64 weight": ("not dense [C] in float32", lambda c: {"weight": c.weight.double()}),
    "short bias": ("not dense [C] in float32", lambda c: {"bias": c.bias[:3]}),
    "strided mean": ("not dense [C] in float32", lambda c: {"running_mean": torch.randn(8)[::2]}),
    "variance of two dimensions": ("not dense [C] in float32", lambda c: {"running_var": torch.randn(1, 4)}),
    "variance elsewhere": ("several devices", lambda c: {"running_var": c.running_var.to("meta")}),
    "residual elsewhere": ("several devices", lambda c: {"residual": _residual(c).to("meta")}),
    "weight's gradient": ("no gradient in evaluation mode", lambda c: {"train": False, "weight": _leaf(c.weight)}),
    "residual's gradient": (
        "no gradient in evaluation mode",
        lambda c: {"train": False, "residual": _leaf(_residual(c))},
    ),
}


def _residual(given: Case) -> Tensor:
    assert given.residual is not None
    return given.residual


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("expected", "change"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_the_kernels_do_not_take(expected: str, change: Callable[[Case], dict[str, Any]]) -> None:
    given = case((2, 4, 6, 6), kind="residual")
    assert expected in (reason(given, **change(given)) or "")


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("samples", [2**10, 2**10 + 1])
def test_the_largest_maps(samples: int) -> None:
    maps = channels_last(torch.empty(samples, 4, 2**10, 2**10, dtype=torch.bfloat16, device="meta"))
    vectors = tuple(torch.empty(4, device="meta") for _ in range(4))
    expected = None if samples == 2**10 else "the maps have more than 2³⁰ pixels"
    assert why_no_kernel(maps, vectors, True, None) == expected


WRONG: dict[str, tuple[str, Callable[[Case], dict[str, Any]]]] = {
    "pool and residual": ("pool=True or a residual, not both", lambda c: {"pool": True}),
    "fewer samples": (
        r"residual must be like x, \(2, 4, 6, 6\) torch.float32, not ",
        lambda c: {"residual": _residual(c)[:1]},
    ),
    "another dtype": (
        r"residual must be like x, \(2, 4, 6, 6\) torch.float32, not ",
        lambda c: {"residual": _residual(c).bfloat16()},
    ),
    "three dimensions": (
        r"takes maps \[N, C, H, W\], not x of shape \(2, 4, 6\)",
        lambda c: {"x": c.x[..., 0], "residual": None},
    ),
}


@pytest.mark.parametrize(("message", "change"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(message: str, change: Callable[[Case], dict[str, Any]]) -> None:
    given = case((2, 4, 6, 6), kind="residual")
    with pytest.raises(ValueError, match=message):
        forward(public, replace(given, **change(given)))


@pytest.fixture(params=["cpu", "meta"])
def trivial_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device; off the CPU, inputs with nothing to compute must go to torch's operations without a warning."""
    if request.param == "meta":
        monkeypatch.setattr(op, "why_no_kernel", lambda *_: pytest.fail("asked for a kernel"))
    return request.param


def test_one_value_per_channel(trivial_on: str) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        forward(public, case((1, 4, 1, 1)).copy(device=trivial_on))
    with torch.no_grad():
        assert forward(public, replace(case((1, 4, 1, 1)), train=False).copy(device=trivial_on)).shape == (1, 4, 1, 1)


def test_no_samples(trivial_on: str) -> None:
    empty = case((2, 4, 6, 6), kind="pool").copy(device=trivial_on)
    empty.x = empty.x[:0]
    assert forward(public, empty).shape == (0, 4, 3, 3)


def test_maps_too_small_to_pool(trivial_on: str) -> None:
    with pytest.raises(RuntimeError, match=r"[Oo]utput size is too small"):
        forward(public, case((2, 4, 1, 6), kind="pool").copy(device=trivial_on))


@only("interpreter")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by torch's own checks
@pytest.mark.parametrize("kind", KINDS)
def test_the_operators(device: torch.device, kind: str) -> None:
    """torch checks schemas, fake tensors, autograd and tracing."""
    given = case((2, 5, 5, 4), kind=kind, device=device)
    mean, rstd = torch.randn(5), 0.5 + torch.rand(5)
    parameters = given.x.requires_grad_(), given.weight.requires_grad_(), given.bias.requires_grad_()
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (moments_op, (given.x.detach(), given.running_mean, given.running_var, MOMENTUM, EPS)),
        (batch_norm_relu_op, (*parameters, mean, rstd, given.residual, given.pool)),
        (backward_op, (gradient(given), *(p.detach() for p in parameters), mean, rstd, given.pool)),
    ]
    if not given.pool:
        running = given.running_mean, given.running_var
        calls.append((small_op, (*(p.detach() for p in parameters), *running, given.residual, MOMENTUM, EPS)))
    for operator, arguments in calls:
        with interpreter.quiet():
            result = torch.library.opcheck(operator, arguments, test_utils=CHECKS)  # type: ignore[arg-type]
        assert set(result.values()) == {"SUCCESS"}


@only("interpreter")
@pytest.mark.parametrize(("way", "kind"), [*((WAYS[1], kind) for kind in KINDS), (WAYS[0], "residual")])
def test_in_a_compiled_function(device: torch.device, way: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for batches of any size, with the bits of the eager function, running statistics included."""
    choose(way, monkeypatch)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(*arguments: Any) -> Tensor:
        x, *rest = arguments
        return fused(x * 2, *rest) * 3

    def eager(*arguments: Any) -> Tensor:
        x, *rest = arguments
        return fused(x * 2, *rest) * 3

    for samples in (2, 3):
        given = case((samples, 5, 4, 6), kind=kind, device=device)
        grad = gradient(replace(given, x=2 * given.x))
        with interpreter.quiet():
            assert same_bits(run(compiled, given, grad), run(eager, given, grad))


@pytest.mark.usefixtures("any_device")
def test_a_compiled_function_chooses_the_kernel_while_compiling() -> None:
    """By shapes, layouts and gradients."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def marked(x: Tensor, *vectors: Tensor) -> Tensor:
        return x + (0 if why_no_kernel(x, vectors, True, None) is None else 1)

    given = case((2, 5, 4, 6))
    vectors = given.weight.requires_grad_(), given.bias, given.running_mean, given.running_var
    assert torch.equal(marked(given.x, *vectors), given.x)
    assert torch.equal(marked(given.x.contiguous(), *vectors), given.x + 1)
