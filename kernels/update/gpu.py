"""The update of a whole model as one Triton kernel: SGD, Signum, Adam and Lion, coupled and decoupled decay.

Each program takes one chunk of one parameter (or of one stacked run of it), finds its addresses and hyperparameters in
the table (`kernels/update/table.py`) and does what `update_reference` does, with every operation rounded by itself.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncollapse.kernels.update.gpu_rules import ADAM, MIXED, direction, divide
from ncollapse.kernels.update.table import Table

# Elements at a time, elements in all, warps: of a program. In-place kernels take fixed settings, never autotuning: a
# trial run would apply the update again. With 512 a thread has one 128-bit vector of each float32 tensor, and the
# kernel 40 (SGD) to 80 (Adam) registers on sm_90; 1,024 would double the loads in flight, and take 53 to 125.
BLOCK, CHUNK, WARPS = 512, 4096, 4


def block(param: torch.dtype) -> int:
    """Elements that a program takes at a time: enough for 128-bit vectors of the parameters."""
    return BLOCK * 2 if param.itemsize == 2 else BLOCK


@triton.jit
def _number(hypers_ptr, row, i: tl.constexpr, wide):
    """A hyperparameter through its address, as float64."""
    address = tl.load(hypers_ptr + row * 8 + i)
    is_wide = ((wide >> i) & 1) != 0
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=is_wide, other=0.0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=is_wide == 0, other=0.0)
    return double + single.to(tl.float64)


@triton.jit
def _at(address, dtype: tl.constexpr, offset, ALIGNED: tl.constexpr):
    """A pointer to an element. The hint must stand on the pointer, after the cast and the sum, to give vector loads."""
    pointer = address.to(tl.pointer_type(dtype)) + offset
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["n_steps", "n_runs"])
def _update_kernel(
    tensors_ptr,
    chunks_ptr,
    hypers_ptr,
    steps_ptr,
    n_steps,
    arrived_ptr,  # int32, 0: how many programs are through
    scale_ptr,
    inf_ptr,
    partial_ptr,  # [N, 2] float32: each program's squared norms
    norms_ptr,  # [R, 2] float64
    n_runs,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    REAL: tl.constexpr,
    RULE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_INF: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ADD: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tensors_ptr + tl.load(chunks_ptr + 2 * program) * 12
    start = tl.load(chunks_ptr + 2 * program + 1)
    param, grad, first, second = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    numel, hyper, flags = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    copy = tl.load(row + 5)

    # Scalars, in float64 as in the reference, then rounded once.
    wide = tl.load(hypers_ptr + hyper * 8 + 6)
    code = tl.load(hypers_ptr + hyper * 8 + 7)
    rule = code & 255
    maximize, nesterov = (code & 256) != 0, (code & 512) != 0
    lr, decay, coupling = (
        _number(hypers_ptr, hyper, 0, wide),
        _number(hypers_ptr, hyper, 1, wide),
        _number(hypers_ptr, hyper, 2, wide),
    )
    beta1, beta2 = _number(hypers_ptr, hyper, 3, wide), _number(hypers_ptr, hyper, 4, wide)
    eps = _number(hypers_ptr, hyper, 5, wide).to(REAL)
    coupled, decoupled = (coupling * decay).to(REAL), (lr * (1.0 - coupling) * decay).to(REAL)
    damp = tl.where(((flags & 2) != 0) | (first == 0), 1.0, 1.0 - beta2).to(REAL)
    rate, root = lr, tl.full((), 1.0, tl.float64)
    if HAS_STEPS:
        step = tl.load(row + 4)
        if (step != 0) & (rule == ADAM):
            t = (tl.load(step.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
            # Triton has no pow: exp(t log β), of which the error in float64 is far below float32's.
            rate = lr / (1.0 - tl.exp(t * tl.log(beta1)))
            root = 1.0 / tl.sqrt(1.0 - tl.exp(t * tl.log(beta2)))
    rate, root = rate.to(REAL), root.to(REAL)
    b1, b1c, b2, b2c = beta1.to(REAL), (1.0 - beta1).to(REAL), beta2.to(REAL), (1.0 - beta2).to(REAL)

    rounds, stride, end = CHUNK // BLOCK, tl.full((), BLOCK, tl.int64), numel
    pitch = tl.full((), 0, tl.int64)
    if HAS_SUMS:
        # Of a classifier [K, d] a program takes BLOCK columns, all K rows of them: so it has their whole sum.
        pitch = tl.load(row + 10)
        if pitch != 0:
            rounds, stride, end = (numel // pitch).to(tl.int32), pitch, pitch
    skip = tl.full((), False, tl.int1)
    if HAS_INF:
        skip = tl.load(inf_ptr) != 0.0
        rounds = tl.where(skip, 0, rounds)
    scale = tl.full((), 1.0, REAL)
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(REAL)

    lanes = tl.arange(0, BLOCK)
    grad_square, change_square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK if HAS_SUMS else 1,), tl.float64)
    for i in range(0, rounds):
        offset = start + i * stride
        left = tl.where(pitch != 0, end - start, end - offset)
        # Two copies of the same work: whole blocks of aligned tensors in vectors of 128 bits, the rest masked.
        if (left >= BLOCK) & ((flags & 1) != 0):
            grad_square, change_square, total = _block(
                param, grad, first, second, copy, offset, lanes, left, True,
                rule, scale, maximize, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps,
                damp, nesterov, grad_square, change_square, total,
                PARAM, GRAD, REAL, RULE, HAS_SCALE, HAS_COPY, HAS_NORMS, HAS_SUMS,
            )  # fmt: skip
        elif left > 0:
            grad_square, change_square, total = _block(
                param, grad, first, second, copy, offset, lanes, left, False,
                rule, scale, maximize, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps,
                damp, nesterov, grad_square, change_square, total,
                PARAM, GRAD, REAL, RULE, HAS_SCALE, HAS_COPY, HAS_NORMS, HAS_SUMS,
            )  # fmt: skip

    if HAS_SUMS:  # noqa: SIM102 (the outer choice is made when compiling)
        if (pitch != 0) & (skip == 0):
            sums = tl.load(row + 11).to(tl.pointer_type(tl.float64)) + start
            tl.store(sums + lanes, total, mask=lanes < end - start)
    if HAS_NORMS:
        tl.store(partial_ptr + 2 * program, tl.sum(grad_square))
        tl.store(partial_ptr + 2 * program + 1, tl.sum(change_square))
    if HAS_STEPS or HAS_NORMS:
        # The last program to get here counts the step, when no other will read the count any more.
        tl.debug_barrier()
        programs = tl.num_programs(0)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1:
            tl.store(arrived_ptr, 0)
            if skip == 0:
                _finish(
                    tensors_ptr,
                    chunks_ptr,
                    steps_ptr,
                    n_steps,
                    partial_ptr,
                    norms_ptr,
                    n_runs,
                    programs,
                    HAS_NORMS,
                    ADD,
                )


@triton.jit
def _block(
    param, grad, first, second, copy, offset, lanes, left, ALIGNED: tl.constexpr,
    rule, scale, maximize, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps,
    damp, nesterov, grad_square, change_square, total,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, RULE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_COPY: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """One block of a parameter, of which `left` elements are to do; where ALIGNED, all of them, in vectors."""
    # A mask that is the same for all lanes allows vector loads. (The interpreter cannot make one of a scalar mask.)
    same = tl.zeros_like(lanes).to(tl.int64)
    inside = (same + left > 0) if ALIGNED else (lanes < left)
    has_first, has_second = same + first != 0, same + second != 0
    HAS_SECOND: tl.constexpr = (RULE == ADAM) | (RULE == MIXED)
    param_ptr, grad_ptr = _at(param, PARAM, offset, ALIGNED) + lanes, _at(grad, GRAD, offset, ALIGNED) + lanes
    first_ptr, second_ptr = _at(first, REAL, offset, ALIGNED) + lanes, _at(second, REAL, offset, ALIGNED) + lanes
    w = tl.load(param_ptr, mask=inside).to(REAL)
    g = tl.load(grad_ptr, mask=inside).to(REAL)
    m = tl.load(first_ptr, mask=inside & has_first, other=0.0)
    v = tl.zeros_like(m)
    if HAS_SECOND:
        v = tl.load(second_ptr, mask=inside & has_second, other=0.0)
    if HAS_SCALE:
        g = divide(g, tl.zeros_like(g) + scale)
    if HAS_NORMS:
        grad_square += tl.where(inside, g * g, 0.0).to(tl.float32)
    g = tl.where(maximize, -g, g)
    g = tl.where(coupled != 0, g + w * coupled, g)
    u, m, v = direction(rule if RULE == MIXED else RULE, g, m, v, b1, b1c, b2, b2c, root, eps, damp, nesterov)
    change = u * rate
    change = tl.where(decoupled != 0, change + w * decoupled, change)
    w = (w - change).to(PARAM)
    tl.store(param_ptr, w, mask=inside)
    tl.store(first_ptr, m, mask=inside & has_first)
    if HAS_SECOND:
        tl.store(second_ptr, v, mask=inside & has_second)
    if HAS_COPY:
        copy_ptr = _at(copy, tl.bfloat16, offset, ALIGNED) + lanes
        tl.store(copy_ptr, w.to(tl.bfloat16), mask=inside & (same + copy != 0))
    if HAS_NORMS:
        change_square += tl.where(inside, change * change, 0.0).to(tl.float32)
    if HAS_SUMS:
        total += tl.where(inside, w.to(tl.float64), 0.0)
    return grad_square, change_square, total


@triton.jit
def _finish(
    tensors_ptr, chunks_ptr, steps_ptr, n_steps, partial_ptr, norms_ptr, n_runs, programs,
    HAS_NORMS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Count the step, and add up the programs' norms in their order: the result is the same every time."""
    lanes = tl.arange(0, 128)
    for i in range(0, n_steps, 128):
        mask = i + lanes < n_steps
        pointers = tl.load(steps_ptr + i + lanes, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + 1.0, mask=mask)
    if HAS_NORMS:
        for run in range(0, n_runs):
            grads, changes = tl.zeros((128,), tl.float64), tl.zeros((128,), tl.float64)
            for i in range(0, programs, 128):
                mask = i + lanes < programs
                rows = tl.load(chunks_ptr + 2 * (i + lanes), mask=mask, other=0)
                mine = mask & (tl.load(tensors_ptr + rows * 12 + 9, mask=mask, other=-1) == run)
                part = partial_ptr + 2 * (i + lanes)
                # Past the first-level cache, which does not see what other programs wrote.
                grads += tl.load(part, mask=mine, other=0.0, cache_modifier=".cg").to(tl.float64)
                changes += tl.load(part + 1, mask=mine, other=0.0, cache_modifier=".cg").to(tl.float64)
            norms = norms_ptr + 2 * run
            grad_total, change_total = tl.sum(grads), tl.sum(changes)
            if ADD:
                grad_total += tl.load(norms)
                change_total += tl.load(norms + 1)
            tl.store(norms, grad_total)
            tl.store(norms + 1, change_total)


_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Scratch:
    """What a launch needs beside the table and keeps between steps."""

    def __init__(self, table: Table) -> None:
        self.arrived = torch.zeros(1, dtype=torch.int32, device=table.device)
        self.partial = torch.empty(0 if table.norms is None else table.programs, 2, device=table.device)


def launch(table: Table, scratch: Scratch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Any:
    """One step of every parameter in the table: one launch, no waiting."""
    if table.device.type == "cuda" and table.device.index != torch.cuda.current_device():
        with torch.cuda.device(table.device):  # Triton launches on the current device
            return launch(table, scratch, grad_scale, found_inf)
    norms, unused = table.norms, table.tensors
    return _update_kernel[(table.programs,)](
        table.tensors,
        table.chunks,
        table.hypers.table,
        table.steps,
        table.counts,
        scratch.arrived,
        unused if grad_scale is None else grad_scale,
        unused if found_inf is None else found_inf,
        scratch.partial,
        unused if norms is None else norms,
        0 if norms is None else len(norms),
        PARAM=_TYPES[table.param],
        GRAD=_TYPES[table.grad],
        REAL=_TYPES[torch.float64 if table.param == torch.float64 else torch.float32],
        RULE=table.hypers.rule,
        HAS_SCALE=grad_scale is not None,
        HAS_INF=found_inf is not None,
        HAS_COPY=table.has_copies,
        HAS_NORMS=norms is not None,
        ADD=table.add,
        HAS_SUMS=table.row_sum is not None,
        HAS_STEPS=table.counts > 0,
        BLOCK=block(table.param),
        CHUNK=CHUNK,
        num_warps=WARPS,
        # Products and sums are rounded one by one, as in the reference; the kernel waits for memory anyway.
        enable_fp_fusion=False,
    )
