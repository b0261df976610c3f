"""`ncollapse doctor`: what this machine has, what runs in fast kernels and what falls back to plain PyTorch."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ncollapse.kernels import operators
from ncollapse.kernels.class_stats import cpu as class_stats_cpu
from ncollapse.kernels.class_stats import op as class_stats
from ncollapse.kernels.update import cpu as update_cpu
from ncollapse.kernels.update import launch as update
from ncollapse.train.config import DATA_SETS
from ncollapse.train.data.sets import check_files, data_folder
from ncollapse.train.limits import available_memory, memory_limit, processors
from ncollapse.train.results.provenance import device_name, package_version


def inspect_machine(data_dir: Path | None) -> Iterator[tuple[str, str]]:
    """Yield pairs (subject, finding) for a table."""
    yield "ncollapse", package_version("ncollapse") or "not installed"
    yield "torch", torch.__version__
    yield (
        "processor",
        f"{device_name('cpu')}, {processors()} of {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
    )
    limit = memory_limit()
    of = "" if limit is None else f"; this container or job is limited to {limit / 2**30:.1f} GiB"
    yield "memory", f"{available_memory() / 2**30:.1f} GiB free{of}"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            yield f"GPU {i}", f"{device_name(f'cuda:{i}')}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    else:
        yield "GPU", "none that torch can use; runs train on the processor"
    yield "Triton", package_version("triton") or "not installed"
    kernels: list[tuple[str, Callable[[torch.device], str | None], str, str]] = [
        ("optimizers", update.why_no_kernel, "a fused kernel, one launch a step", update_cpu.EXTENSION),
        ("metrics", class_stats.why_no_kernel, "fused kernels, one read of the features", class_stats_cpu.EXTENSION),
    ]
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if kind == "cuda":
            kernels.append(("batch norm", operators.why_no_kernel, "fused with ReLU and pooling", ""))
        for part, why_not, fused, extension in kernels:
            reason = why_not(torch.device(kind))
            if reason is None and kind == "cpu" and not operators.uses_threads(extension):
                fused += "; built without OpenMP: one thread"
            yield f"{part} on {kind}", fused if reason is None else f"plain PyTorch, slowly: {reason}"
    yield "data folder", str(data_folder(data_dir).resolve())
    for name in DATA_SETS:
        yield f"data {name}", check_files(name, data_folder(data_dir))
