"""What all kernels share: registration, reasons, warnings, what torch.compile takes for a constant."""

import warnings

import pytest
import torch
from torch import Tensor

from ncollapse.kernels import operators


def test_an_operator_runs_and_has_a_fake() -> None:
    def implementation(x: Tensor, y: Tensor) -> Tensor:
        y.add_(x)
        return x * 2

    def fake(x: Tensor, y: Tensor) -> Tensor:
        return torch.empty_like(x)

    op = operators.register_operator("twice_for_test(Tensor x, Tensor(a!) y) -> Tensor", implementation, fake)
    assert op is torch.ops.ncollapse.twice_for_test.default
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (torch.ones(3), torch.zeros(3))
    assert set(torch.library.opcheck(op, arguments, test_utils=checks).values()) == {"SUCCESS"}
    y = torch.zeros(3)
    assert torch.equal(op(torch.ones(3), y), torch.full((3,), 2.0))
    assert torch.equal(y, torch.ones(3))


def test_why_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.why_no_kernel(torch.device("cpu"), "torch") is None
    reason = operators.why_no_kernel(torch.device("cpu"), "module_that_is_not_there")
    assert reason is not None
    assert reason.startswith("ncollapse was built without its C++ kernels")
    assert operators.why_no_kernel(torch.device("meta")) == "there is no kernel for meta tensors"
    monkeypatch.setattr(operators, "_found", lambda module: False)
    assert operators.why_no_kernel(torch.device("cuda")) == "Triton is not installed"


def test_a_warning_is_given_once_for_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    for reason in ("one", "another"):
        with pytest.warns(UserWarning, match=f"plain PyTorch computes it, slowly: {reason}"):
            operators.warn_once("computes it", reason)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operators.warn_once("computes it", "one")


def test_a_compile_time_constant_is_called_while_tracing_only() -> None:
    seen: list[str] = []

    @operators.compile_time_constant
    def note(what: str) -> int:
        seen.append(what)
        return len(what)

    @torch.compile(fullgraph=True, backend="eager")
    def function(x: Tensor) -> Tensor:
        return x + note("abc")

    assert torch.equal(function(torch.zeros(2)), torch.full((2,), 3.0))
    assert torch.equal(function(torch.ones(2)), torch.full((2,), 4.0))
    assert seen == ["abc"]


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert operators.cpu_threads(100) == 1
    assert operators.cpu_threads(10**6) == 8
    assert operators.multiprocessors(torch.device("cpu")) == 1
