"""torch's own database of optimizer inputs, run through ours: the same weights, errors and state dicts."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nc import optim

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
# What torch refuses in one of its implementations, and ours does.
MORE_THAN_TORCH = (
    "lr as Tensor doesn't work with foreach",
    "betas must be either both floats",
    r"betas\[0\] as a Tensor",
)


def inputs() -> Iterator[Any]:
    """Every input for these classes; those for CUDA alone (tensors, capturable) too, without what is CUDA's."""
    for name, function in INPUTS.items():
        seen = set()
        for entry in [*function("cpu"), *function("cuda")]:
            theirs = {k: v for k, v in entry.kwargs.items() if k != "capturable"}
            if entry.desc not in seen and not theirs.get("amsgrad"):
                seen.add(entry.desc)
                yield pytest.param(name, entry.kwargs, id=f"{name}-{entry.desc}")


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
    """The same numbers for torch as floats: of tensors in float32 it would make its scalars in float32."""

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
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours", "ours to ours"])
def test_state_dicts_go_on(name: str, kwargs: dict[str, Any], direction: str) -> None:
    """Saved, loaded with weights_only, and trained on: by ourselves to the last bit."""
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
        if kind is UserWarning:  # torch takes a parameter that is there twice, and updates it twice
            params[0].grad = torch.ones_like(params[0])
            with pytest.raises(ValueError, match="stands twice"):
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
