"""Compile the update kernel for GPUs that need not be there, and print what came out: JSON, a record for each variant.

python tests/kernels/compile_update.py sm_90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nc.kernels.update import gpu
from nc.kernels.update.reference import RULES
from nc.kernels.update.table import MIXED

_POINTERS = {
    "tensors_ptr": "*i64", "chunks_ptr": "*i64", "hypers_ptr": "*i64", "steps_ptr": "*i64", "arrived_ptr": "*i32",
    "scale_ptr": "*fp32", "inf_ptr": "*fp32", "partial_ptr": "*fp32", "norms_ptr": "*fp64",
}  # fmt: skip
_VARIANTS = [(rule, dtype, False) for rule in (*range(len(RULES)), MIXED) for dtype in ("fp32", "bf16")]
_EXTRAS = [(2, "fp32", True), (MIXED, "fp32", True), (2, "fp64", False)]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def compiled(rule: int, dtype: str, extras: bool, arch: int) -> dict[str, Any]:
    """Registers, spilled bytes and 128-bit accesses of one variant."""
    kernel = gpu._update_kernel
    param = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp64": tl.float64}[dtype]
    constants = {
        "PARAM": param, "GRAD": param, "REAL": tl.float64 if dtype == "fp64" else tl.float32, "RULE": rule,
        "HAS_SCALE": extras, "HAS_INF": extras, "HAS_COPY": extras, "HAS_NORMS": extras, "ADD": False,
        "HAS_SUMS": extras, "HAS_STEPS": rule in (2, MIXED), "BLOCK": gpu.block(_DTYPES[dtype]), "CHUNK": gpu.CHUNK,
    }  # fmt: skip
    signature = _POINTERS | {"n_steps": "i32", "n_runs": "i32"} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, aligned)
    options = {"num_warps": gpu.WARPS, "enable_fp_fusion": False}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    # 128 bits: four of 32 or two of 64.
    wide = [len(re.findall(rf"{op}\.global[.\w]*\.(?:v4\.\w32|v2\.\w64)", binary.asm["ptx"])) for op in ("ld", "st")]
    return {
        "rule": [*RULES, "mixed"][rule], "dtype": dtype, "extras": extras, "arch": f"sm_{arch}", "registers": registers,
        "spilled_bytes": stack + local, "loads_128": wide[0], "stores_128": wide[1],
    }  # fmt: skip


if __name__ == "__main__":
    arches = [int(name.removeprefix("sm_")) for name in sys.argv[1:]]
    print(json.dumps([compiled(*v, arch) for arch in arches for v in _VARIANTS + _EXTRAS], indent=0))
