"""The update kernels against the reference on the CPU, bit for bit: C++, Triton in its interpreter and on a GPU.

There are two exceptions. Triton has no pow, so it computes Adam's bias corrections with exp and log: in float64 they
may differ in the last digits. And Triton's interpreter truncates bfloat16 where a GPU rounds: one step may change a
weight by one unit in the last place (2⁻⁷ relative).
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import Backend, backend_fixture, cases, parameter
from ncollapse.kernels.update.reference import RULES, Settings, Slot, update_reference
from ncollapse.kernels.update.table import HYPERS, Extras, HyperTable, Lists, code, same_layout
from update_twins import DTYPES, Launch, Twins, hyper_table, launch_cpu, launch_triton, like, numbers, slot_for

BACKENDS = ("cpu", "interpreter", "cuda")
SHAPES: list[tuple[int, ...]] = [(0,), (), (1,), (63,), (1000,), (3, 5, 7, 2), (512,), (4096,), (5000,)]
# Around the sizes of a block and of a chunk, and one of many chunks.
MORE_SHAPES: list[tuple[int, ...]] = [(511,), (513,), (4095,), (4097,), (3, 100_001)]
# Adam's bias corrections in float64.
ADAM_FLOAT64 = {"cpu": 1e-14, "interpreter": 1e-14, "cuda": 1e-12}


backend = backend_fixture(*BACKENDS)


@pytest.fixture
def launch(backend: Backend) -> Launch:
    return launch_cpu if backend.name == "cpu" else launch_triton


def normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def tolerance(backend: Backend, rule: str, dtype: torch.dtype) -> float:
    return ADAM_FLOAT64[backend.name] if dtype == torch.float64 and rule == "adam" else 0.0


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(
    backend: Backend, launch: Launch, rule: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    device, (dtype, grad_dtype) = backend.device, dtypes
    shapes = [*SHAPES, *MORE_SHAPES] if backend.name == "cuda" else SHAPES
    twins = Twins(rule, [normal(shape, device, dtype) for shape in shapes])
    truncates = backend.name == "interpreter" and dtype == torch.bfloat16
    for k in range(4):
        grads = [normal(shape, device, grad_dtype) for shape in shapes]
        twins.step(launch, grads, numbers(rule), maximize=k == 3)
        twins.check(2**-7 if truncates else tolerance(backend, rule, dtype))
        for _, ours, theirs in twins.pairs() if truncates else ():
            if ours is not None:
                ours.copy_(theirs)


@pytest.mark.parametrize("rule", RULES)
@cases("size", [700], [4000], backends=BACKENDS)
def test_twenty_steps_with_other_hyperparameters_at_each(
    launch: Launch, device: torch.device, rule: str, size: int
) -> None:
    twins = Twins(rule, [normal((size,), device)])
    for k in range(20):
        h = numbers(rule, lr=0.1 / (k + 1), coupling=k / 19, weight_decay=0.1 * (k % 3), beta1=0.04 * k)
        twins.step(launch, [normal((size,), device)], h)
    twins.check()


@pytest.mark.parametrize("rule", RULES)
def test_layouts(launch: Launch, device: torch.device, rule: str) -> None:
    image = normal((6, 5, 4, 3), device)
    params = [
        image.to(memory_format=torch.channels_last),
        image.transpose(0, 3).contiguous().transpose(0, 3),
        normal((40, 30), device).T,
        normal((1, 7, 1, 5), device).to(memory_format=torch.channels_last),
        normal((64, 32, 3, 3), device).to(memory_format=torch.channels_last),
    ]
    twins = Twins(rule, params)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        assert all(twins.ours.fits(i, 1) and same_layout(params[i], g) for i, g in enumerate(grads))
        twins.step(launch, grads, numbers(rule))
    twins.check()


@pytest.mark.parametrize("rule", RULES)
@cases("dtype", [torch.float32], [torch.bfloat16, torch.float64], backends=BACKENDS)
def test_unaligned_views_and_their_neighbours(backend: Backend, launch: Launch, rule: str, dtype: torch.dtype) -> None:
    buffer = normal((9000,), backend.device, dtype)
    before = buffer.clone()
    params = [buffer[1:1400], buffer[1403:5404], buffer[5405:5406], buffer[5408:8999]]
    twins = Twins(rule, params)
    twins.step(launch, [normal((p.numel() + 3,), backend.device, dtype)[3:] for p in params], numbers(rule))
    twins.check(tolerance(backend, rule, dtype))
    outside = [0, *range(1400, 1403), 5404, 5406, 5407, 8999]
    assert torch.equal(buffer[outside], before[outside])


@pytest.mark.parametrize("rule", RULES)
@cases("dtype", [torch.float32], [torch.bfloat16, torch.float16], backends=BACKENDS)
def test_nan_inf_and_subnormal_numbers(launch: Launch, device: torch.device, rule: str, dtype: torch.dtype) -> None:
    start = normal((700,), device, dtype)
    start[::5] *= 1e-30
    twins = Twins(rule, [start])
    for _ in range(3):
        grad = normal((700,), device, dtype)
        grad[::7], grad[1::7], grad[2::7], grad[3::7] = float("nan"), float("inf"), -float("inf"), 0.0
        grad[4::7] *= torch.finfo(dtype).tiny
        twins.step(launch, [grad], numbers(rule))
    twins.check()
    assert twins.ours.params[0][4::7].isfinite().all()


@pytest.mark.parametrize("variant", ["without momentum", "first step", "nesterov"])
def test_variants_of_sgd(launch: Launch, device: torch.device, variant: str) -> None:
    nesterov = variant == "nesterov"
    param, grad, momentum = (normal((700,), device) for _ in range(3))
    slot, h = {
        "without momentum": (Slot(), numbers("sgd", beta1=0.0)),
        "first step": (Slot(torch.zeros_like(param), fresh=True), numbers("sgd")),
        "nesterov": (Slot(momentum), numbers("sgd", beta2=0.0)),
    }[variant]
    twin, copy = like(param), replace(slot, first=None if slot.first is None else like(slot.first))
    launch(Lists([param], [slot], [0]), [grad], hyper_table(["sgd"], [h], device, nesterov=nesterov), None, None)
    update_reference("sgd", [twin], [grad.cpu()], [copy], Settings(**h, nesterov=nesterov))
    assert torch.equal(param.cpu(), twin)


@pytest.mark.parametrize(
    ("backend", "count"),
    [parameter("cpu", 3000), parameter("interpreter", 150), parameter("cuda", 1), parameter("cuda", 5000)],
    indirect=["backend"],
)
def test_many_tensors_each_with_its_own_rule_and_numbers(launch: Launch, device: torch.device, count: int) -> None:
    """In one launch."""
    rules = [list(RULES)[i % 4] for i in range(count)]
    values = [numbers(r, lr=0.001 * (i % 50), weight_decay=0.01 * (i % 7)) for i, r in enumerate(rules)]
    params, grads = ([normal((i % 9,), device) for i in range(count)] for _ in range(2))
    copies, copied_grads = [like(p) for p in params], [g.cpu() for g in grads]
    slots, twins = ([slot_for(r, p) for r, p in zip(rules, tensors, strict=True)] for tensors in (params, copies))
    table = hyper_table(rules, values, device)
    for _ in range(2):
        launch(Lists(params, slots, list(range(count))), grads, table, None, None)
        for i, rule in enumerate(rules):
            update_reference(rule, copies[i : i + 1], copied_grads[i : i + 1], twins[i : i + 1], Settings(**values[i]))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(params, copies, strict=True))
    assert all(s.step is None or s.step.item() == 2 for s in slots)


@cases("size", [(6, 5), (7, 5, 3), (4096,)], [(100, 513)], backends=BACKENDS)
def test_stacked_runs_each_with_its_own_rule(launch: Launch, device: torch.device, size: tuple[int, ...]) -> None:
    """Runs of odd size are unaligned; hyperparameters are read from tensors in float64 or float32."""
    rules = ["adam", "sgd", "lion", "signum", "adam"]
    values = {name: [numbers(r)[name] for r in rules] for name in HYPERS} | {"lr": [0.1, 0.2, 0.05, 0.025, 0.3]}
    vectors = {n: torch.tensor(v, dtype=torch.float32 if n == "lr" else torch.float64) for n, v in values.items()}
    live = [like(v, device) for v in vectors.values()]
    unread = torch.full((1, len(HYPERS)), float("nan"), dtype=torch.float64, device=device)
    table = HyperTable(unread, live, list(range(len(HYPERS))), [[code(r) for r in rules]])
    param = normal((5, *size), device)
    copy = like(param)
    slot, twin = slot_for("adam", param), slot_for("adam", copy)
    for _ in range(3):
        grad = normal((5, *size), device)
        launch(Lists([param], [slot], [0]), [grad], table, None, None)
        update_reference(rules, [copy], [grad.cpu()], [twin], Settings(**vectors))
        for rate in (live[0], vectors["lr"]):
            rate.mul_(0.5)  # the next step reads it
    assert torch.equal(param.cpu(), copy)
    assert slot.step is not None
    assert slot.step.item() == 3


@pytest.mark.parametrize("scale", [1024.0, 3e4])
@pytest.mark.parametrize("rule", RULES)
def test_scaled_gradients_and_a_skipped_step(launch: Launch, device: torch.device, rule: str, scale: float) -> None:
    twins = Twins(rule, [normal((600,), device), normal((3,), device)])
    grads = [normal((600,), device) * scale, normal((3,), device) * scale]
    table = hyper_table([rule], [numbers(rule)], device)
    grad_scale, found_inf = torch.full((), scale, device=device), torch.zeros(1, device=device)
    launch(twins.ours, grads, table, grad_scale, found_inf)
    launch(twins.ours, grads, table, grad_scale, found_inf + 1)
    update_reference(
        rule, twins.theirs.params, [g.cpu() for g in grads], twins.theirs.slots, Settings(**numbers(rule)),
        grad_scale=grad_scale.cpu(),
    )  # fmt: skip
    twins.check()


@pytest.mark.parametrize("runs", [1, 3])
@cases("size", [2000], [200_000], backends=BACKENDS)
def test_norms_and_copies(backend: Backend, launch: Launch, runs: int, size: int) -> None:
    """The norms are the same bits every time, and NaN after a step that was skipped."""
    device, stack = backend.device, (runs,) if runs > 1 else ()
    params = [normal((*stack, *shape), device) for shape in ((5, 3), (10, 17), (size,))]
    grads = [torch.randn_like(p) for p in params]
    before = [p.clone() for p in params]
    nan, float64 = float("nan"), {"dtype": torch.float64, "device": device}
    extras = Extras(
        copies=[torch.full_like(p, nan, dtype=torch.bfloat16) for p in params],
        norms=torch.full((runs, 2), nan, **float64),
    )
    assert extras.norms is not None
    row = torch.tensor([[numbers("adam")[n] for n in HYPERS]], **float64)
    table = HyperTable(row, [], [], [[code("adam")] * runs])
    scale = torch.full((), 2.0, device=device)
    seen = []
    for _ in range(3 if backend.name == "cuda" else 2):
        for param, start in zip(params, before, strict=True):
            param.copy_(start)
        lists = Lists(params, [slot_for("adam", p) for p in params], [0, 0, 0], extras)
        launch(lists, grads, table, scale, None)
        seen.append(extras.norms.clone())
    assert all(torch.equal(norms, seen[0]) for norms in seen)
    changes = [(g.double() / 2, p.double() - b.double()) for g, p, b in zip(grads, params, before, strict=True)]
    for k in range(2):
        expected = torch.stack([change[k].square().reshape(runs, -1).sum(1) for change in changes]).sum(0)
        # A program sums its elements in float32; and the change is the rounded p − w, not p_new − p_old.
        torch.testing.assert_close(extras.norms[:, k], expected, rtol=1e-6, atol=0)
    if backend.name != "interpreter":  # it truncates bfloat16
        assert all(c is not None and torch.equal(c, p.bfloat16()) for c, p in zip(extras.copies, params, strict=True))
    lists.extras = replace(extras, add=True)
    launch(lists, grads, table, scale, None)
    assert (extras.norms > seen[0]).all()
    launch(lists, grads, table, scale, torch.ones(1, device=device))
    assert extras.norms.isnan().all()


@pytest.mark.compiled
@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    size=st.integers(0, 700),
    lr=st.floats(0, 1),
    decay=st.floats(0, 1),
    coupling=st.floats(0, 1),
    beta1=st.floats(0, 0.999),
    beta2=st.floats(0, 0.9999),
    eps=st.sampled_from([1e-8, 1e-3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_hyperparameters(
    rule: str, size: int, lr: float, decay: float, coupling: float, beta1: float, beta2: float, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = {"lr": lr, "weight_decay": decay, "coupling": coupling, "beta1": beta1, "beta2": beta2, "eps": eps}
    twins = Twins(rule, [torch.randn(size, generator=generator)])
    for _ in range(3):
        twins.step(launch_cpu, [torch.randn(size, generator=generator)], h)
    twins.check()
