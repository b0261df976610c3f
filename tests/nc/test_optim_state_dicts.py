"""State dicts: users' own entries, back and forth, Adam's and AdamW's."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse import optim

MODULES = (optim, torch.optim)


def parameter(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=dtype))


def take(optimizer: torch.optim.Optimizer, steps: int = 3) -> Tensor:
    w: nn.Parameter = optimizer.param_groups[0]["params"][0]
    for _ in range(steps):
        w.grad = torch.tensor([[1.0, -1.0]], dtype=w.dtype) + 0.1 * w.detach()
        optimizer.step()
    return w.detach().clone()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Lookahead(torch.optim.Optimizer):
    """Zhang et al., arXiv 1907.08610: every k-th step goes half-way to slow weights, in the base's state as timm's."""

    def __init__(self, base: torch.optim.Optimizer, k: int = 2) -> None:
        self.base, self.k, self.calls = base, k, 0
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults
        self._optimizer_step_pre_hooks = base._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = base._optimizer_step_post_hooks

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.base.step()
        self.calls += 1
        for p in self.param_groups[0]["params"] if self.calls % self.k == 0 else ():
            slow = self.base.state[p].setdefault("lookahead_slow_buff", p.detach().clone())
            slow.lerp_(p, 0.5)
            p.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=["stateless", "momentum"])
def test_lookahead_resumes(settings: dict[str, Any]) -> None:
    ends = []
    for module in MODULES:
        first = Lookahead(module.SGD([parameter()], lr=0.1, **settings))
        take(first, 5)
        second = Lookahead(module.SGD([nn.Parameter(first.param_groups[0]["params"][0].detach().clone())], lr=0.7))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        second.calls = 5
        ends.append(take(first))
        close(take(second), ends[-1])
    close(*ends)


def test_timms_lookahead_resumes() -> None:
    lookahead = pytest.importorskip("timm.optim.lookahead").Lookahead
    ends = []
    for module in MODULES:
        optimizer = lookahead(module.SGD([parameter()], lr=0.1, momentum=0.9), k=2)
        take(optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ends.append(take(optimizer))
    close(*ends)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_the_users_entries_are_loaded_as_in_torch(dtype: torch.dtype) -> None:
    entries: dict[str, Any] = {
        "ema": torch.ones(1, 2), "count": 3, "nested": {"a": torch.zeros(2, dtype=torch.float64), "b": [1, 2]},
        "codes": torch.tensor([1, 2]),
    }  # fmt: skip
    loaded = []
    for module in MODULES:
        optimizer = module.Adam([w := parameter(dtype)], lr=0.1)
        take(optimizer)
        optimizer.state[w].update(copy.deepcopy(entries))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        state = optimizer.state[w]
        take(optimizer, 1)
        assert state["step"] == 4
        loaded.append({key: state[key] for key in entries})
        if module is optim:
            expected = torch.float32 if dtype == torch.bfloat16 else dtype
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected
    torch.testing.assert_close(loaded[0]["ema"], loaded[1]["ema"], rtol=0, atol=0)
    assert loaded[0]["nested"]["a"].dtype == loaded[1]["nested"]["a"].dtype
    assert torch.equal(loaded[0]["codes"], loaded[1]["codes"])
    assert loaded[0]["count"] == 3


def test_an_entry_before_the_first_step_is_the_users_too() -> None:
    optimizer = optim.Adam([w := parameter()], lr=0.1)
    optimizer.state[w]["ema"] = torch.ones(1, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(optimizer)
    assert torch.equal(optimizer.state[w]["ema"], torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "Adadelta", "Adamax", "Rprop", "ASGD", "NAdam", "Adafactor"])
def test_the_states_of_torchs_other_optimizers_are_refused(name: str) -> None:
    other = getattr(torch.optim, name)([parameter()])
    take(other, 1)
    optimizer = optim.SGD([parameter()], momentum=0.9)
    with pytest.raises(ValueError, match="SGD: the state dict is another optimizer's: it has"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(("name", "settings"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("Muon", {})], ids=str)
def test_a_state_dict_restores_after_another_was_loaded(name: str, settings: dict[str, Any]) -> None:
    """The dict shares its tensors with the optimizer, as in torch; loading another leaves them alone."""
    cls = getattr(optim, name)
    optimizer = cls([w := parameter()], lr=0.1, **settings)
    take(optimizer)
    weights, kept = w.detach().clone(), optimizer.state_dict()
    other = cls([parameter()], lr=0.3, **settings)
    take(other, 7)
    expected = take(copy.deepcopy({"w": w, "o": optimizer})["o"])
    optimizer.load_state_dict(other.state_dict())
    optimizer.load_state_dict(kept)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with torch.no_grad():
        w.copy_(weights)
    assert torch.equal(take(optimizer), expected)


def test_where_addresses_are_held_states_are_loaded_in_place() -> None:
    optimizer = optim.Adam([w := parameter()], lr=0.1)
    take(optimizer)
    held, saved = dict(optimizer.state[w]), copy.deepcopy(optimizer.state_dict())
    optimizer._stepper.live = True  # as after a compiled or captured step
    take(optimizer)
    optimizer.load_state_dict(saved)
    for name, value in optimizer.state[w].items():
        assert value is held[name]
        assert torch.equal(value, saved["state"][0][name])


DECOUPLED = [
    (source, target, given)
    for source in ("Adam", "AdamW")
    for target in ("Adam", "AdamW")
    for given in ({}, {"decoupled_weight_decay": True})
    if not (source == "AdamW" and given)
]


@pytest.mark.parametrize("saver", MODULES, ids=["ours", "theirs"])
@pytest.mark.parametrize(("source", "target", "given"), DECOUPLED, ids=str)
def test_adam_and_adamw_load_each_others(source: str, target: str, given: dict[str, Any], saver: Any) -> None:
    """As in torch: Adam takes the flag of the dict, AdamW stays decoupled. A coupling of ours is taken by both."""
    ends = []
    for module in MODULES:
        first = getattr(saver, source)([parameter()], lr=0.1, weight_decay=0.5, **given)
        take(first)
        second = getattr(module, target)([parameter()], lr=0.1)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        if saver is optim and module is torch.optim and (source, target, given) == ("Adam", "AdamW", {}):
            second.param_groups[0]["decoupled_weight_decay"] = False  # our dict says coupling 1
        ends.append(take(second))
        group = second.param_groups[0]
        assert module is torch.optim or group["decoupled_weight_decay"] == (group["coupling"] == 0)
    close(*ends)


def test_the_coupling_of_a_group_stays_where_the_dict_has_none() -> None:
    theirs = torch.optim.SGD([parameter()], lr=0.1, weight_decay=0.5)
    ours = optim.SGDW([{"params": [parameter()], "coupling": 0.25}], lr=0.3)
    ours.load_state_dict(theirs.state_dict())
    assert (ours.param_groups[0]["coupling"], ours.param_groups[0]["weight_decay"]) == (0.25, 0.5)
    adamw = optim.AdamW([parameter()], coupling=0.25)
    adamw.load_state_dict(torch.optim.Adam([parameter()]).state_dict())
    assert (adamw.param_groups[0]["coupling"], adamw.param_groups[0]["decoupled_weight_decay"]) == (0.25, False)
    adamw.load_state_dict(optim.Adam([parameter()], coupling=0.75).state_dict())
    assert adamw.param_groups[0]["coupling"] == 0.75


def test_a_vector_that_does_not_fit_is_refused_on_load() -> None:
    optimizer = optim.SGD([parameter()], lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = torch.tensor([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="3 stacked runs"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_step_that_the_kernel_has_not_finished_is_told_once() -> None:
    """As a launch leaves its counter that ends early: no later one would count steps."""
    w = parameter()
    optimizer = optim.Adam([w])
    take(optimizer)
    arrived = torch.tensor([1], dtype=torch.int32)
    [bucket] = optimizer._stepper._update._buckets
    bucket.scratch = SimpleNamespace(arrived=arrived)
    with pytest.raises(RuntimeError, match=r"Adam: the update kernel was interrupted within a step"):
        optimizer.state_dict()
    assert arrived.item() == 0
    assert optimizer.state_dict()["state"][0]["step"] == 3
    # A plan has a counter of its own.
    arrived.fill_(1)
    optimizer.load_state_dict(torch.optim.Adam([parameter()]).state_dict())
    take(optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 3
