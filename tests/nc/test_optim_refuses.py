"""Input that the optimizers refuse, and their error messages."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ncollapse import optim

CLASSES = [optim.SGD, optim.SGDW, optim.Signum, optim.SignumW, optim.Adam, optim.AdamW, optim.Lion]


def stepped(cls: Any, **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer of two parameters that has taken two steps."""
    params = [nn.Parameter(torch.randn(3 + i, 2)) for i in range(2)]
    optimizer = cls(params, **kwargs)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "coupling"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_hyperparameters_out_of_range_are_refused(cls: Any, name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: {name} must be"):
        cls([nn.Parameter(torch.ones(1))], **{name: bad})


def test_other_bad_input_is_refused_before_anything_changed() -> None:
    param = nn.Parameter(torch.ones(4, 2))
    with pytest.raises(ValueError, match="Nesterov"):
        optim.SGD([param], nesterov=True)
    with pytest.raises(ValueError, match="3 stacked runs"):
        optim.SGD([param], lr=torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(TypeError, match="complex"):
        optim.SGD([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    optimizer = optim.SGD([param])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1})
    assert len(optimizer.param_groups) == 1
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optim.Adam(embedding.parameters()).step()


def test_a_state_that_does_not_fit_is_refused_before_anything_changed() -> None:
    optimizer = stepped(optim.Adam)
    before = copy.deepcopy(optimizer.state_dict())
    other = stepped(optim.SGD, momentum=0.9)
    wrong_shape = copy.deepcopy(before)
    wrong_shape["state"][1]["exp_avg"] = torch.ones(2)
    wrong_number = copy.deepcopy(before)
    wrong_number["param_groups"][0]["lr"] = float("nan")
    amsgrad = stepped(torch.optim.Adam, amsgrad=True)
    for state, message in (
        (other.state_dict(), "another optimizer's: it has momentum_buffer"),
        (amsgrad.state_dict(), "Adam does not support amsgrad"),
        (wrong_shape, r"exp_avg has shape \(2,\) where the parameter has \(4, 2\)"),
        (wrong_number, "lr must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": torch.tensor(1)}, "must be float32 or float64"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"lr": torch.ones(2, 2)}, r"got a tensor of shape \(2, 2\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"coupling": 1.5}, "coupling must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"amsgrad": True}, "does not support amsgrad"),
        ({"differentiable": True}, "does not support differentiable"),
    ],
    ids=str,
)
def test_bad_settings_of_adam(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Adam([nn.Parameter(torch.ones(4, 2))], **kwargs)


def test_other_bad_input() -> None:
    with pytest.raises(TypeError, match="floating-point parameters"):
        optim.Adam([torch.ones(2, dtype=torch.int64)])
    optimizer = stepped(optim.Adam)
    param = optimizer.param_groups[0]["params"][0]
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].to("meta")
    with pytest.raises(RuntimeError, match="a parameter is on cpu, its exp_avg on meta"):
        optimizer.step()
    assert optim.Adam([param], fused=True, foreach=False, capturable=True).param_groups[0]["lr"] == 1e-3
