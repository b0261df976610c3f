"""What no form for several runs may lose: statements that change tensors in place, and hooks, seen in no value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.train.networks.architecture import Architecture
from ncollapse.train.networks.forms import form_of
from ncollapse.train.plugins import Plugins


class Middle(nn.Module):
    """Calls a function on its hidden layer; none changes a value that the trial sees."""

    def __init__(self, num_classes: int, middle: Callable[["Middle", Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self._middle = nn.Linear(64, 8), nn.Linear(8, num_classes), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._middle(self, self.hidden(x.flatten(1)).sigmoid() + 1))


def clamped(model: Middle, x: Tensor) -> Tensor:
    x.clamp_(-60, 60)
    return x


def replaced(model: Middle, x: Tensor) -> Tensor:
    x.nan_to_num_()
    return x


def asserted(model: Middle, x: Tensor) -> Tensor:
    torch._assert(x.shape[0] > 0, "empty")
    return x


def aliased(model: Middle, x: Tensor) -> Tensor:
    x = 2 * x
    return F.hardtanh(x, -60, 60, inplace=True) + x


def bounded(model: Middle, x: Tensor) -> Tensor:
    for param in model.parameters():
        param.data.clamp_(-60, 60)
    return x


def assigned(model: Middle, x: Tensor) -> Tensor:
    for param in model.parameters():
        param.data = param.data.clamp(-60, 60)
    return x


def hooked(model: Middle, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        x.register_hook(lambda grad: grad.clamp(-5, 5))
    return x


def in_place(model: Middle, x: Tensor) -> Tensor:
    return F.relu6(4 * x, inplace=True)


def shaped(model: Middle, x: Tensor) -> Tensor:
    x.size(0), x.shape[1], x.dim()
    return x


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap computes clamp_ one by one
@pytest.mark.parametrize(
    ("middle", "kind", "reason"),
    [
        (clamped, "vmap", "clamp_"),
        (replaced, "vmap", "nan_to_num_"),
        (asserted, "vmap", "_assert"),
        (aliased, "vmap", "changes what is used once more"),
        (bounded, "alone", "clamp_.default changes a tensor outside of its layers"),
        (assigned, "alone", "assigns to its parameters or buffers"),
        (hooked, "alone", "it registers hooks on tensors"),
        (in_place, "layers", ""),
        (shaped, "layers", ""),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_form_holds_all_statements(middle: Any, kind: str, reason: str) -> None:
    plugins = Plugins(given={"model": {"mine": lambda num_classes: Middle(num_classes, middle)}})
    form = form_of(Architecture("mine", 4, (1, 8, 8)), "fp32", plugins)
    assert (form.kind, reason in form.reason) == (kind, True), form


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_modules_with_backward_hooks_are_alone(register: str) -> None:
    def mine(num_classes: int) -> nn.Module:
        model = Middle(num_classes, in_place)
        getattr(model.head, register)(lambda *_: None)
        return model

    form = form_of(Architecture("mine", 4, (1, 8, 8)), "fp32", Plugins(given={"model": {"mine": mine}}))
    assert (form.kind, form.reason) == ("alone", "head has backward hooks")
