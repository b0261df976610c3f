"""Optimizers on a device without float64, as MPS is: a stand-in, since the tests run where there is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ncollapse import optim
from ncollapse.kernels.update import launch, reference
from ncollapse.optim.core import observe
from ncollapse.optim.core.numbers import HyperSet, Numbers

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, lr: optim.SGD(params, lr=lr, momentum=0.9, dampening=0.1, weight_decay=0.1, coupling=0.5),
    "signumw": lambda params, lr: optim.SignumW(params, lr=lr, weight_decay=0.1),
    "adam": lambda params, lr: optim.Adam(params, lr=lr, weight_decay=0.1),
    "lion": lambda params, lr: optim.Lion(params, lr=lr),
}
RUNS, SIZE = 3, 500


class NoFloat64(TorchDispatchMode):
    """Refuses float64 for what has a parameter's size: such tensors stand for the device's, others for the CPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.dtype == torch.float64 and t.numel() >= SIZE:
                raise TypeError(f"float64 is refused: {func}")
        return result


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> NoFloat64:
    for module in (reference, observe):
        monkeypatch.setattr(module, "has_float64", lambda device: False)
    monkeypatch.setattr(launch, "why_no_kernel", lambda device: "a stand-in has none")
    return NoFloat64()


@pytest.mark.filterwarnings("ignore:plain PyTorch")
@pytest.mark.parametrize("lr", ["number", "tensor", "of runs"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_without_float64(make: Callable[..., Any], lr: str, no_float64: NoFloat64) -> None:
    start = torch.randn(RUNS, SIZE)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rates = {"number": 0.01, "tensor": torch.tensor(0.01), "of runs": torch.tensor([0.01, 0.02, 0.03])}
    first, second = make([a], rates[lr]), make([b], rates[lr])
    for _ in range(3):
        a.grad = torch.randn(RUNS, SIZE)
        b.grad = a.grad.clone()
        first.step()
        with no_float64:
            second.step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:plain PyTorch")
def test_the_stand_in_refuses_float64(no_float64: NoFloat64) -> None:
    with no_float64, pytest.raises(TypeError, match="float64 is refused"):
        torch.ones(SIZE).double()


def test_hyperparameters_are_on_the_cpu_where_no_kernel_reads_them() -> None:
    lr = torch.tensor(0.1)
    numbers = Numbers()
    numbers.fill(
        [HyperSet(dict.fromkeys(("weight_decay", "coupling", "beta1", "beta2", "eps"), 0.0) | {"lr": lr}, [0])],
        [torch.device("mps"), torch.device("cpu")],
    )
    assert [v.data_ptr() for v in numbers.values] == [numbers.host.data_ptr()]
    assert numbers.read == {0: lr}
    assert numbers.copied == {}
