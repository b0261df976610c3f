"""The update reference against the definitions, written out in float64 with numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ncollapse.kernels.update.reference import RULES, Settings, Slot, compute_dtype, update_reference

SETTINGS = {"lr": 0.05, "weight_decay": 0.3, "coupling": 0.4}
BETAS = {"sgd": (0.9, 0.0), "signum": (0.9, 0.0), "adam": (0.9, 0.999), "lion": (0.9, 0.99)}
SHAPES = {"empty": (0,), "scalar": (), "one": (1,), "odd": (63,), "thousand": (1000,), "image": (3, 5, 7, 2)}


def sgd_numpy(g: Any, state: dict[str, Any]) -> Any:
    state["v"] = 0.9 * state.get("v", 0) + g
    return state["v"]


def signum_numpy(g: Any, state: dict[str, Any]) -> Any:
    return np.sign(sgd_numpy(g, state))


def adam_numpy(g: Any, state: dict[str, Any]) -> Any:
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    return state["m"] / (1 - 0.9**t) / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)


def lion_numpy(g: Any, state: dict[str, Any]) -> Any:
    m = state.get("m", 0)
    state["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * g)


NUMPY = {"sgd": sgd_numpy, "signum": signum_numpy, "adam": adam_numpy, "lion": lion_numpy}


def start(rule: str, params: list[Tensor]) -> Callable[..., None]:
    """Return a function (grads, **hyperparameters) that takes a step and keeps its state."""
    slots = [
        Slot(
            torch.zeros_like(p, dtype=compute_dtype(p)),
            torch.zeros_like(p, dtype=compute_dtype(p)) if rule == "adam" else None,
            torch.tensor(0.0) if rule == "adam" else None,
        )
        for p in params
    ]
    beta1, beta2 = BETAS[rule]
    common = {"beta1": beta1, "beta2": beta2, "eps": 1e-8}
    return lambda grads, **kw: update_reference(rule, params, grads, slots, Settings(**common | kw))


def test_every_rule_is_tested() -> None:
    assert NUMPY.keys() == RULES.keys()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", NUMPY)
def test_matches_definition(rule: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    param = torch.randn(shape, generator=generator, dtype=torch.float64)
    w, state = param.numpy().copy(), {}
    step = start(rule, [param])
    lr, decay, c = SETTINGS.values()
    for _ in range(20):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        w = (1 - lr * (1 - c) * decay) * w - lr * NUMPY[rule](grad.numpy() + c * decay * w, state)
        step([grad], **SETTINGS)
    np.testing.assert_allclose(param.numpy(), w, rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("rule", [*NUMPY, "mixed"])
def test_each_stacked_run_equals_a_run_alone(rule: str) -> None:
    """Vectors of hyperparameters over `[R, …]` give R separate updates, even if one run is NaN."""
    generator = torch.Generator().manual_seed(2)
    rules = list(NUMPY) if rule == "mixed" else [rule] * 4
    single = [torch.randn(5, 3, generator=generator) for _ in range(4)]
    stacked = torch.stack(single)
    values = {
        "lr": [0.1, 0.01, 0.2, 0.1],
        "weight_decay": [0.0, 0.1, 0.5, 0.2],
        "coupling": [1.0, 0.0, 0.3, 0.5],
        "beta1": [BETAS[r][0] for r in rules],
        "beta2": [BETAS[r][1] for r in rules],
    }
    slot = Slot(torch.zeros_like(stacked), torch.zeros_like(stacked), torch.tensor(0.0))
    vectors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    alone = [start(r, [p]) for r, p in zip(rules, single, strict=True)]
    for _ in range(20):
        grads = torch.randn(4, 5, 3, generator=generator)
        grads[3] = float("nan")
        update_reference(rules if rule == "mixed" else rule, [stacked], [grads], [slot], Settings(**vectors, eps=1e-8))
        for r, step in enumerate(alone):
            step([grads[r]], **{name: v[r] for name, v in values.items()})
    assert stacked[3].isnan().all()
    assert torch.equal(stacked[:3], torch.stack(single)[:3])


@pytest.mark.parametrize("rule", NUMPY)
def test_nan_and_inf_gradients_affect_their_elements_alone(rule: str) -> None:
    param = torch.ones(4)
    start(rule, [param])([torch.tensor([1.0, float("nan"), float("inf"), 0.0])], lr=0.1)
    assert param[[0, 3]].isfinite().all()
    assert param[1].isnan()


def test_decoupled_decay_is_exact_over_many_steps() -> None:
    """∏(1 − ηλ) over 20,000 float32 steps: a factor rounded to float32 would exceed this bound."""
    param = torch.full((1000,), 0.7) + torch.rand(1000) * 0.1
    before = param.double().norm()
    settings = Settings(lr=0.0679, weight_decay=5e-4, coupling=0.0)
    for _ in range(20_000):
        update_reference("sgd", [param], [torch.zeros(1000)], [Slot()], settings)
    assert abs(param.double().norm() / before / (1 - 0.0679 * 5e-4) ** 20_000 - 1) < 1e-4


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
        full.copy_(half)  # both continue from the rounded parameter


@pytest.mark.parametrize("rule", NUMPY)
def test_a_scaled_step_equals_one_with_the_gradients_divided(rule: str) -> None:
    a, b = torch.ones(5), torch.ones(5)
    grad, slots = torch.randn(5), [Slot(torch.zeros(5), torch.zeros(5), torch.tensor(0.0)) for _ in range(2)]
    settings = Settings(lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8)
    update_reference(rule, [a], [grad * 1024], slots[:1], settings, grad_scale=torch.tensor(1024.0))
    update_reference(rule, [b], [grad], slots[1:], settings)
    assert torch.equal(a, b)
    update_reference(rule, [a], [grad], slots[:1], settings, found_inf=torch.tensor(1.0))
    assert torch.equal(a, b)
