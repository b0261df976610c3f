"""Update references against the definitions, written out in float64 with numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nc.kernels.update import adam_reference, compute_dtype, sgd_reference, signum_reference

SETTINGS = {"lr": 0.05, "weight_decay": 0.3, "coupling": 0.4}
SHAPES = {"empty": (0,), "scalar": (), "one": (1,), "odd": (63,), "thousand": (1000,), "image": (3, 5, 7, 2)}


def sgd_numpy(w: Any, g: Any, state: dict[str, Any], lr: float, weight_decay: float, coupling: float) -> Any:
    state["v"] = 0.9 * state.get("v", 0) + g + coupling * weight_decay * w
    return (1 - lr * (1 - coupling) * weight_decay) * w - lr * state["v"]


def signum_numpy(w: Any, g: Any, state: dict[str, Any], lr: float, weight_decay: float, coupling: float) -> Any:
    state["v"] = 0.9 * state.get("v", 0) + g + coupling * weight_decay * w
    return (1 - lr * (1 - coupling) * weight_decay) * w - lr * np.sign(state["v"])


def adam_numpy(w: Any, g: Any, state: dict[str, Any], lr: float, weight_decay: float, coupling: float) -> Any:
    g = g + coupling * weight_decay * w
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    m, v = state["m"] / (1 - 0.9**t), state["v"] / (1 - 0.999**t)
    return (1 - lr * (1 - coupling) * weight_decay) * w - lr * m / (np.sqrt(v) + 1e-8)


def start(rule: str, params: list[Tensor]) -> Callable[..., None]:
    """A function (grads, **hyperparameters) that steps with state of its own."""
    first, second = ([torch.zeros_like(p, dtype=compute_dtype(p)) for p in params] for _ in range(2))
    if rule == "adam":
        steps = [torch.tensor(0.0) for _ in params]
        return lambda grads, **kw: adam_reference(params, grads, first, second, steps, **kw)
    function = {"sgd": sgd_reference, "signum": signum_reference}[rule]
    return lambda grads, **kw: function(params, grads, first, momentum=0.9, **kw)


NUMPY = {"sgd": sgd_numpy, "signum": signum_numpy, "adam": adam_numpy}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", NUMPY)
def test_matches_definition(rule: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    param = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected, state = param.numpy().copy(), {}
    step = start(rule, [param])
    for _ in range(20):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        expected = NUMPY[rule](expected, grad.numpy(), state, **SETTINGS)
        step([grad], **SETTINGS)
    np.testing.assert_allclose(param.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
@pytest.mark.parametrize("rule", NUMPY)
def test_layout_does_not_matter(rule: str, layout: str) -> None:
    dense = torch.randn(4, 6, 8, 10)
    other = {
        "channels_last": lambda: dense.clone(memory_format=torch.channels_last),
        "transposed": lambda: dense.transpose(0, 3).contiguous().transpose(0, 3),
        "strided": lambda: torch.randn(8, 6, 8, 10)[::2].copy_(dense),
    }[layout]()
    assert not other.is_contiguous()
    steps = [start(rule, [p]) for p in (dense, other)]
    for _ in range(20):
        grad = torch.randn(4, 6, 8, 10)
        for step in steps:
            step([grad], **SETTINGS)
    assert torch.equal(dense, other)


@pytest.mark.parametrize("rule", NUMPY)
def test_stacked_runs_train_as_alone(rule: str) -> None:
    """A vector of hyperparameters over [R, …] is R separate updates, also where a run's neighbour is NaN."""
    generator = torch.Generator().manual_seed(2)
    single = [torch.randn(5, 3, generator=generator) for _ in range(4)]
    stacked = torch.stack(single)
    values = {
        "lr": [0.1, 0.01, 0.2, 0.1],
        "weight_decay": [0.0, 0.1, 0.5, 0.2],
        "coupling": [1.0, 0.0, 0.3, 0.5],
    }
    together = start(rule, [stacked])
    alone = [start(rule, [p]) for p in single]
    vectors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    for _ in range(20):
        grads = torch.randn(4, 5, 3, generator=generator)
        grads[3] = float("nan")
        together([grads], **vectors)
        for r, step in enumerate(alone):
            step([grads[r]], **{name: v[r] for name, v in values.items()})
    assert stacked[3].isnan().all()
    torch.testing.assert_close(stacked[:3], torch.stack(single)[:3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", NUMPY)
def test_nan_and_inf_gradients_stay_where_they_are(rule: str) -> None:
    param = torch.ones(4)
    start(rule, [param])([torch.tensor([1.0, float("nan"), float("inf"), 0.0])], lr=0.1)
    assert param[[0, 3]].isfinite().all()
    assert param[1].isnan()


def test_decoupled_decay_is_exact_over_many_steps() -> None:
    """∏(1 − ηλ) over 20,000 float32 steps: a rounded factor in float32 would be off by more than this bound."""
    param = torch.full((1000,), 0.7) + torch.rand(1000) * 0.1
    before = param.double().norm()
    rate = 0.0679 * 5e-4
    for _ in range(20_000):
        sgd_reference([param], [torch.zeros(1000)], [None], lr=0.0679, weight_decay=5e-4, coupling=0.0)
    assert abs(param.double().norm() / before / (1 - rate) ** 20_000 - 1) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rule", NUMPY)
def test_half_precision_is_float32_rounded_once(rule: str, dtype: torch.dtype) -> None:
    half = torch.randn(200).to(dtype)
    full = half.float()
    steps = start(rule, [full]), start(rule, [half])
    for _ in range(20):
        grad = torch.randn(200).to(dtype)
        steps[0]([grad.float()], **SETTINGS)
        steps[1]([grad], **SETTINGS)
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))
        full.copy_(half)  # the next step starts from the rounded parameter in both
