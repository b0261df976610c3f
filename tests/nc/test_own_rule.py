"""An update rule from outside of the package: a function in `RULES` and a class on the base. No kernel knows it."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ncollapse import optim, ufm
from ncollapse.kernels import operators
from ncollapse.kernels.update.reference import RULES, Hyper, Settings, Slot

pytestmark = pytest.mark.filterwarnings("ignore:plain PyTorch updates some parameters, slowly")


def normalized(grad: Tensor, slot: Slot, settings: Settings) -> tuple[Tensor, Hyper]:
    """V ← βV + g, divided by its norm: linear in the gradient up to a factor."""
    assert slot.first is not None
    slot.first.mul_(settings.beta1).add_(grad)
    return slot.first / slot.first.norm().clamp(min=1e-12), settings.lr


class Normalized(optim.Optimizer):
    rule = optim.Rule("normalized", states=("velocity",))

    def __init__(
        self, params: Any, lr: Hyper, momentum: Hyper = 0.9, weight_decay: Hyper = 0.0, coupling: Hyper | None = None
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, coupling)


@pytest.fixture(autouse=True)
def rule() -> Iterator[None]:
    before = dict(RULES)
    RULES["normalized"] = normalized
    yield
    RULES.clear()
    RULES.update(before)


def network(*runs: int) -> tuple[list[nn.Parameter], Tensor, Tensor]:
    """Weights of a linear classifier, a batch and its labels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator)
    x = torch.randn(32, 4, generator=generator)
    params = [nn.Parameter(weight.expand(*runs, 3, 4).clone()), nn.Parameter(torch.zeros(*runs, 3))]
    return params, x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], x: Tensor, y: Tensor, steps: int) -> float:
    weight, bias = params
    for _ in range(steps):
        optimizer.zero_grad()
        logits = x @ weight.mT + bias.unsqueeze(-2)
        loss = -logits.log_softmax(-1)[..., torch.arange(len(y)), y].mean(-1).sum()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("coupling", [0.0, 0.4, 1.0])
def test_it_trains_as_its_formula_says(coupling: float) -> None:
    (params, x, y), (twins, *_) = network(), network()
    optimizer = Normalized(params, lr=0.1, weight_decay=0.2, coupling=coupling)
    velocities = [torch.zeros_like(p) for p in twins]
    for _ in range(5):
        train(optimizer, params, x, y, 1)
        nn.functional.cross_entropy(x @ twins[0].T + twins[1], y).backward()
        for p, v in zip(twins, velocities, strict=True):
            assert p.grad is not None
            v.mul_(0.9).add_(p.grad + coupling * 0.2 * p.detach())
            p.data = (1 - 0.1 * (1 - coupling) * 0.2) * p.detach() - 0.1 * v / v.norm()
            p.grad = None
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)


def test_it_learns_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_warned", set())
    params, x, y = network()
    optimizer = Normalized(params, lr=0.05)
    with pytest.warns(UserWarning, match="there is no kernel for the rule normalized") as warned:
        last = train(optimizer, params, x, y, 100)
    assert len(warned) == 1
    assert last < 0.2 * train(Normalized(network()[0], lr=0.05), network()[0], x, y, 1)


def test_a_state_dict_goes_on_where_it_was() -> None:
    params, x, y = network()
    optimizer = Normalized(params, lr=0.05, momentum=0.8, weight_decay=0.1)
    train(optimizer, params, x, y, 3)
    assert optimizer.state_names == ("velocity",)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = Normalized(copies, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, x, y, 3)
    train(other, copies, x, y, 3)
    assert all(map(torch.equal, params, copies))
    with pytest.raises(ValueError, match="another optimizer's: it has velocity, SGD keeps momentum_buffer"):
        optim.SGD(copies, momentum=0.9).load_state_dict(optimizer.state_dict())


def test_stacked_runs_train_as_alone() -> None:
    names, rates = ["adamw", "normalized", "sgd"], [0.01, 0.05, 0.1]
    params, x, y = network(3)
    lr = torch.tensor(rates, dtype=torch.float64)
    train(optim.Stacked(params, names, lr=lr, momentum=0.9, weight_decay=0.1), params, x, y, 5)
    for r, name in enumerate(names):
        single, *_ = network()
        numbers = {"lr": rates[r], "weight_decay": 0.1} | ({} if name == "adamw" else {"momentum": 0.9})
        make: Any = optim.by_name(name)
        train(make(single, **numbers), single, x, y, 5)
        torch.testing.assert_close([p.detach()[r] for p in params], [p.detach() for p in single], rtol=1e-5, atol=1e-6)


# Nothing tells a class that its parameters are stacked, but vectors.
@pytest.mark.parametrize(
    ("together", "vectors"), [(True, True), (True, False), (False, True)], ids=["Stacked", "numbers", "alone"]
)
def test_stacked_runs_of_this_rule_alone(together: bool, vectors: bool) -> None:
    """The rule's function sees one run at a time: it divides by a norm."""
    params, x, y = network(2)
    with torch.no_grad():
        params[0][1] *= 3
    starts = [[nn.Parameter(p[r].detach().clone()) for p in params] for r in range(2)]
    rates = torch.tensor([0.05, 0.1], dtype=torch.float64) if vectors else 0.05
    numbers: dict[str, Any] = {"lr": rates, "momentum": 0.8, "weight_decay": 0.1}
    make: Any = optim.Stacked if together else Normalized
    train(make(params, *[["normalized"] * 2] * together, **numbers), params, x, y, 4)
    for r, single in enumerate(starts):
        rate = float(rates[r]) if isinstance(rates, Tensor) else rates
        train(Normalized(single, **numbers | {"lr": rate}), single, x, y, 4)
        torch.testing.assert_close([p.detach()[r] for p in params], [p.detach() for p in single], rtol=1e-5, atol=1e-6)


def test_the_rule_of_the_documentation() -> None:
    """The section "A rule of your own" as it stands there: coupling, state dicts and stacked runs for nothing."""
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text("utf-8")
    section = page.split("## A rule of your own\n", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"__name__": "optimizers"}
    exec(found[1], names)
    cls = optim.by_name("bounded")
    assert cls is names["Bounded"]
    for coupling in (0.0, 0.4, 1.0):
        w = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64))
        twin, velocity = w.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
        make: Any = cls
        optimizer = make([w], lr=0.1, momentum=0.8, weight_decay=0.5, coupling=coupling)
        for step in range(4):
            w.grad = torch.full_like(w, 0.3 * step)
            optimizer.step()
            velocity = 0.8 * velocity + 0.3 * step + coupling * 0.5 * twin
            twin = (1 - 0.1 * (1 - coupling) * 0.5) * twin - 0.1 * velocity / (1 + velocity.abs())
        torch.testing.assert_close(w.detach(), twin, rtol=1e-12, atol=1e-12)
        other = make([copied := nn.Parameter(w.detach().clone())])
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        stack = nn.Parameter(torch.stack([w.detach(), 2 * w.detach()]))
        both = optim.Stacked([stack], ["bounded", "adamw"], lr=0.1, momentum=0.8, weight_decay=0.5)
        for p, one in ((w, optimizer), (copied, other), (stack, both)):
            p.grad = torch.ones_like(p)
            one.step()
        assert torch.equal(w, copied)
        first = make([start := nn.Parameter(twin.clone())], lr=0.1, momentum=0.8, weight_decay=0.5)
        start.grad = torch.ones_like(start)
        first.step()
        torch.testing.assert_close(stack.detach()[0], start.detach(), rtol=1e-12, atol=1e-12)


def test_it_is_found_by_name_in_the_theory_too() -> None:
    assert optim.by_name("normalized") is Normalized
    run = ufm.simulate("normalized", 3, 3, lr=0.05, steps=50, momentum=0.9)
    assert run.loss[-1] < run.loss[0]
    assert np.isfinite(run.nc0).all()
    assert ufm.predict("normalized", 3, 3, start=1.0, lr=0.1, steps=5) is None


def test_names() -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer 'Adam'; there are adam, adamw, .*normalized, .*signumw$"):
        optim.by_name("Adam")
    for name in ("SGD", "SGDW", "Signum", "SignumW", "Adam", "AdamW", "Lion", "Muon"):
        assert optim.by_name(name.lower()) is getattr(optim, name)
    assert (optim.by_name("lionw"), optim.by_name("muonw")) == (optim.Lion, optim.Muon)
    derived = type("Adam", (optim.Adam,), {"__module__": __name__})
    assert optim.by_name("adam") is optim.Adam is not derived  # ours keep their names
    with pytest.raises(ValueError, match="Stacked: Muon does not update elementwise; use it with stacked=True"):
        optim.Stacked([nn.Parameter(torch.ones(2, 3))], ["sgd", "muon"])
