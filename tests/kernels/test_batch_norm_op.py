"""Batch norm with ReLU as a function and as operators of torch; what goes to the kernels and what to torch's own."""

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
    Case,
    Implementation,
    case,
    channels_last,
    forward,
    gradient,
    run,
    same_bits,
)
from ncollapse.kernels import operators
from ncollapse.kernels.batch_norm import batch_norm_relu, op
from ncollapse.kernels.batch_norm.op import backward_op, batch_norm_relu_op, fused, moments_op, why_no_kernel
from ncollapse.kernels.batch_norm.reference import batch_norm_relu_reference

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is tested there (tests/gpu)")


def public(*arguments: Any) -> Tensor:
    """`batch_norm_relu` with the arguments of the reference."""
    x, weight, bias, mean, var, train, momentum, eps, pool, residual = arguments
    return batch_norm_relu(
        x, weight, bias, mean, var, train=train, momentum=momentum, eps=eps, pool=pool, residual=residual
    )


@pytest.mark.parametrize("layout", ["channels-last", "contiguous", "strided"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_is_torchs_own_operations_to_the_last_bit(kind: str, dtype: torch.dtype, layout: str) -> None:
    given = case((2, 6, 7, 5), dtype, kind)
    if layout != "channels-last":
        given.x = given.x.contiguous() if layout == "contiguous" else given.x.repeat(1, 2, 1, 1)[:, ::2]
    if dtype == torch.float64:
        given = given.copy(dtype)
    grad = torch.randn(2, 6, *((3, 2) if kind == "pool" else (7, 5)), dtype=dtype)
    for train in (True, False):
        here = replace(given, train=train)

        def by_hand(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *_: Any) -> Tensor:
            y = F.relu(F.batch_norm(x, mean, var, weight, bias, here.train, MOMENTUM, EPS))  # noqa: B023
            y = F.max_pool2d(y, 2) if kind == "pool" else y
            return _[-1] + y if kind == "residual" else y

        assert same_bits(run(public, here, grad), run(by_hand, here, grad))


def test_on_a_cpu_no_operator_of_ours_is_called() -> None:
    called: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listen():
        forward(public, case((2, 3, 4, 4), kind="pool"))
    assert any("max_pool2d" in name for name in called)
    assert not [name for name in called if "ncollapse" in name]


def test_the_formula() -> None:
    """By hand, in float64."""
    given = case((3, 4, 5, 6)).copy(torch.float64)
    x, mean, var = given.x, given.running_mean.clone(), given.running_var.clone()
    centred = x - x.mean((0, 2, 3), keepdim=True)
    z = centred * (centred.square().mean((0, 2, 3), keepdim=True) + EPS).rsqrt()
    z = z * given.weight.view(1, -1, 1, 1) + given.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(forward(public, given), z.clamp(min=0))
    torch.testing.assert_close(given.running_mean, 0.9 * mean + 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(given.running_var, 0.9 * var + 0.1 * x.var((0, 2, 3)))


@pytest.mark.parametrize("how", [public, batch_norm_relu_reference], ids=["function", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference(kind: str, implementation: Implementation) -> None:
    """By differences, where no value is near a choice."""
    given = case((2, 2, 4, 3), kind=kind).copy(torch.float64)
    grad = gradient(given, 1e-3)
    leaves = [t.requires_grad_() for t in (given.x, given.weight, given.bias)]

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fresh = given.running_mean.clone(), given.running_var.clone()
        return (implementation(x, weight, bias, *fresh, True, MOMENTUM, EPS, given.pool, given.residual) * grad).sum()

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-5)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_where_there_is_no_kernel_it_says_so(how: str) -> None:
    """Once; in a compiled function when it is compiled, which is one graph all the same."""
    given = case((2, 3, 4, 4)).copy(device="meta")
    function = public if how == "eager" else torch.compile(public, fullgraph=True, backend="aot_eager")
    operators._warned.clear()
    with pytest.warns(UserWarning, match="plain PyTorch normalises maps, slowly: there is no kernel for meta"):
        assert forward(function, given).shape == (2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(function, given)


def reason(given: Case, **changed: Any) -> str | None:
    given = replace(given, **changed)
    vectors = given.weight, given.bias, given.running_mean, given.running_var
    return why_no_kernel(given.x, vectors, given.train, given.residual)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels for this machine's CPU."""
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
    if shape[1] == 1 or shape[2] == 1:  # one layout is as good as the other
        assert reason(given, x=given.x.contiguous()) is None
    given.weight.requires_grad_()
    assert reason(given) is None
    with torch.no_grad():
        assert reason(given, train=False) is None


@pytest.mark.usefixtures("any_device")
def test_what_they_do_not_take() -> None:
    given = case((2, 4, 6, 6), kind="residual")
    assert given.residual is not None
    for said, changed in (
        ("there is no batch-norm kernel for torch.float64", {"x": given.x.double()}),
        ("not channels-last", {"x": given.x.contiguous()}),
        ("not channels-last", {"residual": given.residual.contiguous()}),
        ("not channels-last", {"x": given.x[:, :, ::2]}),
        ("not channels-last", {"x": given.x[:, :2]}),
        ("not dense [C] in float32", {"weight": given.weight.double()}),
        ("not dense [C] in float32", {"bias": given.bias[:3]}),
        ("not dense [C] in float32", {"running_mean": torch.randn(8)[::2]}),
        ("not dense [C] in float32", {"running_var": torch.randn(1, 4)}),
        ("several devices", {"running_var": given.running_var.to("meta")}),
        ("several devices", {"residual": given.residual.to("meta")}),
        ("no gradient in evaluation mode", {"train": False, "weight": given.weight.clone().requires_grad_()}),
        ("no gradient in evaluation mode", {"train": False, "residual": given.residual.clone().requires_grad_()}),
    ):
        found = reason(given, **changed)
        assert found is not None, changed
        assert said in found
    many = channels_last(torch.empty(2**10, 4, 2**10, 2**10, dtype=torch.bfloat16, device="meta"))
    vectors = tuple(torch.empty(4, device="meta") for _ in range(4))
    assert why_no_kernel(many, vectors, True, None) is None
    more = torch.empty(2**10 + 1, 4, 2**10, 2**10, dtype=torch.bfloat16, device="meta")
    assert "more than 2³⁰ pixels" in (why_no_kernel(channels_last(more), vectors, True, None) or "")


def test_wrong_arguments() -> None:
    given = case((2, 4, 6, 6), kind="residual")
    with pytest.raises(ValueError, match="pool=True or a residual, not both"):
        forward(public, replace(given, pool=True))
    assert given.residual is not None
    for wrong in (given.residual[:1], given.residual.bfloat16()):
        with pytest.raises(ValueError, match=r"residual must be like x, \(2, 4, 6, 6\) torch.float32, not "):
            forward(public, replace(given, residual=wrong))
    with pytest.raises(ValueError, match=r"takes maps \[N, C, H, W\], not x of shape \(2, 4, 6\)"):
        forward(public, replace(given, x=given.x[..., 0], residual=None))


@pytest.mark.parametrize("how", ["as on a CPU", "as on a GPU"])
def test_what_torch_says_of_one_value_a_channel_of_no_sample_and_of_maps_too_small_to_pool(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "as on a GPU":  # what is trivial there goes to torch's operations, and silently
        monkeypatch.setattr(op, "why_no_kernel", lambda *_: pytest.fail("asked for a kernel"))
    device = "cpu" if how == "as on a CPU" else "meta"
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        forward(public, case((1, 4, 1, 1)).copy(device=device))
    with torch.no_grad():
        assert forward(public, replace(case((1, 4, 1, 1)), train=False).copy(device=device)).shape == (1, 4, 1, 1)
    empty = case((2, 4, 6, 6), kind="pool").copy(device=device)
    empty.x = empty.x[:0]
    assert forward(public, empty).shape == (0, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"[Oo]utput size is too small"):
        forward(public, case((2, 4, 1, 6), kind="pool").copy(device=device))


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # in what torch checks with
@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_say_all_that_they_do(kind: str) -> None:
    """Schemas, fake tensors, autograd and tracing are checked by torch."""
    given = case((2, 5, 5, 4), kind=kind)
    mean, rstd = torch.randn(5), 0.5 + torch.rand(5)
    parameters = given.x.requires_grad_(), given.weight.requires_grad_(), given.bias.requires_grad_()
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (moments_op, (given.x.detach(), given.running_mean, given.running_var, MOMENTUM, EPS)),
        (batch_norm_relu_op, (*parameters, mean, rstd, given.residual, given.pool)),
        (backward_op, (gradient(given), *(p.detach() for p in parameters), mean, rstd, given.pool)),
    ]
    for operator, arguments in calls:
        with interpreter.quiet():
            result = torch.library.opcheck(operator, arguments, test_utils=CHECKS)  # type: ignore[arg-type]
        assert set(result.values()) == {"SUCCESS"}


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_compiled_function(kind: str) -> None:
    """One graph, also for batches of another size; the same bits as without, running statistics too."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(*arguments: Any) -> Tensor:
        x, *rest = arguments
        return fused(x * 2, *rest) * 3

    def eager(*arguments: Any) -> Tensor:
        x, *rest = arguments
        return fused(x * 2, *rest) * 3

    for samples in (2, 3):
        given = case((samples, 5, 4, 6), kind=kind)
        grad = gradient(replace(given, x=2 * given.x))
        with interpreter.quiet():
            assert same_bits(run(compiled, given, grad), run(eager, given, grad))


@pytest.mark.usefixtures("any_device")
def test_how_the_kernels_are_chosen_goes_into_the_graph() -> None:
    """Shapes, layouts and gradients are looked at while compiling."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def chosen(x: Tensor, *vectors: Tensor) -> Tensor:
        return x + (0 if why_no_kernel(x, vectors, True, None) is None else 1)

    given = case((2, 5, 4, 6))
    vectors = given.weight.requires_grad_(), given.bias, given.running_mean, given.running_var
    assert torch.equal(chosen(given.x, *vectors), given.x)
    assert torch.equal(chosen(given.x.contiguous(), *vectors), given.x + 1)
