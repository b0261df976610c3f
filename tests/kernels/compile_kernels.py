"""Compile the kernels for GPUs that the machine need not have; print a JSON record per variant, or the code of one.

python tests/kernels/compile_kernels.py sm_90
python tests/kernels/compile_kernels.py sm_90 kernel=update rule=adam dtype=fp32 extras=False --show ptx
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ncollapse.kernels.batch_norm import gpu as norm
from ncollapse.kernels.batch_norm import gpu_kernels as norm_kernels
from ncollapse.kernels.batch_norm import small_kernels as small_norm_kernels
from ncollapse.kernels.batch_norm.op import SMALL_ROWS
from ncollapse.kernels.class_stats import gpu as stats
from ncollapse.kernels.class_stats import gpu_kernels
from ncollapse.kernels.convolution import gpu as convolution
from ncollapse.kernels.convolution import gpu_kernels as convolution_kernels
from ncollapse.kernels.cross_entropy import gpu as cross_entropy
from ncollapse.kernels.pooled_head import gpu as head
from ncollapse.kernels.update import gpu as update
from ncollapse.kernels.update.reference import RULES
from ncollapse.kernels.update.table import FILLED_ONCE, MIXED

_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp64": tl.float64}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of a launch.

    Attributes:
        fields: what it is known by.
        pointers: types of the arguments that are not int32.
        constants: values known at compile time, integers that are 1 included.
        sixteen: integers known to be multiples of 16, as all pointers are.
        options: those of the launch.
        since: the first architecture that has what it needs.
    """

    fields: dict[str, Any]
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    sixteen: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    since: int = 80

    def compiled(self, arch: int) -> Any:
        """Triton's binary, with its texts in `asm`."""
        names = self.kernel.arg_names
        types = dict.fromkeys(names, "i32") | self.pointers | dict.fromkeys(self.constants, "constexpr")
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name.endswith("_ptr") or name in self.sixteen
        }
        source = ASTSource(self.kernel, {name: types[name] for name in names}, self.constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)

    def record(self, arch: int) -> dict[str, Any]:
        """Its registers, spilled bytes and counts of instructions."""
        binary = self.compiled(arch)
        usage = disassembled(binary, triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        ptx = binary.asm["ptx"]
        # 128 bits: four values of 32 bits or two of 64.
        loads, stores = (len(re.findall(rf"{op}\.global[.\w:]*\.(?:v4\.\w32|v2\.\w64)", ptx)) for op in ("ld", "st"))
        asynchronous = len(re.findall(r"cp\.async\.cg\.shared\.global[.\w:]* [^;]*\b0x10\b", ptx))
        loads += asynchronous
        return self.fields | {
            "arch": f"sm_{arch}", "registers": registers, "spilled_bytes": stack + local,
            "shared_bytes": binary.metadata.shared, "loads_128": loads, "stores_128": stores,
            "asynchronous_128": asynchronous, "groups_under_way": groups_under_way(ptx),
            "matrix_products": len(products := re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
            "matrix_units": sorted(set(products)),
            "float_atomics": len(re.findall(r"\b(?:atom|red)\.[.\w:]*\bf(?:16|32|64)", ptx)),
            "dependent": follows(ptx),
        }  # fmt: skip

    def text(self, arch: int, stage: str) -> str:
        """Its code at a stage of `STAGES`."""
        binary = self.compiled(arch)
        if stage == "sass":
            return disassembled(binary, triton.knobs.nvidia.nvdisasm.path, "-c")
        return str(binary.asm[stage])


#: Triton's intermediate languages, LLVM's, NVIDIA's portable assembly, and the machine's.
STAGES = ("ttir", "ttgir", "llir", "ptx", "sass")


def disassembled(binary: Any, tool: str, option: str) -> str:
    """What one of NVIDIA's tools, which come with Triton, says of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def groups_under_way(ptx: str) -> int:
    """Groups of asynchronous copies that loops leave under way while they wait for the one before; 0 without any."""
    return max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)), default=0)


def follows(ptx: str) -> bool:
    """Whether it may be launched before its predecessor has ended: it then waits before all accesses to memory."""
    before, *after = re.split(r"\bgriddepcontrol\.wait\s*;", ptx, maxsplit=1)
    if not after:
        return False
    assert not re.search(r"\b(?:ld|st|atom|red|cp\.async)\S*\.global|\bbra\b|\bgriddepcontrol\b", before), before
    assert re.search(r"\bgriddepcontrol\.launch_dependents\s*;", after[0]), after
    return True


def updates() -> Iterator[Variant]:
    pointers = {
        "tensors_ptr": "*i64", "source_ptr": "*i64", "chunks_ptr": "*i64", "hypers_ptr": "*i64", "arrived_ptr": "*i32",
        "scale_ptr": "*fp32", "inf_ptr": "*fp32", "partial_ptr": "*fp32", "norms_ptr": "*fp64",
    }  # fmt: skip
    variants = [(rule, dtype, False) for rule in (*range(len(RULES)), MIXED) for dtype in ("fp32", "bf16")]
    for rule, dtype, extras in [*variants, (2, "fp32", True), (MIXED, "fp32", True), (2, "fp64", False)]:
        param = _TYPES[dtype]
        constants = {
            "PARAM": param, "GRAD": param, "REAL": tl.float64 if dtype == "fp64" else tl.float32, "RULE": rule,
            "HAS_SCALE": extras, "HAS_INF": extras, "HAS_COPY": extras, "HAS_NORMS": extras, "ADD": False,
            "HAS_STEPS": rule in (2, MIXED), "FILLS": FILLED_ONCE, "BLOCK": update.block_size(_DTYPES[dtype]),
            "CHUNK": update.CHUNK,
        }  # fmt: skip
        name = {"kernel": "update", "rule": [*RULES, "mixed"][rule], "dtype": dtype, "extras": extras}
        options = {"num_warps": update.WARPS, "enable_fp_fusion": False}
        yield Variant(name, update._update_kernel, pointers, constants, options=options)


def class_stats() -> Iterator[Variant]:
    """With the features of a layer: `[B, d]`, dense, d a multiple of 16."""
    batch, labels, counts = {"batch_ptr": "*i32"}, {"labels_ptr": "*i64"}, {"counts_ptr": "*i64"}
    sixteen = ("dim", "stride_run", "stride_row")
    tile = {"ROWS": stats.ROWS, "COLUMNS": stats.COLUMNS}
    real = {f"{name}_ptr": "*fp32" for name in ("shifts", "part_sums", "part_squares", "axes")}
    kept = {"sums_ptr": "*fp64", "squares_ptr": "*fp64"}
    moves = {"moves_ptr": "*fp64", "flags_ptr": "*i32"}

    def variant(
        name: str, pointers: dict[str, str], constants: dict[str, Any], options: Any = None, **fields: Any
    ) -> Variant:
        kernel = getattr(gpu_kernels, f"{name}_kernel")
        known = {n: t for n, t in (real | pointers).items() if n in kernel.arg_names}
        dense = {"stride_column": 1} if "stride_column" in kernel.arg_names else {}
        aligned = tuple(n for n in sixteen if n in kernel.arg_names)
        named = {"kernel": f"class_stats {name}", **fields}
        return Variant(named, kernel, known, constants | dense, aligned, options or stats.OPTIONS)

    yield variant("labels", labels | batch, {"LABELS": stats.LABELS, "CLASSES": stats.CLASSES})
    for dtype in ("fp32", "bf16"):
        features = {"features_ptr": f"*{dtype}"} | labels | batch | counts
        searched = {"SAMPLES": stats.SAMPLES, "FAR": stats.FAR, "LABELS": stats.LABELS, "COLUMNS": stats.COLUMNS}
        yield variant("shifts", features | kept | moves, searched, dtype=dtype)
        for classes in (16, 32, 64, stats.MOST_CLASSES):
            options = stats.gather_options(classes)
            parts = {"sums_ptr": "*fp32", "squares_ptr": "*fp32"}
            summing = tile | {"CLASSES": classes, "STAGES": stats.STAGES}
            yield variant("gather", features | parts, summing, options, dtype=dtype, classes=classes)
        yield variant("split", features | {"out_ptr": "*bf16"}, tile, dtype=dtype)
        for axes in (16, 64):
            constants = {"ROWS": stats.ROWS, "STEP": stats.STEP, "AXES": axes}
            yield variant("project", features | {"out_ptr": "*fp32"}, constants, dtype=dtype, axes=axes)
    adding = {
        "PROPAGATE": False, "PARTS": stats.PARTS, "BLOCK": stats.ADDED,
        "SQUARED_PARTS": stats.SQUARED_PARTS, "SQUARED": stats.SQUARED,
    }  # fmt: skip
    yield variant("commit", batch | counts | kept | {"refused_ptr": "*i64"}, adding)
    moment = batch | moves | {"highs_ptr": "*fp32", "lows_ptr": "*fp32", "scatter_ptr": "*fp32"}
    constants = {
        "MOVES": True,
        "PROPAGATE": False,
        "CLASSES": stats.CLASSES,
        "SIDE": stats.SIDE,
        "STAGES": stats.STAGES,
    }
    yield variant("add_moment", moment, constants)


def batch_norm() -> Iterator[Variant]:
    """With many channels, a multiple of 16, and with few, which allow no wide accesses."""
    real = {f"{name}_ptr": "*fp32" for name in (
        "weight", "bias", "mean", "rstd", "running_mean", "running_var", "weight_grad", "bias_grad", "parts",
    )}  # fmt: skip
    real |= {"momentum": "fp32", "eps": "fp32", "arrived_ptr": "*i32"}

    def variant(
        name: str, constants: dict[str, Any], dtype: str | None = None, *, channels: int = 512,
        options: dict[str, Any] = norm.OPTIONS, **fields: Any,
    ) -> Variant:  # fmt: skip
        kernel = getattr(small_norm_kernels if name.startswith("small") else norm_kernels, f"{name}_kernel")
        constants = constants | ({"channels": 1} if channels == 1 else {})
        maps = {f"{n}_ptr": f"*{dtype}" for n in ("x", "grad", "residual", "out")}
        known = {n: t for n, t in (real | maps).items() if n in kernel.arg_names}
        named = {"kernel": f"batch_norm {name}", "channels": channels} | ({"dtype": dtype} if dtype else {})
        sixteen = () if channels % 16 else ("channels",)
        if "DEPENDENT" in kernel.arg_names:
            constants |= {"DEPENDENT": False}
        return Variant(named | fields, kernel, known, constants, sixteen, options)

    finish = {"PARTS": norm.PARTS, "COLUMNS": norm.FINISHED}
    for channels in (512, 1):
        yield variant("finish_moments", finish, channels=channels, options=norm.FINISH_OPTIONS)
        yield variant("finish_sums", finish, channels=channels, options=norm.FINISH_OPTIONS)
    for dtype, channels in (("fp32", 512), ("bf16", 512), ("bf16", 3), ("fp32", 1)):
        columns = norm.channels_per_program(channels)

        def shape(elements: int, columns: int = columns) -> dict[str, int]:
            return {"ROWS": elements // columns, "COLUMNS": columns}

        many = channels == 512
        both = many and dtype == "bf16"  # also with a second kernel, and few rows
        for merged, options in ((norm.MERGED_PARTS, norm.MERGED_OPTIONS), (0, norm.OPTIONS))[: 1 + many]:
            constants = {"PARTS": merged} | shape(norm.SUMMED)
            yield variant("moments", constants, dtype, channels=channels, options=options, merged=merged)
        for rows in (SMALL_ROWS, norm.LEAST_ROWS)[: many + both]:
            held = {"ROWS": rows, "COLUMNS": norm.SMALL_COLUMNS}
            fields = {"channels": channels, "rows": rows, "options": norm.SMALL_OPTIONS}
            yield variant("small_forward", {"HAS_RESIDUAL": True} | held, dtype, residual=True, **fields)
            yield variant("small_backward", held, dtype, **fields)
        for pool in (False, True):
            fields = {"channels": channels, "pool": pool}
            summed, written = norm.WINDOWS if pool else norm.SUMMED, norm.elements_per_program(_DTYPES[dtype], pool)
            for residual in (False,) if pool else (False, True):
                constants = {"POOL": pool, "HAS_RESIDUAL": residual} | shape(written)
                yield variant("apply", constants, dtype, residual=residual, **fields)
            for merged in (norm.ADDED_PARTS, 0)[: 1 + both]:
                constants = {"POOL": pool, "PARTS": merged} | shape(summed)
                yield variant("sums", constants, dtype, merged=merged, **fields)
            yield variant("backward", {"POOL": pool} | shape(written), dtype, **fields)


def dependent() -> Iterator[Variant]:
    """Batch norm's kernels as `gpu.DEPENDENT` launches them."""
    for v in batch_norm():
        usual = v.fields["channels"] == 512 and v.fields.get("dtype") == "bf16" and v.fields.get("merged") != 0
        if "DEPENDENT" in v.constants and usual:
            yield replace(
                v, fields=v.fields | {"launch": "dependent"}, constants=v.constants | {"DEPENDENT": True},
                options=v.options | {"launch_pdl": True}, since=90,
            )  # fmt: skip


def cross_entropies() -> Iterator[Variant]:
    """With dense logits of ten and of a thousand classes."""
    for classes in (10, 1000):
        columns = triton.next_power_of_2(classes)
        yield Variant(
            {"kernel": "cross_entropy", "classes": classes}, cross_entropy._cross_entropy_grad_kernel,
            {"logits_ptr": "*fp32", "labels_ptr": "*i64", "out_ptr": "*fp32", "smoothing": "fp32"},
            {"stride_class": 1, "ROWS": cross_entropy.BLOCK // columns, "CLASSES": columns},
            options=cross_entropy.OPTIONS,
        )  # fmt: skip


def pooled_heads() -> Iterator[Variant]:
    """As ResNet9 and VGG9 end, and maps of few and of many channels, of one run."""
    real = {
        f"{name}_ptr": "*fp32"
        for name in ("weight", "bias", "ties", "logits", "logits_grad", "weight_grad", "bias_grad")
    }
    of_grad = {"SAMPLES": head.SAMPLES, "GRAD_CLASSES": head.GRAD_CLASSES, "GRAD_COLUMNS": head.GRAD_COLUMNS}
    for dtype, pixels, classes, channels in (
        ("bf16", 9, 10, 512), ("fp32", 9, 10, 512), ("bf16", 49, 10, 32), ("fp32", 49, 128, head.MOST_CHANNELS)
    ):  # fmt: skip
        maps = {f"{name}_ptr": f"*{dtype}" for name in ("maps", "features", "features_grad", "maps_grad")}
        sizes = dict(zip(("PIXELS", "CLASSES", "COLUMNS"), head.tile(pixels, classes, channels), strict=True))
        for name, flags in (("forward", {"HAS_BIAS": True}), ("backward", {"HAS_FEATURES_GRAD": False} | of_grad)):
            kernel = getattr(head, f"pooled_head_{name}_kernel")
            known = {n: t for n, t in (real | maps).items() if n in kernel.arg_names}
            fields = {"kernel": f"pooled_head {name}", "dtype": dtype, "channels": channels}
            yield Variant(fields, kernel, known, {"runs": 1} | sizes | flags, ("channels",), head.OPTIONS)


def convolutions() -> Iterator[Variant]:
    """ResNet9's last two: values, gradients of maps, and without parts."""
    maps = {"HEIGHT": 3, "WIDTH": 3, "OUTPUTS": 512}
    tile = {name: getattr(convolution, name) for name in ("IMAGES", "COLUMNS", "STEP", "STAGES")}
    for flip, parts in ((False, True), (True, True), (True, False)):
        yield Variant(
            {"kernel": "convolution", "flip": flip, "parts": parts}, convolution_kernels.convolution_kernel,
            {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*fp32" if parts else "*bf16"},
            maps | tile | {"INPUTS": 512, "FLIP": flip}, options=convolution.OPTIONS,
        )  # fmt: skip
    added = {
        "IMAGES": convolution.ADDED_IMAGES,
        "COLUMNS": convolution.ADDED_COLUMNS,
        "CHUNKS": 512 // convolution.STEP,
    }
    yield Variant(
        {"kernel": "convolution add_parts"}, convolution_kernels.add_parts_kernel,
        {"parts_ptr": "*fp32", "out_ptr": "*bf16"}, maps | added | {"PARTS": 5}, options=convolution.ADD_OPTIONS,
    )  # fmt: skip


KINDS: tuple[Callable[[], Iterator[Variant]], ...] = (
    updates,
    class_stats,
    batch_norm,
    dependent,
    cross_entropies,
    pooled_heads,
    convolutions,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels; print a JSON record per variant.")
    parser.add_argument("words", nargs="+", metavar="sm_NN|KEY=VALUE", help="architectures; fields of a record to keep")
    parser.add_argument("--show", choices=STAGES, help="print the code of the one variant that is kept")
    options = parser.parse_intermixed_args()
    wanted = dict(word.split("=", 1) for word in options.words if "=" in word)
    arches = [int(word.removeprefix("sm_")) for word in options.words if "=" not in word]
    kept = [v for kind in KINDS for v in kind() if wanted.items() <= {k: str(x) for k, x in v.fields.items()}.items()]
    if not options.show:
        print(json.dumps([v.record(arch) for arch in arches for v in kept if arch >= v.since], indent=0))
    elif len(kept) == len(arches) == 1:
        print(kept[0].text(arches[0], options.show))
    else:
        found = "\n".join(" ".join(f"{k}={v}" for k, v in variant.fields.items()) for variant in kept)
        parser.error(f"--show takes one architecture and one variant; these words name {len(kept)}:\n{found}")


if __name__ == "__main__":
    main()
