"""torch's database of optimizer inputs, run through our classes: the same weights, errors and state dicts.

What is left out, and why:

- `amsgrad` and `differentiable`: refused (`test_amsgrad_of_the_database_is_refused`, `test_differentiable_and…`).
- Errors of torch that are no errors here: tensors as lr or betas with `foreach` or mixed with floats
  (`MORE_THAN_TORCH`), and, of Muon, parameters that are no matrices, which it updates as Adam does.
- A parameter that occurs twice in a group: torch warns and updates it twice, here a step refuses it.
- Complex parameters and sparse gradients: refused.
- Muon's `eps`, of Newton–Schulz: always torch's default; torch's database has no other.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ncollapse import optim
from ncollapse.optim.muon import newton_schulz

pytest.importorskip("expecttest", reason="torch.testing._internal.common_optimizers needs it")
from torch.testing._internal import common_optimizers as database

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
PAIRS: dict[str, tuple[Any, Any]] = {
    "sgd": (optim.SGD, torch.optim.SGD),
    "adam": (optim.Adam, torch.optim.Adam),
    "adamw": (optim.AdamW, torch.optim.AdamW),
}
INPUTS: dict[str, Callable[..., Any]] = {name: getattr(database, f"optim_inputs_func_{name}") for name in PAIRS}
ERRORS: dict[str, Callable[..., Any]] = {name: getattr(database, f"optim_error_inputs_func_{name}") for name in PAIRS}
# Inputs that torch refuses in some of its implementations and that our classes accept.
MORE_THAN_TORCH = (
    "lr as Tensor doesn't work with foreach",
    "betas must be either both floats",
    r"betas\[0\] as a Tensor",
)


def inputs() -> Iterator[Any]:
    """Every input for these classes, also those for CUDA only (tensors, capturable), run on the CPU."""
    for name, function in INPUTS.items():
        seen = set()
        for entry in [*function("cpu"), *function("cuda")]:
            theirs = {k: v for k, v in entry.kwargs.items() if k != "capturable"}
            if entry.desc not in seen and not theirs.get("amsgrad"):
                seen.add(entry.desc)
                yield pytest.param(name, entry.kwargs, id=f"{name}-{entry.desc}")


def muon_inputs() -> Iterator[Any]:
    for entry in database.optim_inputs_func_muon("cpu"):
        yield pytest.param(entry.kwargs, id=entry.desc)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3)).to(dtype)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    dtype = next(model.parameters()).dtype
    for seed in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 1, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as floats for torch, which would compute its scalars in float32 from float32 tensors."""

    def number(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    floats = {k: tuple(map(number, v)) if isinstance(v, tuple) else number(v) for k, v in kwargs.items()}
    return {k: v for k, v in floats.items() if k != "capturable"}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("name", "kwargs"), list(inputs()))
def test_same_weights_and_states(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    a, b = network(dtype), network(dtype)
    first, second = ours(a.parameters(), **kwargs), theirs(b.parameters(), **plain(kwargs))
    close(run(a, first, range(30)), run(b, second, range(30)))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        mine, other = first.state[p], {k: v for k, v in second.state[q].items() if v is not None}
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            close(value, other[key].to(value.dtype))


@pytest.mark.parametrize(("name", "kwargs"), list(inputs()))
def test_every_setting_may_stand_in_a_group_of_its_own(name: str, kwargs: dict[str, Any]) -> None:
    """Given in the group, written into a group of defaults, and in one of two groups."""
    ends = []
    for cls, flags in zip(PAIRS[name], (kwargs, plain(kwargs)), strict=True):
        models = [network(torch.float64) for _ in range(3)]
        given, written = cls([{"params": models[0].parameters(), **flags}]), cls(models[1].parameters())
        written.param_groups[0].update(copy.deepcopy(flags))
        halves = [{"params": models[2][0].parameters()}, {"params": models[2][2:].parameters(), **copy.deepcopy(flags)}]
        steps = [run(m, o, range(6)) for m, o in zip(models, (given, written, cls(halves, lr=0.02)), strict=True)]
        assert torch.equal(steps[0], steps[1])
        ends.append(torch.cat(steps))
    close(*ends)


@pytest.mark.parametrize("kwargs", list(muon_inputs()))
def test_muons_inputs(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In arguments, groups and state dicts; torch's bfloat16 of Newton–Schulz replaced by ours."""
    from torch.optim import _muon as theirs

    def exact(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return newton_schulz(grad[None], coefficients, steps)[0]

    monkeypatch.setattr(theirs, "_zeropower_via_newtonschulz", exact)
    ends, states = [], []
    for cls, flags in ((optim.Muon, kwargs), (torch.optim.Muon, plain(kwargs))):
        matrices = [nn.Linear(5, 4, bias=False, dtype=torch.float64), nn.Linear(4, 3, bias=False, dtype=torch.float64)]
        model = nn.Sequential(nn.Flatten(), matrices[0], nn.Tanh(), matrices[1])
        for seed, layer in enumerate(matrices):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
        groups = [{"params": matrices[0].parameters(), "lr": 0.005}, {"params": matrices[1].parameters(), **flags}]
        optimizer = cls(groups, **{"adjust_lr_fn": None, **flags})
        ends.append(run(model, optimizer, range(10)))
        states.append((model, optimizer))
    close(*ends)
    (_, ours), (model, other) = states
    saved = copy.deepcopy(ours.state_dict())
    other.load_state_dict({**saved, "param_groups": [plain(group) for group in saved["param_groups"]]})
    ours.load_state_dict(copy.deepcopy(other.state_dict()))
    close(*(run(m, o, range(10, 15)) for m, o in states))


def test_muons_errors() -> None:
    checked = 0
    for entry in database.optim_error_inputs_func_muon("cpu", torch.float32):
        given, kind = entry.optimizer_error_input, entry.error_type
        params: Any = given.params if given.params is not None else [nn.Parameter(torch.randn(3, 1))]
        if given.desc == "only support 2D parameters":
            optim.Muon(params)
            continue
        errors = (kind, TypeError) if "complex" in given.desc else kind
        with pytest.warns(errors) if issubclass(kind, Warning) else pytest.raises(errors):
            optim.Muon(params, **given.kwargs)
        checked += 1
    assert checked >= 8  # as many as torch 2.11 lists; later versions have more


@pytest.mark.parametrize(("name", "kwargs"), list(inputs()))
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
def test_state_dicts_go_on(name: str, kwargs: dict[str, Any], direction: str) -> None:
    """Saved, loaded with weights_only, and trained further: with our class to the last bit."""
    ours, theirs = PAIRS[name]
    classes = {"ours to torch": (ours, theirs), "torch to ours": (theirs, ours), "ours to ours": (ours, ours)}[
        direction
    ]
    a, b = network(torch.float32), network(torch.float32)
    source, target = (
        cls(m.parameters(), **(plain(kwargs) if cls is theirs else kwargs))
        for cls, m in zip(classes, (a, b), strict=True)
    )
    run(a, source, range(5))
    file = io.BytesIO()
    torch.save({"model": a.state_dict(), "optimizer": source.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    b.load_state_dict(saved["model"])
    target.load_state_dict(saved["optimizer"])
    expected, found = run(a, source, range(5, 10)), run(b, target, range(5, 10))
    if direction == "ours to ours":
        assert torch.equal(found, expected)
    else:
        close(found, expected)


@pytest.mark.parametrize(("name", "kwargs"), list(inputs()))
def test_copies_and_pickles_go_on_to_the_last_bit(name: str, kwargs: dict[str, Any]) -> None:
    model = network(torch.float32)
    optimizer = PAIRS[name][0](model.parameters(), **kwargs)
    run(model, optimizer, range(5))
    both = (model, optimizer)
    others = [copy.deepcopy(both), pickle.loads(pickle.dumps(both))]
    expected = run(*both, range(5, 10))
    for other in others:
        assert torch.equal(run(*other, range(5, 10)), expected)
        for group, copied in zip(optimizer.param_groups, other[1].param_groups, strict=True):
            assert all(copied[key] == value for key, value in group.items() if key != "params")


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_state_dict_is_the_same_every_time_and_with_names(name: str, named: bool) -> None:
    ours, theirs = PAIRS[name]
    a, b = network(torch.float64), network(torch.float64)
    source, target = ours(a.named_parameters() if named else a.parameters()), theirs(b.named_parameters())
    run(a, source, range(3))
    first, second = source.state_dict(), source.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert all(torch.equal(v, second["state"][i][k]) for i, s in first["state"].items() for k, v in s.items())
    b.load_state_dict(a.state_dict())
    target.load_state_dict(copy.deepcopy(first))  # torch would count steps in the same tensor
    assert target.param_groups[0]["param_names"] == [n for n, _ in b.named_parameters()]
    close(run(a, source, range(3, 8)), run(b, target, range(3, 8)))


def older(state: dict[str, Any], step: Callable[[float], Any]) -> dict[str, Any]:
    """A state dict of an old torch: fewer settings, another type of step."""
    old = copy.deepcopy(state)
    for group in old["param_groups"]:
        for key in ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
            group.pop(key, None)
    for values in old["state"].values():
        values.update({"step": step(values["step"])} if "step" in values else {})
    return old


STEPS: dict[str, Any] = {
    "tensor": lambda step: step,
    "float64": lambda step: step.double(),
    "int": int,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_state_dicts_of_older_versions(name: str, step: Callable[[float], Any]) -> None:
    ours, theirs = PAIRS[name]
    a, b = network(torch.float64), network(torch.float64)
    source, target = theirs(a.parameters(), lr=0.02, weight_decay=0.1), ours(b.parameters())
    run(a, source, range(5))
    b.load_state_dict(a.state_dict())
    target.load_state_dict(older(source.state_dict(), step))
    close(run(b, target, range(5, 10)), run(a, source, range(5, 10)))


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_errors(name: str) -> None:
    checked = 0
    for entry in ERRORS[name]("cpu", torch.float32):
        given = entry.optimizer_error_input
        params = given.params if given.params is not None else [nn.Parameter(torch.randn(3, 1))]
        if given.desc.startswith(MORE_THAN_TORCH):
            PAIRS[name][0](params, **given.kwargs)
            continue
        kind: Any = entry.error_type
        with pytest.warns(kind, match=entry.error_regex) if issubclass(kind, Warning) else pytest.raises(kind):
            optimizer = PAIRS[name][0](params, **given.kwargs)
        if kind is UserWarning:  # torch accepts a parameter that occurs twice, and updates it twice
            params[0].grad = torch.ones_like(params[0])
            with pytest.raises(ValueError, match="occurs twice"):
                optimizer.step()
        checked += 1
    assert checked >= 7


@pytest.mark.parametrize("name", PAIRS)
def test_amsgrad_of_the_database_is_refused(name: str) -> None:
    found = [e.kwargs for e in INPUTS[name]("cuda") if e.kwargs.get("amsgrad")]
    assert bool(found) == (name != "sgd")
    for kwargs in found:
        with pytest.raises(ValueError, match="does not support amsgrad"):
            PAIRS[name][0]([nn.Parameter(torch.ones(1))], **kwargs)


@pytest.mark.parametrize("name", PAIRS)
def test_hooks_see_every_step_and_every_state_dict(name: str) -> None:
    model, seen = network(torch.float32), []
    optimizer = PAIRS[name][0](model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    run(model, optimizer, range(2))
    assert optimizer.state_dict()["extra"] == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen == ["before", "after"] * 2 + ["loaded"]


@pytest.mark.parametrize("name", PAIRS)
def test_without_gradients_nothing_happens(name: str) -> None:
    model = network(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = PAIRS[name][0](model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("name", PAIRS)
def test_groups_added_later_and_groups_of_their_own(name: str) -> None:
    ours, theirs = PAIRS[name]
    ends = []
    for cls in (ours, theirs):
        model = network(torch.float64)
        layers = [model[0], model[2], model[4]]
        optimizer = cls([{"params": layers[0].parameters(), "lr": 0.01}], lr=0.1, weight_decay=0.1)
        run(model, optimizer, range(5))
        optimizer.add_param_group({"params": layers[1].parameters(), "weight_decay": 0.0})
        optimizer.add_param_group({"params": layers[2].weight, "lr": 0.001, "maximize": True})
        ends.append(run(model, optimizer, range(5, 15)))
    close(*ends)


@pytest.mark.parametrize("name", PAIRS)
def test_a_hook_may_change_what_is_loaded(name: str) -> None:
    model = network(torch.float32)
    optimizer = PAIRS[name][0](model.parameters(), lr=0.1)
    order: list[str] = []

    def rate(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        order.append("rate")
        return {**state, "param_groups": [{**g, "lr": 0.0, "weight_decay": 0.0} for g in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(rate)
    optimizer.register_load_state_dict_pre_hook(lambda *_: order.append("first"), prepend=True)
    before = run(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["first", "rate"]
    assert optimizer.param_groups[0]["lr"] == 0
    assert torch.equal(run(model, optimizer, range(2, 4)), before)


@pytest.mark.parametrize("name", PAIRS)
def test_zero_gradients_change_no_weight(name: str) -> None:
    model = network(torch.float32)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = PAIRS[name][0](model.parameters(), weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)


@pytest.mark.filterwarnings("ignore:plain PyTorch updates")  # as they have no kernel
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("name", "kwargs"), list(inputs()))
def test_parameters_with_gaps_in_memory(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """The weight and the bias of torch's test."""
    ends = []
    for cls, settings in zip(PAIRS[name], (kwargs, plain(kwargs)), strict=True):
        generator = torch.Generator().manual_seed(0)
        weight, bias = (torch.randn(*n, 2, generator=generator, dtype=dtype)[..., 0] for n in ((10, 5), (10,)))
        params = [nn.Parameter(weight), nn.Parameter(bias)]
        x = torch.randn(5, generator=generator, dtype=dtype)
        optimizer = cls(params, **settings)
        for _ in range(20):
            optimizer.zero_grad()
            (params[0].mv(x) + params[1]).sigmoid().sum().backward()
            optimizer.step()
        assert not params[0].is_contiguous()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    close(*ends)


@pytest.mark.parametrize("name", PAIRS)
def test_differentiable_and_complex_are_refused(name: str) -> None:
    """`amsgrad` is the only option of the database, or of torch's tests, that these classes lack."""
    cls = PAIRS[name][0]
    with pytest.raises(ValueError, match="does not support differentiable"):
        cls([nn.Parameter(torch.ones(1))], differentiable=True)
    with pytest.raises(TypeError, match="complex"):
        cls([nn.Parameter(torch.ones(1, dtype=torch.complex64))])


@pytest.mark.parametrize("name", PAIRS)
def test_param_groups_may_be_plain_dicts_of_the_users(name: str) -> None:
    ends = []
    for cls in PAIRS[name]:
        model = network(torch.float64)
        optimizer = cls(model.parameters(), lr=0.01)
        run(model, optimizer, range(3))
        optimizer.param_groups = [{**g, "lr": 0.05} for g in optimizer.param_groups]
        run(model, optimizer, range(3, 6))
        optimizer.param_groups[0]["lr"] = 0.001
        ends.append(run(model, optimizer, range(6, 9)))
    close(*ends)
