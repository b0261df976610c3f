"""Every record of bench/results: what it holds, how and where it was made."""

from typing import Any

from bench.tables.markdown import RESULTS, read, table
from ncollapse.formatting import DASH

HOLDS = {
    "beyond-paper-cpu.json": "other optimizers, other losses",
    "cnn-cuda.json": "a training step of ResNet9",
    "cnn-cuda-h200.json": "a training step of ResNet9",
    "demo.json": "the demo: time and table",
    "findings-cpu.json": "the paper's claims on a small CNN",
    "findings-gpu.json": "the paper's claims on ResNet9",
    "fuzz.json": "damaged inputs",
    "initial-numbers.json": "NC1–NC3 before training",
    "kernel-code.json": "what the Triton kernels compile to",
    "kernels-cpu.json": "microbenchmarks of all kernels",
    "large-store.json": "large results folders",
    "memory-changes.json": "steps while memory changes",
    "moment-accuracy.json": "what matrix units may round",
    "norm-cuda.json": "batch norm alone",
    "optim-cpu.json": "optimizer steps",
    "optim-cpu-before-after.json": "optimizer steps before and after a rewrite",
    "optim-cuda.json": "optimizer steps",
    "optim-cuda-tiny.json": "optimizer steps of tiny tensors",
    "optim-cuda-h200.json": "optimizer steps of large tensors",
    "own-cpu.json": "models of the user's",
    "paper-digits-cpu.json": "the paper's grid on digits",
    "paper-table.json": "runs of the paper's main table",
    "precision-cpu.json": "float32 and bfloat16",
    "prototypes-cuda.json": "prototypes of kernels",
    "report.json": "reports",
    "row-sum-cpu.json": "NC0 under two cross-entropies",
    "stats-cpu.json": "class statistics and `measure`",
    "stats-cuda.json": "class statistics and `measure`",
    "stats-cuda-h200.json": "class statistics and `measure`",
    "sweep-cpu.json": "runs a minute",
}


def records() -> str:
    """A row for each file."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        if path.name not in HOLDS:
            raise SystemExit(f"bench/results/{path.name}: say in HOLDS of bench/tables/records.py what it holds")
        link = f"[{path.name}](../bench/results/{path.name})"
        rows.append([link, HOLDS[path.name], *_where(read(path.name))])
    return table(["record", "of", "device", "torch", "commit"], rows)


def _runs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs that each say on which device they were trained."""
    runs = record.get("runs")
    return [run for run in runs if "device" in run] if isinstance(runs, list) else []


def _where(record: Any) -> list[str]:
    """Device, PyTorch and commit of a record."""
    if isinstance(record, list):  # compiled, for devices that need not be there; nothing was run
        return [", ".join(sorted({row["arch"] for row in record}, key=lambda arch: (len(arch), arch))), DASH, DASH]
    machines = [record["machine"]] if "machine" in record else []
    machines += [record["machine_info"]] if "machine_info" in record else []
    machines += [version["machine"] for version in record.get("versions", {}).values()]
    machines += [{**machine, "device": run["device"]} for run in _runs(record) for machine in machines[:1]]
    found = [
        dict.fromkeys(of(machine) for machine in machines)
        for of in (lambda m: m["device"], lambda m: m["versions"]["torch"], lambda m: m["commit"])
    ]
    return [", ".join(each) for each in found]
