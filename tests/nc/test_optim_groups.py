"""Param groups: each class's own settings, whoever writes them, and the users' own dicts."""

import copy
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ncollapse import optim
from ncollapse.optim.core.numbers import Numbers

CLASSES = [optim.SGD, optim.SGDW, optim.Signum, optim.SignumW, optim.Adam, optim.AdamW, optim.Lion, optim.Muon]
PAIRS = {"SGD": {"lr": 0.1, "momentum": 0.5}, "Adam": {"lr": 0.1, "weight_decay": 0.5}, "AdamW": {"lr": 0.1}}
FLAGS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False, "maximize": False}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))


def take(optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    """Steps with gradients that are larger in the first; the weights of the last group."""
    w: nn.Parameter = optimizer.param_groups[-1]["params"][0]
    for step in range(steps):
        w.grad = torch.tensor([[1.0, -1.0]], dtype=torch.float64) * (3.0 if step == 0 else 0.1)
        optimizer.step()
    return w.detach().flatten().tolist()


def both(name: str, run: Callable[[Any], list[float]]) -> None:
    ours, theirs = (run(getattr(module, name)) for module in (optim, torch.optim))
    assert ours == pytest.approx(theirs, rel=1e-12)


FOREIGN = [
    ("SGD", {"betas": (0.9, 0.999)}), ("SGD", {"eps": None}), ("SGD", {"amsgrad": True}), ("SGD", {"name": "head"}),
    ("SGD", {"decoupled_weight_decay": True}), ("Adam", {"nesterov": True}), ("Adam", {"momentum": None}),
    ("Adam", {"dampening": 2.0}), ("AdamW", {"momentum": 0.5, "initial_lr": [1]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), FOREIGN, ids=str)
def test_keys_of_others_are_without_effect(name: str, keys: dict[str, Any]) -> None:
    """In a new group, written, and loaded; as in torch.optim."""

    def run(cls: Any) -> list[float]:
        optimizer = cls([{"params": [parameter()], **copy.deepcopy(keys)}], **PAIRS[name])
        take(optimizer)
        optimizer.param_groups[0].update(copy.deepcopy(keys))
        take(optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(optimizer.param_groups[0][key] == value for key, value in keys.items())
        return take(optimizer)

    both(name, run)


@pytest.mark.parametrize(
    ("cls", "key"), [*((cls, "differentiable") for cls in CLASSES), (optim.Adam, "amsgrad"), (optim.AdamW, "amsgrad")]
)
def test_another_algorithm_is_refused_wherever_it_is_asked_for(cls: Any, key: str) -> None:
    refused = pytest.raises(ValueError, match=f"{cls.__name__} does not support {key}")
    with refused:
        cls([parameter()], **{key: True})
    with refused:
        cls([{"params": [parameter()], key: True}])
    mine: dict[str, Any] = {"params": [parameter()]}
    optimizer = cls([mine])
    with refused:
        optimizer.add_param_group({"params": [parameter()], key: True})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = True
    with refused:
        optimizer.load_state_dict(saved)
    with refused:
        optimizer.param_groups[0][key] = True
    with refused:
        optimizer.param_groups[0].update({key: True})
    assert optimizer.param_groups[0][key] is False
    assert len(optimizer.param_groups) == 1
    mine[key] = True  # nobody is told
    before = mine["params"][0].detach().clone()
    with refused:
        take(optimizer, 1)
    assert torch.equal(mine["params"][0], before)
    mine[key] = False
    take(optimizer, 1)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_bad_value_is_refused_when_it_is_written(cls: Any) -> None:
    optimizer = cls([parameter()], lr=0.5)
    group = optimizer.param_groups[0]
    for key, value in (("lr", -1.0), ("lr", None), ("weight_decay", float("nan")), ("coupling", 2.0)):
        before = group[key]
        with pytest.raises(ValueError, match=f"{cls.__name__}: {key} must be"):
            group[key] = value
        assert group[key] is before
    with pytest.raises(ValueError, match="2 stacked runs"):
        group["lr"] = torch.tensor([0.1, 0.2])
    group["lr"], group["anything"] = 0.25, -1.0
    assert (group["lr"], group["anything"]) == (0.25, -1.0)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_every_class_takes_the_flags_of_torch_and_names_what_it_does_not_take(cls: Any) -> None:
    assert {key: cls([parameter()]).param_groups[0][key] for key in FLAGS} == FLAGS
    given: dict[str, Any] = {"foreach": False, "fused": True, "capturable": True, "differentiable": False}
    saved = cls([parameter()], **given, maximize=True).state_dict()["param_groups"][0]
    assert {key: saved[key] for key in FLAGS} == FLAGS | {"maximize": True}
    arguments = inspect.signature(cls).parameters
    assert FLAGS.keys() <= arguments.keys()
    assert not any(a.kind in (a.VAR_KEYWORD, a.VAR_POSITIONAL) for a in arguments.values())
    with pytest.raises(TypeError, match=rf"{cls.__name__}\..*copling"):
        cls([parameter()], copling=0.5)
    up, down = cls([parameter()], lr=0.1, maximize=True), cls([parameter()], lr=0.1)
    assert take(up, 1)[0] > take(down, 1)[0]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_signatures_are_those_of_torch_and_the_coupling(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, torch.optim))
    assert {key: a.default for key, a in theirs.items()}.items() <= {key: a.default for key, a in ours.items()}.items()
    assert [a.kind for key, a in ours.items() if key in theirs] == [theirs[key].kind for key in ours if key in theirs]
    assert ours.keys() - theirs.keys() == {"coupling"} | ({"capturable"} if name == "SGD" else set())


def test_decoupled_weight_decay_is_coupling_zero() -> None:
    def argument(cls: Any) -> list[float]:
        return take(cls([parameter()], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True))

    def written(cls: Any) -> list[float]:
        optimizer = cls([parameter()], lr=0.1, weight_decay=0.5)
        for decoupled in (True, False, True):
            optimizer.param_groups[0]["decoupled_weight_decay"] = decoupled
            take(optimizer)
        return take(optimizer)

    def of_a_group(cls: Any) -> list[float]:
        own = {"params": [parameter()], "decoupled_weight_decay": cls.__name__ == "Adam"}
        return take(cls([own], lr=0.1, weight_decay=0.5))

    both("Adam", argument)
    for name in ("Adam", "AdamW"):
        both(name, written)
        both(name, of_a_group)
    optimizer = optim.Adam([parameter()])
    group = optimizer.param_groups[0]
    assert (group["coupling"], group["decoupled_weight_decay"]) == (1.0, False)
    group["coupling"] = 0.0
    assert group["decoupled_weight_decay"] is True
    group["coupling"] = 0.5
    assert group["decoupled_weight_decay"] is False
    group["decoupled_weight_decay"] = True
    assert group["coupling"] == 0
    kept = dict(optim.Adam([{"params": [parameter()], "coupling": 0.5}]).param_groups[0])
    group.update({key: value for key, value in kept.items() if key != "params"})
    assert (group["coupling"], group["decoupled_weight_decay"]) == (0.5, False)
    for arguments in ({"coupling": 0.5}, {"coupling": 1.0}):
        with pytest.raises(ValueError, match="decoupled_weight_decay=True means coupling 0; got coupling"):
            optim.Adam([parameter()], decoupled_weight_decay=True, **arguments)
    with pytest.raises(ValueError, match="give only one of them"):
        optim.AdamW([{"params": [parameter()], "decoupled_weight_decay": False, "coupling": 0.0}])


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_dict_that_the_user_keeps_goes_on_having_its_effect(name: str) -> None:
    def run(cls: Any) -> list[float]:
        mine: dict[str, Any] = {"params": [parameter()], "weight_decay": 0.2}
        optimizer = cls([mine], lr=0.1)
        added: dict[str, Any] = {"params": parameter()}
        optimizer.add_param_group(added)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        take(optimizer)
        for group in (mine, added):
            group["lr"] = 0.3
            group.update(weight_decay=0.4, maximize=True)
        if name == "SGD":
            added["momentum"] = 0.9
        schedule.step()  # reads what was written
        assert added["lr"] == optimizer.param_groups[1]["lr"] == 0.15
        take(optimizer)
        added["lr"] = torch.tensor(added["lr"], dtype=torch.float64)  # the same number, which then changes
        take(optimizer)
        added["lr"].fill_(0.4)
        return take(optimizer)

    both(name, run)


def test_a_list_may_be_written_to() -> None:
    def run(cls: Any) -> list[float]:
        optimizer = cls([{"params": [parameter()], "betas": [0.9, 0.99]}], lr=0.1)
        take(optimizer)
        optimizer.param_groups[0]["betas"][0] = 0.3
        return take(optimizer)

    both("Adam", run)
    optimizer = optim.Adam([{"params": [parameter()], "betas": [0.9, 0.99]}])
    optimizer.param_groups[0]["betas"][1] = 1.0
    with pytest.raises(ValueError, match="betas must be"):
        take(optimizer)


@pytest.mark.parametrize("live", [False, True])
def test_a_setting_may_be_taken_out_and_set_again(live: bool) -> None:
    def run(cls: Any) -> list[float]:
        optimizer = cls([parameter()], lr=0.1, weight_decay=0.1)
        take(optimizer)
        if cls is optim.Adam:
            optimizer._stepper.live = live  # as if a CUDA graph read the numbers
        group = optimizer.param_groups[0]
        for key, value in (("lr", 0.05), ("betas", (0.5, 0.6)), ("maximize", True)):
            group.pop(key)
            group[key] = value
            if cls is optim.Adam and key == "lr":
                assert optimizer._stepper.numbers.host[0, 0] == 0.05
        take(optimizer)
        everything = dict(group)
        group.clear()
        assert not group
        with pytest.raises(KeyError):
            optimizer.step()
        group.update(everything)
        take(optimizer)
        key, value = group.popitem()
        group[key] = value
        del group["weight_decay"], group["eps"]
        group["eps"] = 1e-4
        group.setdefault("weight_decay", 0.2)
        group |= {"lr": 0.1}
        return take(optimizer)

    both("Adam", run)


def test_all_settings_may_be_replaced_where_a_graph_reads_them() -> None:
    optimizer = optim.Adam([parameter()], lr=0.1)
    take(optimizer)
    optimizer._stepper.live = True
    everything = dict(optimizer.param_groups[0]) | {"lr": 0.3, "eps": 0.5}
    optimizer.param_groups[0].clear()
    optimizer.param_groups[0].update(everything)
    assert not optimizer._stepper.stale
    assert optimizer._stepper.numbers.host[0].tolist() == [0.3, 0.0, 1.0, 0.9, 0.999, 0.5]


def test_a_missing_setting_is_named() -> None:
    mine: dict[str, Any] = {"params": [parameter()]}
    optimizer = optim.SGD([mine], lr=0.1)
    for delete in (lambda: optimizer.param_groups[0].pop("lr"), lambda: mine.pop("lr")):
        take(optimizer)
        delete()
        with pytest.raises(KeyError, match="SGD: a param group has no 'lr'"):
            take(optimizer)
        mine["lr"] = 0.1


def test_a_group_is_a_dict() -> None:
    mine: dict[str, Any] = {"params": [parameter()], "lr": 0.5}
    group = optim.SGD([mine]).param_groups[0]
    assert isinstance(group, dict)
    assert group == mine == dict(group) == {**group} == copy.copy(group) == group | {} == {} | group
    assert [*group] == [*group.keys()] == [*mine]
    assert repr(group) == repr(mine)
    assert (group.get("lr"), group.get("no"), "lr" in group, len(group)) == (0.5, None, True, len(mine))
    assert {type(each) for each in (copy.copy(group), copy.deepcopy(group), group | {}, {} | group)} == {dict}


@pytest.mark.parametrize("given", [True, False], ids=["given", "assigned"])
def test_the_groups_of_another_optimizer_are_shared_as_in_torch(given: bool) -> None:
    def run(cls: Any) -> list[float]:
        first = cls([parameter()], lr=0.1)
        second = cls(first.param_groups if given else [parameter()], lr=0.7)
        if not given:
            second.param_groups = first.param_groups
        for rate in (0.2, 0.3):
            take(second)
            first.param_groups[0]["lr"] = rate
        second.param_groups[0]["weight_decay"] = 0.5
        assert first.param_groups[0]["weight_decay"] == 0.5
        return take(first) + take(second)

    both("SGD", run)


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam, optim.Muon, optim.Stacked], ids=lambda c: c.__name__)
def test_the_default_device_is_without_effect(cls: Any) -> None:
    """As `torch.set_default_device("cuda")`: a meta tensor among the host's tables fails the same way."""
    ends = []
    for device in ("cpu", "meta"):
        w = nn.Parameter(torch.ones(2, 3, 4))
        with torch.device(device):
            rules = (["sgd", "adamw"],) if cls is optim.Stacked else ()
            optimizer = cls([w], *rules, lr=0.1, weight_decay=0.1)
            seen = optimizer.observe(head=w if cls is optim.Stacked else None, norms=True, bf16=True)
            for step in range(3):
                w.grad = torch.full((2, 3, 4), 0.5, device="cpu")
                optimizer.param_groups[0]["weight_decay"] = 0.1 * step
                optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            w.grad = torch.full((2, 3, 4), 0.5, device="cpu")
            optimizer.step()
        ends.append((w.detach(), seen.grad_norm, seen.weights[w]))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "key"), [("SGD", "lr"), ("AdamW", "weight_decay"), ("AdamW", "betas")])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_tensor_is_exchanged_for_another_without_a_new_graph(name: str, key: str, compiled: bool) -> None:
    numbers, ours = [0.1, 0.2, 0.05, 0.4], parameter()
    tensors = [torch.tensor(number, dtype=torch.float64) for number in numbers]
    optimizer = getattr(optim, name)([ours], **{"lr": 0.1, key: (tensors[0], 0.9) if key == "betas" else tensors[0]})
    plain = getattr(optim, name)([parameter()], lr=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True) if compiled else optimizer.step
    graphs = []  # the first call may compile twice
    for number, tensor in zip(numbers, tensors, strict=True):
        for group, value in ((optimizer.param_groups[0], tensor), (plain.param_groups[0], number)):
            group[key] = (value, 0.9) if key == "betas" else value
        for change in (1.0, 0.5):  # in place too
            tensor.mul_(change)
            group[key] = (change * number, 0.9) if key == "betas" else change * number
            ours.grad = torch.ones_like(ours) * number
            step()
            plain.param_groups[0]["params"][0].grad = torch.ones_like(ours) * number
            plain.step()
        assert torch.equal(ours, plain.param_groups[0]["params"][0])
        graphs.append(counter.frame_count)
    assert bool(graphs[0]) == compiled
    assert graphs == graphs[:1] * 4


def test_a_number_that_a_capture_would_write_again_in_each_replay_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more groups than are sent at once, or in a tensor on the CPU. With a stub for the GPU's numbers."""
    copied: list[float] = []
    values = SimpleNamespace(
        device=torch.device("cuda"), is_cuda=True, copy_=lambda host, non_blocking: copied.append(host[0, 0].item())
    )
    rate = torch.tensor(0.5, dtype=torch.float64)
    numbers = Numbers()
    numbers.host, numbers.values, numbers.copied = torch.zeros(1, 6, dtype=torch.float64), [values], {0: rate}  # type: ignore[list-item]
    capturing = [True]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[-1])
    for _ in range(2):  # the number is still to be sent
        with pytest.raises(RuntimeError, match="has been written since the optimizer's last step"):
            numbers.refresh()
    capturing.append(False)
    numbers.refresh()
    assert copied == [0.5]
    capturing.append(True)
    numbers.refresh()  # nothing is left to send
