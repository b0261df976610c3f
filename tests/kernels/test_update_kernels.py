"""Both update kernels against the reference: the CPU's as it runs, the GPU's in Triton's interpreter.

Bit for bit, but for two things. Triton has no pow, so that Adam's bias corrections come from exp and log: in float64
they may differ in the last digits, which float32 does not see. And Triton's interpreter cuts bfloat16 off where the GPU
rounds: in a step a weight may be one unit in its last place (2⁻⁷ relative) off.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncollapse.kernels.update.reference import RULES, Settings, Slot, update_reference
from ncollapse.kernels.update.table import HYPERS, Extras, HyperTable, Lists, code
from update_twins import DTYPES, Launch, Twins, hyper_table, launch_cpu, launch_triton, numbers, slot_for

SHAPES: list[tuple[int, ...]] = [(0,), (), (1,), (63,), (1000,), (3, 5, 7, 2), (512,), (4096,), (5000,)]


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.compiled), "triton"])
def launch(request: pytest.FixtureRequest) -> Launch:
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernel is tested on it (tests/gpu)")
    return {"cpu": launch_cpu, "triton": launch_triton}[request.param]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(launch: Launch, rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.manual_seed(0)
    dtype, grad_dtype = dtypes
    twins = Twins(rule, [torch.randn(shape).to(dtype) for shape in SHAPES])
    cut_off = launch is launch_triton and dtype == torch.bfloat16
    tolerance = 2**-7 if cut_off else 1e-14 if dtype == torch.float64 and rule == "adam" else 0.0
    for k in range(4):
        grads = [torch.randn(shape).to(grad_dtype) for shape in SHAPES]
        twins.step(launch, grads, numbers(rule), maximize=k == 3)
        twins.check(tolerance)
        for _, ours, theirs in twins.pairs() if cut_off else ():
            if ours is not None:
                ours.copy_(theirs)


@pytest.mark.parametrize("rule", RULES)
def test_layouts(launch: Launch, rule: str) -> None:
    torch.manual_seed(0)
    image = torch.randn(6, 5, 4, 3)
    params = [
        image.to(memory_format=torch.channels_last),
        image.transpose(0, 3).contiguous().transpose(0, 3),
        torch.randn(40, 30).T,
        torch.randn(1, 7, 1, 5).to(memory_format=torch.channels_last),
    ]
    twins = Twins(rule, params)
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        assert all(twins.ours.fits(i, g, 1) for i, g in enumerate(grads))
        twins.step(launch, grads, numbers(rule))
    twins.check()


@pytest.mark.parametrize("rule", RULES)
def test_unaligned_views_and_their_neighbours(launch: Launch, rule: str) -> None:
    torch.manual_seed(0)
    buffer = torch.randn(9000)
    before = buffer.clone()
    params = [buffer[1:1400], buffer[1403:5404], buffer[5405:5406], buffer[5408:8999]]
    twins = Twins(rule, params)
    grads = [torch.randn(p.numel() + 3)[3:] for p in params]
    twins.step(launch, grads, numbers(rule))
    twins.check()
    outside = [0, *range(1400, 1403), 5404, 5406, 5407, 8999]
    assert torch.equal(buffer[outside], before[outside])


@pytest.mark.parametrize("rule", RULES)
def test_nan_and_inf_spread_as_in_the_reference(launch: Launch, rule: str) -> None:
    twins = Twins(rule, [torch.ones(600)])
    for _ in range(3):
        grad = torch.randn(600)
        grad[::7], grad[1::7], grad[2::7], grad[3::7] = float("nan"), float("inf"), -float("inf"), 0.0
        twins.step(launch, [grad], numbers(rule))
    twins.check()
    assert twins.ours.params[0][4::7].isfinite().all()


def test_sgd_without_momentum_and_its_first_step_and_nesterov(launch: Launch) -> None:
    torch.manual_seed(0)
    for slot, h, nesterov in (
        (Slot(), numbers("sgd", beta1=0.0), False),
        (Slot(torch.zeros(700), fresh=True), numbers("sgd"), False),
        (Slot(torch.randn(700)), numbers("sgd", beta2=0.0), True),
    ):
        param, grad = torch.randn(700), torch.randn(700)
        twin, copy = param.clone(), replace(slot, first=None if slot.first is None else slot.first.clone())
        launch(Lists([param], [slot], [0]), [grad], hyper_table(["sgd"], [h], nesterov=nesterov), None, None)
        update_reference("sgd", [twin], [grad], [copy], Settings(**h, nesterov=nesterov))
        assert torch.equal(param, twin)


def test_many_tensors_with_their_own_settings_and_rules_in_one_launch(launch: Launch) -> None:
    torch.manual_seed(0)
    count = 3000 if launch is launch_cpu else 150
    rules = [list(RULES)[i % 4] for i in range(count)]
    values = [numbers(r, lr=0.001 * (i % 50), weight_decay=0.01 * (i % 7)) for i, r in enumerate(rules)]
    params = [torch.randn(i % 9) for i in range(count)]
    grads = [torch.randn(i % 9) for i in range(count)]
    slots, twins = [[slot_for(r, p) for r, p in zip(rules, params, strict=True)] for _ in range(2)]
    copies = [p.clone() for p in params]
    table = hyper_table(rules, values)
    for _ in range(2):
        launch(Lists(params, slots, list(range(count))), grads, table, None, None)
        for i, rule in enumerate(rules):
            update_reference(rule, copies[i : i + 1], grads[i : i + 1], twins[i : i + 1], Settings(**values[i]))
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    assert all(s.step is None or s.step == 2 for s in slots)


@pytest.mark.parametrize("size", [(6, 5), (7, 5, 3), (4096,)], ids=str)
def test_stacked_runs_each_with_a_rule(launch: Launch, size: tuple[int, ...]) -> None:
    """Runs of odd size lie unaligned; hyperparameters are read from tensors in float64 or float32."""
    torch.manual_seed(0)
    rules = ["adam", "sgd", "lion", "signum", "adam"]
    values = {name: [numbers(r)[name] for r in rules] for name in HYPERS}
    values["lr"] = [0.1, 0.2, 0.05, 0.025, 0.3]
    vectors = {n: torch.tensor(v, dtype=torch.float32 if n == "lr" else torch.float64) for n, v in values.items()}
    table = HyperTable(
        torch.full((1, 6), float("nan"), dtype=torch.float64),
        list(vectors.values()),
        list(range(6)),
        [[code(r) for r in rules]],
    )
    param = torch.randn(5, *size)
    slot, twin = slot_for("adam", param), slot_for("adam", param)
    copy = param.clone()
    for _ in range(3):
        grad = torch.randn_like(param)
        launch(Lists([param], [slot], [0]), [grad], table, None, None)
        update_reference(rules, [copy], [grad], [twin], Settings(**vectors))
        vectors["lr"].mul_(0.5)  # seen by the next step
    assert torch.equal(param, copy)
    assert slot.step == twin.step == 3


@pytest.mark.parametrize("rule", RULES)
def test_scaled_gradients_and_a_step_that_is_skipped(launch: Launch, rule: str) -> None:
    torch.manual_seed(0)
    twins = Twins(rule, [torch.randn(600), torch.randn(3)])
    grads = [torch.randn(600) * 1024, torch.randn(3) * 1024]
    table = hyper_table([rule], [numbers(rule)])
    scale, inf = torch.tensor([1024.0]), torch.tensor([0.0])
    launch(twins.ours, grads, table, scale, inf)
    launch(twins.ours, grads, table, scale, inf + 1)
    update_reference(rule, twins.theirs.params, grads, twins.theirs.slots, Settings(**numbers(rule)), grad_scale=scale)
    twins.check()


@pytest.mark.parametrize("pitch", [17, 640], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("runs", [1, 3])
def test_row_sum_norms_and_copies(launch: Launch, runs: int, pitch: int) -> None:
    torch.manual_seed(0)
    stack = (runs,) if runs > 1 else ()
    params = [torch.randn(*stack, 5, 3), torch.randn(*stack, 10, pitch), torch.randn(*stack, 2000)]
    grads = [torch.randn_like(p) for p in params]
    before = [p.clone() for p in params]
    extras = Extras(
        copies=[torch.empty_like(p, dtype=torch.bfloat16) for p in params],
        norms=torch.full((runs, 2), float("nan"), dtype=torch.float64),
        head=1,
        row_sum=torch.full((*stack, pitch), float("nan"), dtype=torch.float64),
    )
    table = HyperTable(torch.tensor([list(numbers("adam").values())]).double(), [], [], [[code("adam")] * runs])
    lists = Lists(params, [slot_for("adam", p) for p in params], [0, 0, 0], extras)
    twins = [p.clone() for p in params]
    update_reference("adam", twins, grads, [slot_for("adam", p) for p in params], Settings(**numbers("adam")))
    launch(lists, grads, table, torch.tensor(2.0), None)

    assert extras.row_sum is not None
    assert extras.norms is not None
    torch.testing.assert_close(extras.row_sum, params[1].double().sum(-2), rtol=0, atol=1e-12)
    changes = [(g.double() / 2, p.double() - b.double()) for g, p, b in zip(grads, params, before, strict=True)]
    for k in range(2):
        expected = sum(change[k].square().reshape(runs, -1).sum(1) for change in changes)
        # Summed in float32 over a program's elements; and the change is p − w rounded, not p_new − p_old.
        torch.testing.assert_close(extras.norms[:, k], expected, rtol=1e-6, atol=0)
    if launch is launch_cpu:  # Triton's interpreter cuts bfloat16 off
        assert all(c is not None and torch.equal(c, p.bfloat16()) for c, p in zip(extras.copies, params, strict=True))
    again = extras.norms.clone()
    lists.extras = replace(extras, add=True)
    launch(lists, grads, table, torch.tensor(2.0), None)
    assert (extras.norms > again).all()


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
