"""Input that Muon refuses, before anything has changed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from muon_cases import close, parameters, take
from ncollapse import optim

VECTOR = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "Muon: lr must be"),
        ({"momentum": 1.0}, r"Muon: momentum must be a number, or one per stacked run, in \[0, 1\)"),
        ({"weight_decay": float("nan")}, "Muon: weight_decay must be"),
        ({"coupling": 1.5}, "Muon: coupling must be"),
        ({"betas": (0.9, 1.0)}, "Muon: betas must be"),
        (
            {"adjust_lr_fn": "spectral"},
            "adjust_lr_fn must be one of match_rms_adamw, original, spectral_unclamped; got 'spectral'",
        ),
        ({"ns_steps": 0}, r"ns_steps must be an integer in \[1, 100\); got 0"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
        ({"lr": VECTOR}, "lr has a value for each of 3 stacked runs; give stacked=True"),
        ({"betas": (0.9, VECTOR)}, "beta2 has a value for each of 3 stacked runs"),
        ({"stacked": True, "eps": VECTOR[:2]}, "eps has a value for each of 2 stacked runs, but a parameter has shape"),
    ],
    ids=str,
)
def test_bad_settings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Muon([nn.Parameter(torch.ones(3, 2))], **kwargs)


def test_bad_input_is_refused_before_anything_changed() -> None:
    w = nn.Parameter(torch.ones(3, 2))
    for others in ((2, 3), ()):
        with pytest.raises(ValueError, match=r"stacked parameters are \[R, …\] with one R; their first dimensions are"):
            optim.Muon([w, nn.Parameter(torch.ones(others))], stacked=True)
    with pytest.raises(TypeError, match="complex"):
        optim.Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    shard = nn.Parameter(torch.ones(3, 2))
    shard.to_local = lambda: shard  # as a DTensor has it
    with pytest.raises(TypeError, match="whole matrices; got a DTensor"):
        optim.Muon([shard])
    optimizer = optim.Muon([w], stacked=True)
    for group, message in (
        ({"params": [nn.Parameter(torch.ones(2, 2))]}, "first dimensions"),
        ({"params": [nn.Parameter(torch.ones(3, 2))], "stacked": False}, "same for all param groups"),
        ({"params": [nn.Parameter(torch.ones(3, 2))], "nesterov": False, "momentum": 2.0}, "momentum must be"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    params = parameters([(3, 2), (5, 2)])
    optimizer = optim.Muon(params)
    before = take(optimizer, params, range(1))
    params[1].grad = torch.ones(5, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="Muon does not take sparse gradients"):
        optimizer.step()
    close([p.detach() for p in params], before, 0.0)


def test_a_state_that_does_not_fit_is_refused_before_anything_changed() -> None:
    params = parameters()
    optimizer = optim.Muon(params, lr=0.02)
    take(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    shape, number, stacked = (copy.deepcopy(before) for _ in range(3))
    shape["state"][0]["momentum_buffer"] = torch.ones(7, 4)
    number["param_groups"][0]["momentum"] = 1.0
    stacked["param_groups"][0]["stacked"] = True
    adam = optim.Adam(parameters())
    take(adam, adam.param_groups[0]["params"], range(1))
    for state, message in (
        (shape, r"momentum_buffer has shape \(7, 4\) where the parameter has \(4, 7\); it was saved with other"),
        (number, "momentum must be"),
        (stacked, "stacked must be the same"),
        (adam.state_dict(), "another optimizer's: it has exp_avg, exp_avg_sq, Muon keeps momentum_buffer"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i][k], v) for i, s in before["state"].items() for k, v in s.items())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(optim.Muon(params[:2]).state_dict())
    optimizer.state[params[0]]["momentum_buffer"] = torch.ones(4, 7, device="meta")
    with pytest.raises(RuntimeError, match="a parameter is on cpu, its momentum_buffer on meta"):
        optimizer.step()
