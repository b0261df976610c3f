"""The kernels of Newton–Schulz, compiled for three generations of GPUs, none of which the machine needs.

python tests/kernels/test_newton_schulz_code.py sm_90     prints a JSON record per variant
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any


def variants(arch: int) -> Iterator[dict[str, Any]]:
    """The products of the first iteration and of a later one; momentum and direction of float32 and bfloat16."""
    from compile_kernels import Variant

    from ncollapse.kernels.newton_schulz import gpu
    from ncollapse.kernels.newton_schulz import gpu_kernels as kernels

    half = {"x_ptr": "*bf16", "out_ptr": "*bf16", "source_ptr": "*bf16", "factor_ptr": "*bf16"}
    tables = {"matrices_ptr": "*i64", "tiles_ptr": "*i32", "parts_ptr": "*fp32", "squared": "fp32", "itself": "fp32"}

    def variant(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], options: Any, **fields: Any) -> Any:
        known = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        sixteen = fields.pop("sixteen", ())
        one = Variant({"kernel": kernel.__name__, **fields}, kernel, known, constants, sixteen, options)
        found = set(re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", one.text(arch, "ptx")))
        return {**one.record(arch), "units": sorted(found)}

    for first in (False, True):
        products = {"NORMALISE": first, "PARTS": gpu.PARTS, "STEP": gpu.STEP}
        for add in (False,) if first else (False, True):
            tile = {"ADD": add, "TILE": gpu.TILE, "STAGES": gpu.STAGES}
            yield variant(kernels.symmetric_kernel, half | tables, products | tile, gpu.SYMMETRIC, add=add, first=first)
        tile = {"ROWS": gpu.SIDE, "COLUMNS": gpu.SIDE, "STAGES": gpu.STAGES - 1}
        yield variant(kernels.polynomial_kernel, half | tables, products | tile, gpu.POLYNOMIAL, first=first)
    for dtype in ("fp32", "bf16"):
        maps = {"grad_ptr": f"*{dtype}", "param_ptr": f"*{dtype}", "buffer_ptr": "*fp32", "scale": "fp32"}
        numbers = {f"{name}_ptr": "*fp64" for name in ("beta", "coupling", "decay")}
        pointers = {**maps, **numbers, "x_ptr": "*bf16", "parts_ptr": "*fp32"}
        dense = {"stride_column": 1, "BLOCK": gpu.BLOCK}
        sixteen = {"sixteen": ("size", "width", "each", "stride_run", "stride_row"), "dtype": dtype}
        flags = {"NESTEROV": True, "MAXIMIZE": False, "PARTS": gpu.PARTS}
        yield variant(kernels.momentum_kernel, pointers, dense | flags, gpu.ELEMENTWISE, **sixteen)
        yield variant(kernels.direction_kernel, pointers | {"out_ptr": "*fp32"}, dense, gpu.ELEMENTWISE, **sixteen)


UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


def test_products_run_on_tensor_cores_and_no_register_is_spilled() -> None:
    # In a separate process: this one may run Triton's interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, *UNITS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [v["kernel"].partition("_")[0] for v in records].count("symmetric") == 3 * len(UNITS)
    for v in records:
        # ptxas limits itself to 64 registers there.
        rounded = v["kernel"] == "symmetric_kernel" and v["first"] and v["arch"] == "sm_100"
        assert v["spilled_bytes"] <= (8 if rounded else 0), v
        assert v["float_atomics"] == 0, v  # their order would change the result
        wide = {"direction_kernel": (2, 2), "momentum_kernel": (4, 3)}.get(v["kernel"])
        if wide is not None:
            assert v["loads_128"] >= wide[0] + wide[0] // 2 * (v["dtype"] == "fp32"), v
            assert v["stores_128"] >= wide[1], v
            assert v["registers"] <= 64, v  # four programs of 256 threads fit on a multiprocessor
            continue
        assert v["units"] == [UNITS[v["arch"]]], v
        # All stages but one are copied before the loop, one in it, and all but one of them stay under way.
        symmetric = v["kernel"] == "symmetric_kernel"
        assert v["asynchronous_128"] >= 8 * (4 if symmetric else 3), v
        assert v["groups_under_way"] >= (4 if symmetric else 2), v
        # Two programs fit on a multiprocessor: one loads while the other stores.
        assert 2 * v["shared_bytes"] <= 2**10 * 227, v
        assert v["registers"] <= (128 if symmetric else 255), v


if __name__ == "__main__":
    print(json.dumps([v for name in sys.argv[1:] for v in variants(int(name.removeprefix("sm_")))], indent=0))
