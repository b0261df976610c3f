"""The update of a whole model as one Triton kernel, with coupled and decoupled decay.

Each program updates one chunk of one parameter (or of one stacked run of it): it reads its addresses and
hyperparameters from the table (`table.py`) and computes what `update_reference` computes, with every operation rounded
separately.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncollapse.kernels.operators import DTYPE_CODES
from ncollapse.kernels.update import table as layout
from ncollapse.kernels.update.gpu_rules import ADAM, MIXED, direction, divide
from ncollapse.kernels.update.table import Col, Table

# Per program: elements per iteration, elements in total, warps. The settings are fixed, never autotuned: a trial run
# would apply the in-place update again. With 512 elements a thread loads one 128-bit vector of each float32 tensor, and
# the kernel needs 40 (SGD) to 80 (Adam) registers on sm_90; 1,024 would double the loads in flight, with 53 to 125.
BLOCK, CHUNK, WARPS = 512, 4096, 4

# The layout of the table, as compile-time constants; the numbers of a set in the order of HYPERS.
_PARAM, _GRAD = tl.constexpr(Col.PARAM.value), tl.constexpr(Col.GRAD.value)
_FIRST, _SECOND = tl.constexpr(Col.FIRST.value), tl.constexpr(Col.SECOND.value)
_STEP, _COPY = tl.constexpr(Col.STEP.value), tl.constexpr(Col.COPY.value)
_NUMEL, _HYPER = tl.constexpr(Col.NUMEL.value), tl.constexpr(Col.HYPER.value)
_FLAGS, _RUN = tl.constexpr(Col.FLAGS.value), tl.constexpr(Col.RUN.value)
_COLUMNS, _HYPER_COLUMNS = tl.constexpr(len(Col)), tl.constexpr(layout.HYPER_COLUMNS)
_UNFILLED = tl.constexpr(layout.UNFILLED)
_WIDE, _CODE = tl.constexpr(layout.WIDE), tl.constexpr(layout.CODE)
_RULE_MASK = tl.constexpr(layout.RULE_MASK)
_MAXIMIZE, _NESTEROV = tl.constexpr(layout.MAXIMIZE), tl.constexpr(layout.NESTEROV)
_ALIGNED, _FRESH = tl.constexpr(layout.ALIGNED), tl.constexpr(layout.FRESH)
_LR, _DECAY, _COUPLING, _BETA1, _BETA2, _EPS = map(tl.constexpr, range(len(layout.HYPERS)))


def block_size(param: torch.dtype) -> int:
    """Elements per iteration of a program: enough for 128-bit vectors of the parameters."""
    return BLOCK * 2 if param.itemsize == 2 else BLOCK


@triton.jit
def _entry(tensors_ptr, source_ptr, at, mask, FILLS: tl.constexpr):
    """Load entries of the table; with FILLS, those that are unfilled from the host's memory, and fill them in.

    Programs that meet an unfilled entry at the same time write the same value. Each entry tells by itself whether it is
    filled, so that the order of their writes does not matter.
    """
    entry = tl.load(tensors_ptr + at, mask=mask, other=0)
    if FILLS:
        unfilled = entry == _UNFILLED
        entry = tl.where(unfilled, tl.load(source_ptr + at, mask=unfilled, other=0), entry)
        tl.store(tensors_ptr + at, entry, mask=unfilled)
    return entry


@triton.jit
def _number(hypers_ptr, row, i: tl.constexpr, wide):
    """Load number i of a set of hyperparameters through its address, as float64."""
    address = tl.load(hypers_ptr + row * _HYPER_COLUMNS + i)
    is_wide = ((wide >> i) & 1) != 0
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=is_wide, other=0.0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=is_wide == 0, other=0.0)
    return double + single.to(tl.float64)


@triton.jit
def _at(address, dtype: tl.constexpr, offset, ALIGNED: tl.constexpr):
    """A pointer to an element. Only a hint on the final pointer, after cast and sum, gives vector loads."""
    pointer = address.to(tl.pointer_type(dtype)) + offset
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["n_rows", "n_runs"])
def _update_kernel(
    tensors_ptr, source_ptr, n_rows, chunks_ptr, hypers_ptr, arrived_ptr, scale_ptr, inf_ptr, partial_ptr, norms_ptr,
    n_runs, PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, RULE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_INF: tl.constexpr, HAS_COPY: tl.constexpr, HAS_NORMS: tl.constexpr, ADD: tl.constexpr,
    HAS_STEPS: tl.constexpr, FILLS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update every parameter in a table: W ← W − rate·direction − decoupled·W, in place, with its states.

    Program p updates the elements of chunk p: CHUNK elements of one row of `tensors`. The last program to finish counts
    the step and sums the norms.

    Args:
        tensors_ptr, chunks_ptr, hypers_ptr: `[n_rows, len(Col)]`, `[programs, 2]` and `[sets, HYPER_COLUMNS]` int64,
            as `table.py` describes them.
        source_ptr: like `tensors`, in the host's memory, read with FILLS: the entries that are `UNFILLED` in `tensors`.
        arrived_ptr: `[1]` int32, the number of programs that have finished; 0 before and after the launch.
        scale_ptr, inf_ptr: `[1]` float32, read with HAS_SCALE, HAS_INF: divides the gradients; not 0: change nothing.
        partial_ptr: `[programs, 2]` float32, each program's squared norms of gradient and change, if HAS_NORMS.
        norms_ptr: `[n_runs, 2]` float64, their sums for each run; with ADD, added to the values there.
        PARAM, GRAD, REAL: dtypes of parameters and gradients; of states and arithmetic.
        RULE: the rule of all rows, or MIXED: read from the table.
        HAS_COPY, HAS_STEPS: whether a row has a bfloat16 copy, a count of steps.
    """
    # 1. Find the parameter, and its addresses.
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(chunks_ptr + 2 * program) * _COLUMNS
    start = tl.load(chunks_ptr + 2 * program + 1)
    there = program >= 0
    param = _entry(tensors_ptr, source_ptr, row + _PARAM, there, FILLS)
    grad = _entry(tensors_ptr, source_ptr, row + _GRAD, there, FILLS)
    first = _entry(tensors_ptr, source_ptr, row + _FIRST, there, FILLS)
    second = _entry(tensors_ptr, source_ptr, row + _SECOND, there, FILLS)
    copy = _entry(tensors_ptr, source_ptr, row + _COPY, there, FILLS)
    numel = _entry(tensors_ptr, source_ptr, row + _NUMEL, there, FILLS)
    hyper = _entry(tensors_ptr, source_ptr, row + _HYPER, there, FILLS)
    flags = _entry(tensors_ptr, source_ptr, row + _FLAGS, there, FILLS)
    # 2. Compute the scalars in float64, as the reference does, and round them once.
    wide = tl.load(hypers_ptr + hyper * _HYPER_COLUMNS + _WIDE)
    code = tl.load(hypers_ptr + hyper * _HYPER_COLUMNS + _CODE)
    rule = code & _RULE_MASK
    maximize, nesterov = (code & _MAXIMIZE) != 0, (code & _NESTEROV) != 0
    lr, decay = _number(hypers_ptr, hyper, _LR, wide), _number(hypers_ptr, hyper, _DECAY, wide)
    coupling = _number(hypers_ptr, hyper, _COUPLING, wide)
    beta1, beta2 = _number(hypers_ptr, hyper, _BETA1, wide), _number(hypers_ptr, hyper, _BETA2, wide)
    eps = _number(hypers_ptr, hyper, _EPS, wide).to(REAL)
    coupled, decoupled = (coupling * decay).to(REAL), (lr * (1.0 - coupling) * decay).to(REAL)
    damp = tl.where(((flags & _FRESH) != 0) | (first == 0), 1.0, 1.0 - beta2).to(REAL)
    rate, root = lr, tl.full((), 1.0, tl.float64)
    if HAS_STEPS:
        step = _entry(tensors_ptr, source_ptr, row + _STEP, there, FILLS)
        if (step != 0) & (rule == ADAM):
            t = (tl.load(step.to(tl.pointer_type(tl.float32))) + 1.0).to(tl.float64)
            # Triton has no pow; the error of exp(t log β) in float64 is far below float32's.
            rate = lr / (1.0 - tl.exp(t * tl.log(beta1)))
            root = 1.0 / tl.sqrt(1.0 - tl.exp(t * tl.log(beta2)))
    rate, root = rate.to(REAL), root.to(REAL)
    b1, b1c, b2, b2c = beta1.to(REAL), (1.0 - beta1).to(REAL), beta2.to(REAL), (1.0 - beta2).to(REAL)
    # 3. Set the number of blocks: none if the step is skipped, or if the parameter has no gradient.
    rounds, numel = CHUNK // BLOCK, tl.where(grad == 0, 0, numel)
    skip = tl.full((), False, tl.int1)
    if HAS_INF:
        skip = tl.load(inf_ptr) != 0.0
        rounds = tl.where(skip, 0, rounds)
    scale = tl.full((), 1.0, REAL)
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(REAL)
    # 4. Update block by block.
    lanes = tl.arange(0, BLOCK)
    grad_square, change_square = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in range(0, rounds):
        offset = start + i * BLOCK
        left = numel - offset
        # Two compiled versions: whole blocks of aligned tensors with 128-bit vectors, other blocks with a mask.
        if (left >= BLOCK) & ((flags & _ALIGNED) != 0):
            grad_square, change_square = _block(
                param, grad, first, second, copy, offset, lanes, left, True,
                rule, scale, maximize, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps,
                damp, nesterov, grad_square, change_square,
                PARAM, GRAD, REAL, RULE, HAS_SCALE, HAS_COPY, HAS_NORMS,
            )  # fmt: skip
        elif left > 0:
            grad_square, change_square = _block(
                param, grad, first, second, copy, offset, lanes, left, False,
                rule, scale, maximize, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps,
                damp, nesterov, grad_square, change_square,
                PARAM, GRAD, REAL, RULE, HAS_SCALE, HAS_COPY, HAS_NORMS,
            )  # fmt: skip
    # 5. Store the partial norms.
    if HAS_NORMS:
        tl.store(partial_ptr + 2 * program, tl.sum(grad_square))
        tl.store(partial_ptr + 2 * program + 1, tl.sum(change_square))
    if HAS_STEPS or HAS_NORMS:
        # 6. The last program to arrive counts the step: no other program reads the count any more.
        tl.debug_barrier()
        programs = tl.num_programs(0)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1:
            tl.store(arrived_ptr, 0)
            if skip == 0:
                _finish(
                    tensors_ptr, source_ptr, n_rows, chunks_ptr, partial_ptr, norms_ptr, n_runs, programs,
                    HAS_NORMS, ADD, HAS_STEPS, FILLS,
                )  # fmt: skip
            elif HAS_NORMS:
                for i in range(0, 2 * n_runs):
                    tl.store(norms_ptr + i, float("nan"))


@triton.jit
def _block(
    param, grad, first, second, copy, offset, lanes, left, ALIGNED: tl.constexpr,
    rule, scale, maximize, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps,
    damp, nesterov, grad_square, change_square,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, RULE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_COPY: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """Update one block: the first `left` elements from `offset` on; with ALIGNED, the whole block in vectors.

    Args:
        param, grad, first, second, copy: addresses of the tensors; 0 for those that the parameter lacks.
        rule … nesterov: scalars of the parameter, REAL unless integer or boolean.
        grad_square, change_square: `[BLOCK]` float32, sums of squares so far.
    """
    # A mask with the same value in all lanes allows vector loads. (The interpreter cannot broadcast a scalar mask.)
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
    u, m, v = direction(rule if RULE == MIXED else RULE, g, m, v, b1, b1c, b2, b2c, root, eps, damp, nesterov, RULE)
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
    return grad_square, change_square


@triton.jit
def _finish(
    tensors_ptr, source_ptr, n_rows, chunks_ptr, partial_ptr, norms_ptr, n_runs, programs,
    HAS_NORMS: tl.constexpr, ADD: tl.constexpr, HAS_STEPS: tl.constexpr, FILLS: tl.constexpr,
):  # fmt: skip
    """Count the step, and sum the programs' norms in a fixed order, so that the result is reproducible."""
    lanes = tl.arange(0, 128)
    if HAS_STEPS:
        for i in range(0, n_rows, 128):
            row = (i + lanes).to(tl.int64) * _COLUMNS
            mask = i + lanes < n_rows
            step = _entry(tensors_ptr, source_ptr, row + _STEP, mask, FILLS)
            grad = _entry(tensors_ptr, source_ptr, row + _GRAD, mask, FILLS)
            # The runs of a parameter share a count.
            mask = (step != 0) & (grad != 0) & (_entry(tensors_ptr, source_ptr, row + _RUN, mask, FILLS) == 0)
            pointers = step.to(tl.pointer_type(tl.float32))
            tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + 1.0, mask=mask)
    if HAS_NORMS:
        for run in range(0, n_runs):
            grads, changes = tl.zeros((128,), tl.float64), tl.zeros((128,), tl.float64)
            for i in range(0, programs, 128):
                mask = i + lanes < programs
                rows = tl.load(chunks_ptr + 2 * (i + lanes), mask=mask, other=0)
                in_run = mask & (_entry(tensors_ptr, source_ptr, rows * _COLUMNS + _RUN, mask, FILLS) == run)
                part = partial_ptr + 2 * (i + lanes)
                # Bypass the L1 cache, which does not see the writes of other programs.
                grads += tl.load(part, mask=in_run, other=0.0, cache_modifier=".cg").to(tl.float64)
                changes += tl.load(part + 1, mask=in_run, other=0.0, cache_modifier=".cg").to(tl.float64)
            norms = norms_ptr + 2 * run
            grad_total, change_total = tl.sum(grads), tl.sum(changes)
            if ADD:
                grad_total += tl.load(norms)
                change_total += tl.load(norms + 1)
            tl.store(norms, grad_total)
            tl.store(norms + 1, change_total)


_TYPES = {dtype: getattr(tl, str(dtype).removeprefix("torch.")) for dtype in DTYPE_CODES}


class Scratch:
    """Buffers of a launch that stay allocated between steps: `arrived` and `partial` of the kernel."""

    def __init__(self, table: Table) -> None:
        self.arrived = torch.zeros(1, dtype=torch.int32, device=table.device)
        self.partial = torch.empty(0 if table.norms is None else table.programs, 2, device=table.device)


def launch_update(table: Table, scratch: Scratch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Any:
    """Take one step of every parameter in the table, in one launch, without synchronising.

    `grad_scale` and `found_inf` are float32, 0-d or `[1]`, on the table's device; as in `update_reference`.
    """
    if table.device.type == "cuda" and table.device.index != torch.cuda.current_device():
        with torch.cuda.device(table.device):  # Triton launches on the current device
            return launch_update(table, scratch, grad_scale, found_inf)
    norms, unused = table.norms, table.tensors
    return _update_kernel[(table.programs,)](
        table.tensors, table.source, len(table.tensors), table.chunks, table.hypers.table, scratch.arrived,
        unused if grad_scale is None else grad_scale, unused if found_inf is None else found_inf,
        scratch.partial, unused if norms is None else norms, 0 if norms is None else len(norms),
        PARAM=_TYPES[table.param], GRAD=_TYPES[table.grad],
        REAL=_TYPES[torch.float64 if table.param == torch.float64 else torch.float32], RULE=table.hypers.rule,
        HAS_SCALE=grad_scale is not None, HAS_INF=found_inf is not None, HAS_COPY=table.has_copies,
        HAS_NORMS=norms is not None, ADD=table.add, HAS_STEPS=table.counts_steps, FILLS=layout.FILLED_ONCE,
        BLOCK=block_size(table.param), CHUNK=CHUNK, num_warps=WARPS,
        # Round products and sums separately, as the reference does; the kernel is bound by memory anyway.
        enable_fp_fusion=False,
    )  # fmt: skip
