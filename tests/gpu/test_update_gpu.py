"""The update kernel on a GPU: what the sizes of the interpreter's tests do not show.

tests/kernels/test_update_kernels.py compares the same kernel with the reference.
"""

import pytest
import torch

from ncollapse import optim
from ncollapse.kernels.update import gpu
from ncollapse.kernels.update.reference import Slot
from ncollapse.kernels.update.table import Extras, Lists, Table
from update_twins import addresses, hyper_table, launch_triton, numbers, slot_for


def test_every_step_is_counted_once(device: torch.device) -> None:
    """With more programs than the GPU runs at a time, over many steps: only the last program to finish counts."""
    params = [torch.randn(size, device=device) for size in (3_000_000, 70)]
    slots = [slot_for("adam", p) for p in params]
    norms = torch.zeros(1, 2, dtype=torch.float64, device=device)
    lists = Lists(params, slots, [0, 0], Extras(norms=norms))
    grads, hypers = [torch.ones_like(p) for p in params], hyper_table(["adam"], [numbers("adam")], device)
    table = Table(lists, torch.float32, hypers, gpu.CHUNK)
    table.point(addresses(lists, grads))
    scratch = gpu.Scratch(table)
    for _ in range(300):
        gpu.launch_update(table, scratch, None, None)
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_two_gpus(device: torch.device) -> None:
    """Each is updated on its own, whichever is the current one."""
    params = [torch.randn(1000, device=f"cuda:{i}") for i in (0, 1)]
    twins = [p.cpu() for p in params]
    for p in (*params, *twins):
        p.grad = torch.ones_like(p)
    ours, theirs = optim.Adam(params, lr=0.1), optim.Adam(twins, lr=0.1)
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            ours.step()
            assert torch.cuda.current_device() == current
        theirs.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, twins, strict=True))
