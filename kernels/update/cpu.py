"""The update of a whole model on the CPU: the launcher of `_cpu.cpp`, compiled when the package is installed."""

import torch
from torch import Tensor

from ncollapse.kernels.operators import DTYPE_CODES, cpu_threads, why_no_kernel
from ncollapse.kernels.update import table as layout
from ncollapse.kernels.update.reference import RULES, declared
from ncollapse.kernels.update.table import Col, Table

EXTENSION = "ncollapse.kernels.update._cpu"
#: Elements per chunk. Threads share a table's chunks evenly, so large tensors are cut into small chunks.
CHUNK = 4096


def check_layout(compiled: dict[str, int]) -> None:
    """Raise ImportError if the C++ kernel was compiled with other columns, flags or numbers than Python uses."""
    expected = {column.name: column.value for column in Col}
    expected |= {"columns": len(Col), "hyper columns": layout.HYPER_COLUMNS, "wide": layout.WIDE, "code": layout.CODE}
    expected |= {"rule mask": layout.RULE_MASK, "maximize": layout.MAXIMIZE, "nesterov": layout.NESTEROV}
    expected |= {"fresh": layout.FRESH} | {str(dtype).removeprefix("torch."): n for dtype, n in DTYPE_CODES.items()}
    expected |= {rule: n for rule in RULES if (n := declared(rule).kernel) is not None}
    if wrong := sorted(name for name in expected | compiled if expected.get(name) != compiled.get(name)):
        raise ImportError(
            f"the compiled extension {EXTENSION} does not match the Python sources ({', '.join(wrong)}); "
            "install the package again to rebuild it"
        )


if why_no_kernel(torch.device("cpu"), EXTENSION) is None:
    from ncollapse.kernels.update import _cpu

    check_layout(_cpu.layout() if hasattr(_cpu, "layout") else {})


def launch_update(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Take one step of every parameter in the table; `grad_scale` and `found_inf` as in `update_reference`.

    Raises:
        ValueError: the table holds the number of a rule without a kernel.
    """
    norms = table.norms
    if found_inf is not None and found_inf.item() != 0:
        if norms is not None:
            norms.fill_(float("nan"))
        return
    scale = None if grad_scale is None else grad_scale.float()
    extra = scale is not None or norms is not None or table.has_copies
    _cpu.update(
        table.tensors.data_ptr(), len(table.tensors), table.chunks.data_ptr(), table.programs, CHUNK,
        table.hypers.table.data_ptr(), 0 if scale is None else scale.data_ptr(), extra,
        0 if norms is None else norms.data_ptr(), table.add, 0 if norms is None else len(norms),
        DTYPE_CODES[table.param], DTYPE_CODES[table.grad], cpu_threads(table.elements),
    )  # fmt: skip
