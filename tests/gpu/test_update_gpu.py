"""The update kernel on the GPU against the reference on the CPU: bit for bit, but for float64.

There Adam's bias corrections, by exp and log where the reference has a power, may differ in the last digits.
"""

import pytest
import torch
from torch import Tensor

from ncollapse.kernels.update.reference import RULES, Settings, Slot, update_reference
from ncollapse.kernels.update.table import HYPERS, Extras, HyperTable, Lists, Table, code
from update_twins import DTYPES, Twins, hyper_table, launch_triton, numbers, slot_for

# What PyTorch and its compilers say on a GPU is not ours to fix; a fall back to the reference is.
pytestmark = pytest.mark.filterwarnings("ignore", "error:plain PyTorch")

SHAPES: list[tuple[int, ...]] = [
    (0,), (), (1,), (63,), (1000,), (3, 5, 7, 2), (511,), (512,), (513,), (4095,), (4096,), (4097,), (3, 100_001)
]  # fmt: skip


def normal(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(device, dtype)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(device: torch.device, rule: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, grad_dtype = dtypes
    twins = Twins(rule, [normal(shape, device, dtype) for shape in SHAPES])
    for k in range(4):
        twins.step(
            launch_triton, [normal(shape, device, grad_dtype) for shape in SHAPES], numbers(rule), maximize=k == 3
        )
        twins.check(1e-12 if dtype == torch.float64 and rule == "adam" else 0.0)


@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_with_other_hyperparameters_at_each(device: torch.device, rule: str) -> None:
    twins = Twins(rule, [normal((4000,), device)])
    for k in range(20):
        h = numbers(rule, lr=0.1 / (k + 1), coupling=k / 19, weight_decay=0.1 * (k % 3), beta1=0.04 * k)
        twins.step(launch_triton, [normal((4000,), device)], h)
    twins.check()


@pytest.mark.parametrize("rule", RULES)
def test_layouts(device: torch.device, rule: str) -> None:
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
        twins.step(launch_triton, [torch.randn_like(p) for p in params], numbers(rule))
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("rule", RULES)
def test_unaligned_views_and_their_neighbours(device: torch.device, rule: str, dtype: torch.dtype) -> None:
    buffer = normal((9000,), device, dtype)
    before = buffer.clone()
    params = [buffer[1:1400], buffer[1403:5404], buffer[5405:5406], buffer[5408:8999]]
    twins = Twins(rule, params)
    twins.step(launch_triton, [normal((p.numel() + 3,), device, dtype)[3:] for p in params], numbers(rule))
    twins.check(1e-12 if dtype == torch.float64 and rule == "adam" else 0.0)
    outside = [0, *range(1400, 1403), 5404, 5406, 5407, 8999]
    assert torch.equal(buffer[outside], before[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rule", RULES)
def test_nan_inf_and_subnormal_numbers(device: torch.device, rule: str, dtype: torch.dtype) -> None:
    start = normal((700,), device, dtype)
    start[::5] *= 1e-30
    twins = Twins(rule, [start])
    for _ in range(3):
        grad = normal((700,), device, dtype)
        grad[::7], grad[1::7], grad[2::7], grad[3::7] = float("nan"), float("inf"), -float("inf"), 0.0
        grad[4::7] *= torch.finfo(dtype).tiny
        twins.step(launch_triton, [grad], numbers(rule))
    twins.check()
    assert twins.ours.params[0][4::7].isfinite().all()


@pytest.mark.parametrize("count", [1, 5000])
def test_thousands_of_tensors_each_with_its_own_rule_and_numbers(device: torch.device, count: int) -> None:
    rules = [list(RULES)[i % 4] for i in range(count)]
    values = [numbers(r, lr=0.001 * (i % 50), weight_decay=0.01 * (i % 7)) for i, r in enumerate(rules)]
    params = [normal((i % 9,), device) for i in range(count)]
    grads = [normal((i % 9,), device) for i in range(count)]
    slots = [slot_for(r, p) for r, p in zip(rules, params, strict=True)]
    copies, copied_grads = [p.cpu() for p in params], [g.cpu() for g in grads]
    twins = [slot_for(r, p) for r, p in zip(rules, copies, strict=True)]
    table = hyper_table(rules, values, device)
    for _ in range(2):
        launch_triton(Lists(params, slots, list(range(count))), grads, table)
        for i, rule in enumerate(rules):
            update_reference(rule, copies[i : i + 1], copied_grads[i : i + 1], twins[i : i + 1], Settings(**values[i]))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(params, copies, strict=True))
    assert all(s.step is None or s.step.item() == 2 for s in slots)


@pytest.mark.parametrize("size", [(6, 5), (7, 5, 3), (4096,), (100, 513)], ids=str)
def test_stacked_runs_each_with_a_rule(device: torch.device, size: tuple[int, ...]) -> None:
    """Runs of odd size lie unaligned; hyperparameters are read from tensors in float64 or float32."""
    rules = ["adam", "sgd", "lion", "signum", "adam"]
    values = {name: [numbers(r)[name] for r in rules] for name in HYPERS} | {"lr": [0.1, 0.2, 0.05, 0.025, 0.3]}
    vectors = {n: torch.tensor(v, dtype=torch.float32 if n == "lr" else torch.float64) for n, v in values.items()}
    live = [v.to(device) for v in vectors.values()]
    unread = torch.full((1, 6), float("nan"), dtype=torch.float64, device=device)
    table = HyperTable(unread, live, list(range(6)), [[code(r) for r in rules]])
    param = normal((5, *size), device)
    copy = param.cpu()
    slot, twin = slot_for("adam", param), slot_for("adam", copy)
    for _ in range(3):
        grad = normal((5, *size), device)
        launch_triton(Lists([param], [slot], [0]), [grad], table)
        update_reference(rules, [copy], [grad.cpu()], [twin], Settings(**vectors))
        live[0].mul_(0.5)  # seen by the next step
        vectors["lr"].mul_(0.5)
    assert torch.equal(param.cpu(), copy)
    assert slot.step is not None
    assert slot.step.item() == 3


@pytest.mark.parametrize("rule", RULES)
def test_scaled_gradients_and_a_step_that_is_skipped(device: torch.device, rule: str) -> None:
    twins = Twins(rule, [normal((600,), device), normal((3,), device)])
    grads = [normal((600,), device) * 3e4, normal((3,), device) * 3e4]
    table = hyper_table([rule], [numbers(rule)], device)
    scale, inf = torch.full((), 3e4, device=device), torch.zeros(1, device=device)
    launch_triton(twins.ours, grads, table, scale, inf)
    launch_triton(twins.ours, grads, table, scale, inf + 1)
    update_reference(
        rule, twins.theirs.params, [g.cpu() for g in grads], twins.theirs.slots, Settings(**numbers(rule)),
        grad_scale=scale.cpu(),
    )  # fmt: skip
    twins.check()


@pytest.mark.parametrize("pitch", [17, 640, 2048], ids=str)
@pytest.mark.parametrize("runs", [1, 3])
def test_row_sum_norms_and_copies(device: torch.device, runs: int, pitch: int) -> None:
    stack = (runs,) if runs > 1 else ()
    params = [normal((*stack, *s), device) for s in ((5, 3), (10, pitch), (200_000,))]
    grads = [torch.randn_like(p) for p in params]
    before = [p.clone() for p in params]
    nan = {"dtype": torch.float64, "device": device}
    extras = Extras(
        copies=[torch.full_like(p, float("nan"), dtype=torch.bfloat16) for p in params],
        norms=torch.full((runs, 2), float("nan"), **nan),
        head=1,
        row_sum=torch.full((*stack, pitch), float("nan"), **nan),
    )
    assert extras.row_sum is not None
    assert extras.norms is not None
    row = torch.tensor([[numbers("adam")[n] for n in HYPERS]], **nan)
    table = HyperTable(row, [], [], [[code("adam")] * runs])
    seen = []
    for _ in range(3):
        for param, start in zip(params, before, strict=True):
            param.copy_(start)
        lists = Lists(params, [slot_for("adam", p) for p in params], [0, 0, 0], extras)
        launch_triton(lists, grads, table, torch.full((), 2.0, device=device))
        seen.append(extras.norms.clone())
    assert torch.equal(seen[0], seen[1])  # the same order of summation every time
    assert torch.equal(seen[0], seen[2])
    torch.testing.assert_close(extras.row_sum, params[1].double().sum(-2), rtol=0, atol=1e-12)
    changes = [(g.double() / 2, p.double() - b.double()) for g, p, b in zip(grads, params, before, strict=True)]
    for k in range(2):
        expected = torch.stack([change[k].square().reshape(runs, -1).sum(1) for change in changes]).sum(0)
        # Summed in float32 over a program's elements; and the change is p − w rounded, not p_new − p_old.
        torch.testing.assert_close(extras.norms[:, k], expected, rtol=1e-6, atol=0)
    assert all(c is not None and torch.equal(c, p.bfloat16()) for c, p in zip(extras.copies, params, strict=True))


def test_every_step_is_counted_once_whoever_comes_last(device: torch.device) -> None:
    """More programs than the GPU runs at a time, many steps: the last to get there counts, and no other."""
    from ncollapse.kernels.update import gpu

    params = [normal((3_000_000,), device), normal((70,), device)]
    slots = [slot_for("adam", p) for p in params]
    norms = torch.zeros(1, 2, dtype=torch.float64, device=device)
    lists = Lists(params, slots, [0, 0], Extras(norms=norms))
    grads, hypers = [torch.ones_like(p) for p in params], hyper_table(["adam"], [numbers("adam")], device)
    table = Table(lists, torch.float32, hypers, gpu.block(torch.float32), gpu.CHUNK)
    table.point([p.data_ptr() for p in params], [g.data_ptr() for g in grads])
    scratch = gpu.Scratch(table)
    for _ in range(300):
        gpu.launch(table, scratch, None, None)
    assert [s.step.item() for s in slots if s.step is not None] == [300, 300]
    assert norms[0, 0].item() == 3_000_070


def test_tensors_of_more_than_two_to_the_31_elements(device: torch.device) -> None:
    count = 2**31 + 5000
    if torch.cuda.mem_get_info(device)[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    param = torch.ones(count, dtype=torch.bfloat16, device=device)
    grad = torch.full_like(param, 2.0)
    h = numbers("sgd", lr=0.5, weight_decay=0.0, beta1=0.0)
    launch_triton(Lists([param], [Slot()], [0]), [grad], hyper_table(["sgd"], [h], device))
    assert not param.any()  # 1 − 0.5 · 2, everywhere
