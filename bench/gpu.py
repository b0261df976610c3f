"""Everything that needs a GPU, in one go and in time: its tests, then the benchmarks in order of value.

make gpu                                             in a checkout
python bench/gpu.py --out DIR --wheels .whl          on a bare machine with PyTorch, Triton and pytest
python bench/gpu.py --out DIR --device cpu           try every step on a CPU, with small sizes

Each step has its seconds and is ended there; it saves its record after every case. After each step DIR/gpu.tgz holds
all records, and everything that was printed: one file to bring home. A step that fails is recorded and does not stop
the rest. `--steps tests,cnn` runs only those.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One command, ended after `seconds`; {seconds} in it is a little less, for what it times by itself."""

    name: str
    seconds: float
    command: str
    record: str = ""  # the file that it writes; {device} is cuda or cpu


STEPS = (
    Step("tests", 90, "-m pytest tests/gpu tests/kernels -m gpu -q -p no:cacheprovider {parallel} --durations=5"),
    Step("cnn", 90, "-m bench.cnn_times --seconds 1.5", "cnn-{device}.json"),
    Step("statistics", 50, "-m bench.statistics_times --seconds 0.5", "stats-{device}.json"),
    Step("optimizers", 45, "-m bench.optimizer_times --no-compile --seconds 0.2 --only {large}", "optim-{device}.json"),
    Step("tiny tensors", 30, "-m bench.optimizer_times --no-compile --seconds 0.2 --only tiny", "optim-{device}.json"),
    Step("batch norm", 60, "-m bench.batch_norm_times --no-compile --minutes 0.9 --seconds 0.3", "norm-cuda.json"),
    Step("races", 50, "-m pytest tests/kernels/test_update_kernels.py -m gpu -q -p no:cacheprovider -k twenty"),
    Step("tuning", 60, "-m bench.tune_update", "update-tuning.json"),
    Step("small cnns", 60, "-m bench.sweep_times --seconds 3 --only cnn", "sweep-{device}.json"),
)
#: Without a GPU: what says so and ends is no failure, for a trial of the whole script.
_CUDA_ONLY = ("batch norm", "tuning", "races")
_KEPT = 12  # lines of a step's output that the report keeps: what it ended with


def lay_out(folder: Path) -> Path:
    """Copy the sources into the layout of an installation: nc/ is ncollapse, kernels/ is ncollapse.kernels."""
    for source, target in (("nc", ""), ("kernels", "kernels"), ("train", "train")):
        shutil.copytree(ROOT / source, folder / "ncollapse" / target, ignore=shutil.ignore_patterns("__pycache__"))
    for source in ("bench", "tests"):
        shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(arguments: list[str], seconds: float, prefix: tuple[str, ...] = (), **where: Any) -> tuple[int | None, str]:
    """Run a Python command; end it with all that it started when its time is up.

    Args:
        prefix: what runs Python, e.g. compute-sanitizer.

    Returns:
        The exit status, None where time was up, and the output.
    """
    process = subprocess.Popen(
        [*prefix, sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.json")):
        if path.stat().st_mtime >= began:
            record = json.loads(path.read_text())
            if path.stem in found and isinstance(record.get("cases"), list):  # two steps with cases of one kind
                found[path.stem]["cases"] += record["cases"]
            else:
                found[path.stem] = record
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


def arguments_of(step: Step, device: str, records: Path, commit: str | None) -> list[str]:
    """The step's command on this device."""
    cuda = device == "cuda"
    words = {"large": "100M" if cuda else "resnet9", "parallel": "-p xdist -n 8" if cuda else "-p xdist -n 2"}
    arguments = step.command.format(**words).split()
    if step.record:
        arguments += ["--out", str(records), "--minutes", f"{(step.seconds - 12) / 60:.2f}"]
        arguments += ["--commit", commit] if commit else []
        arguments += ["--device", device] if "{device}" in step.record else []
    return arguments


def install(wheels: Path, target: Path) -> None:
    """Install the packages that this machine lacks from a folder of wheels."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    status, output = run([*pip, *files], 60)
    if status != 0:
        raise SystemExit(f"gpu: the wheels in {wheels} cannot be installed:\n{output[-2000:]}")


def main() -> int:
    names = ", ".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of gpu.tgz")
    parser.add_argument("--steps", default="", help=f"separated by commas, in place of all: {names}")
    parser.add_argument("--wheels", type=Path, help="a folder of packages that the machine lacks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", default=commit_of_checkout(), help="of the sources, where git cannot tell")
    options = parser.parse_args()
    wanted = [name.strip() for name in options.steps.split(",") if name.strip()] or [step.name for step in STEPS]
    if unknown := set(wanted) - {step.name for step in STEPS}:
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; there are {names}")
    if options.device == "cuda" and (reason := why_not()):
        print(
            f"gpu: nothing was run: {reason}. The same kernels are tested without a GPU by `make test`.",
            file=sys.stderr,
        )
        return 1
    began, out = time.time(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        return run_steps([step for step in STEPS if step.name in wanted], options, Path(temporary), out, began)


def run_steps(steps: list[Step], options: argparse.Namespace, scratch: Path, out: Path, began: float) -> int:
    """Run the steps in a copy of the sources, if they are not installed, and pack what they leave."""
    import torch

    cuda = options.device == "cuda"
    report: dict[str, Any] = {
        "command": f"python bench/gpu.py --device {options.device} --steps {options.steps or 'all'}",
        "commit": options.commit,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda},
    }
    # The tests need none of the plugins that a machine may have, whose warnings would be errors.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    if options.wheels is not None:
        install(options.wheels, scratch / "site")
        environment["PYTHONPATH"] = f"{scratch / 'site'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    installed = run(["-c", "import ncollapse.optim, ncollapse.train"], 120, cwd="/", env=environment)[0] == 0
    folder = ROOT if installed else lay_out(scratch / "sources")
    records, logs = scratch / "records", scratch / "logs"
    records.mkdir()
    logs.mkdir()
    for step in steps:
        arguments = arguments_of(step, options.device, records / step.name.replace(" ", "-"), options.commit)
        prefix = ("compute-sanitizer", "--tool", "racecheck") if step.name == "races" and cuda else ()
        print(f"gpu: {step.name}, {step.seconds:.0f} s at most", flush=True)
        start = time.monotonic()
        try:
            status, output = run(arguments, step.seconds, prefix, cwd=folder, env=environment)
        except OSError as error:  # no compute-sanitizer here
            status, output = 127, str(error)
        report[step.name] = {
            "exit": status, "seconds": round(time.monotonic() - start, 1), "output": output.splitlines()[-_KEPT:]
        }  # fmt: skip
        (records / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (logs / f"{step.name}.log").write_text(output)
        pack(out / "gpu.tgz", {"records": records, "logs": logs})
        print(output[-2500:], flush=True)
    print("\n".join(table(records, began)))
    print()
    failed = 0
    for step in steps:
        status = report[step.name]["exit"]
        expected = not cuda and step.name in _CUDA_ONLY
        said = {0: "done", None: "ended at its limit"}.get(status, f"failed, exit status {status}")
        print(f"gpu: {step.name:<12} {report[step.name]['seconds']:6.1f} s  {'needs a GPU' if expected else said}")
        failed += status not in (0, None) and not expected
    print(f"gpu: records and logs in {out / 'gpu.tgz'}")
    return 1 if failed else 0


def pack(archive: Path, folders: dict[str, Path]) -> None:
    """Write folders into an archive that is whole or as it was before."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for name, folder in folders.items():
            tar.add(folder, name)
    os.replace(partial, archive)


if __name__ == "__main__":
    raise SystemExit(main())
