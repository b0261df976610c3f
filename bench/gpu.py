"""Everything that needs a GPU, in one go and in time: its tests, the update kernel's tuning, the benchmarks.

make gpu                                        in a checkout
python bench/gpu.py --out DIR --minutes 9       on a bare machine with PyTorch, Triton, pytest, pydantic and tyro

What fails is recorded and does not stop the rest. DIR takes gpu.json, stats-cuda.json, norm-cuda.json, cnn-cuda.json,
sweep-cuda.json, update-tuning.json and optim-cuda.json; with --logs another folder takes everything that was printed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: name -> its share of the time that is left, and the command; {minutes} is a little less than what it gets.
STEPS = {
    "tests": (0.40, "-m pytest tests/gpu -q -p no:cacheprovider --durations=5"),
    "statistics": (0.30, "-m bench.bench_stats --device cuda --minutes {minutes} --seconds 1 --out {out}"),
    "batch norm": (0.25, "-m bench.bench_norm --minutes {minutes} --out {out}"),
    "cnn": (0.40, "-m bench.bench_cnn --device cuda --minutes {minutes} --seconds 5 --out {out}"),
    "sweep": (0.40, "-m bench.bench_sweep --device cuda --minutes {minutes} --seconds 10 --out {out}"),
    "tuning": (0.40, "-m bench.tune_update --minutes {minutes} --out {out}"),
    "benchmark": (1.0, "-m bench.bench_optim --device cuda --minutes {minutes} --seconds 2 --out {out}"),
}
_KEPT = 12  # lines of a step's output that the record keeps: what it ended with


def lay_out(folder: Path) -> Path:
    """Copy the sources into the layout of an installation: nc/ is ncollapse, kernels/ is ncollapse.kernels."""
    for source, target in (("nc", ""), ("kernels", "kernels"), ("train", "train")):
        shutil.copytree(ROOT / source, folder / "ncollapse" / target, ignore=shutil.ignore_patterns("__pycache__"))
    for source in ("bench", "tests"):
        shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(arguments: list[str], seconds: float, **where: Any) -> tuple[int | None, str]:
    """Exit status, None where time was up, and output of a Python command, which is ended with all that it started."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, **where,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output


def commit_of_checkout() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def why_not() -> str | None:
    """Why nothing can run here; None if it can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here (torch.cuda.is_available() is False)"
    return None


def table(out: Path, began: float) -> list[str]:
    """What was measured since then, in lines."""
    lines = []
    found = {p.stem: json.loads(p.read_text()) for p in out.glob("*.json") if p.stat().st_mtime >= began}
    if "update-tuning" in found:
        lines += ["", "tuning: time over that of the library's own constants"]
        for row in found["update-tuning"].get("best", [])[:4]:
            lines.append(f"  BLOCK {row['block']:5} CHUNK {row['chunk']:6} WARPS {row['warps']}  {row['time']:.3f}")
    if "stats-cuda" in found:
        lines += statistics_table(found["stats-cuda"])
    if "sweep-cuda" in found:
        lines += ["", "sweep: runs a minute (200 epochs of 12,800 images), × a plain loop, × the best sequential loop"]
        for name, one in found["sweep-cuda"]["cases"].items():
            rate = one["engine"]["runs_per_minute_of_200_epochs"]
            lines.append(
                f"  {name:<42}{rate:9.2f}{one['speed_against_plain']:9.1f}{one['speed_against_best_sequential']:9.1f}"
            )
    if "optim-cuda" in found:
        lines += [
            "",
            f"{'µs a step, and speed against the baseline':<44}{'eager':>18}{'replay':>18}{'gpu':>18}  of a copy",
        ]
        for case in found["optim-cuda"]["cases"]:
            if "refused" in case:
                lines.append(f"  {case['case']:<42}{case['refused']}")
                continue
            cells = []
            for group in ("eager", "replay", "gpu"):
                ours = case.get(group, {}).get("nc")
                cells.append(f"{ours['median']:9.1f} {ours.get('speed', 0):5.2f}×" if ours else "")
            share = case.get("gpu", {}).get("nc", {}).get("share")
            name = f"{case['case']} / {case['baseline']}"
            lines.append(f"  {name:<42}" + "".join(f"{c:>18}" for c in cells) + (f"{share:9.0%}" if share else ""))
    return lines


def statistics_table(record: dict[str, Any]) -> list[str]:
    """Of the class statistics: time and speed of the ways to NC1, and what adding the batches makes of the GPU."""
    lines = ["", "class statistics: ms, speed against two passes; then of a copy's GB/s, TFLOP/s of the same product's"]
    for case in record["cases"]:
        if "refused" in case:
            lines.append(f"  {case['case']:<52}{case['refused']}")
            continue
        ways = ("nc full", "nc projected", "nc trace")
        cells = [f"{case['all'][n]['median'] / 1e3:8.2f} {case['all'][n]['speed']:5.1f}×" for n in ways]
        full, trace, product = (case["update"][n] for n in ("nc full", "nc trace", "product"))
        lines.append(
            f"  {case['case']:<52}{''.join(cells)}{trace['share']:6.0%}"
            f"{full['tflop_per_s']:7.0f} of {product['tflop_per_s']:.0f}"
        )
    network = record["measure"]
    over = network.get("refused") or f"{network['measure']['over_forward']:+.1%}"
    return [*lines, f"  measure of ResNet9 over its forward passes: {over}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the records")
    parser.add_argument("--logs", type=Path, help="folder for everything that was printed")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--commit", default=commit_of_checkout(), help="of the sources, where git cannot tell")
    options = parser.parse_args()
    if reason := why_not():
        print(
            f"gpu: nothing was run: {reason}. The same kernels are tested without a GPU by `make test`.",
            file=sys.stderr,
        )
        return 1
    end, began = time.monotonic() + 60 * options.minutes, time.time()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    import torch

    report: dict[str, Any] = {
        "command": f"python bench/gpu.py --minutes {options.minutes:g}",
        "commit": options.commit,
        "device": torch.cuda.get_device_name(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda},
    }
    with tempfile.TemporaryDirectory() as temporary:
        installed = run(["-c", "import ncollapse.optim, ncollapse.train"], 120, cwd=ROOT)[0] == 0
        folder = ROOT if installed else lay_out(Path(temporary))
        for name, (share, command) in STEPS.items():
            seconds = max(10.0, (end - time.monotonic()) * share - 5)
            arguments = command.format(minutes=round((seconds - 20) / 60, 2), out=out).split()
            if options.commit and name != "tests":
                arguments += ["--commit", options.commit]
            start = time.monotonic()
            print(f"gpu: {name}, {seconds:.0f} s at most", flush=True)
            # The tests need none of the plugins that a machine may have, whose warnings would be errors.
            status, output = run(
                arguments, seconds, cwd=folder, env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            )
            report[name] = {
                "exit": status, "seconds": round(time.monotonic() - start, 1), "output": output.splitlines()[-_KEPT:]
            }  # fmt: skip
            (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
            if options.logs is not None:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{name}.log").write_text(output)
            print(output[-3500:], flush=True)
    print("\n".join(table(out, began)))
    print()
    for name in STEPS:
        status = report[name]["exit"]
        said = {0: "done", None: "stopped, time was up"}.get(status, f"failed, exit status {status}")
        print(f"gpu: {name:<10} {report[name]['seconds']:6.1f} s  {said}")
    return 0 if all(report[name]["exit"] == 0 for name in STEPS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
