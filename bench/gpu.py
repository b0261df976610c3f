"""Everything that needs a GPU, in one go and in nine minutes: its tests, then the benchmarks, in order of value.

make gpu                                             in a checkout
python bench/gpu.py --out DIR --wheels .whl          on a bare machine with PyTorch, Triton and pytest
python bench/gpu.py --out DIR --from cnn             go on where an earlier call was cut short
python bench/gpu.py --out DIR --steps table --data-dir DIR     the rows that the paper's table lacks
python bench/gpu.py --out DIR --device cpu --quick   try every step on a CPU, with small sizes

Each step has its seconds and is killed there. It saves its record after every case, tests after every test. DIR/gpu.tgz
holds all records and all that was printed: one file to bring home, written anew every ten seconds. A step that fails is
recorded and does not stop the rest. `--steps tests,steps` runs only those.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One command, ended after `seconds`."""

    name: str
    seconds: float
    command: str
    timed: float = 0.0  # seconds for each group of timings of a script that records; 0: it is none
    asked: bool = False  # only where it is named
    on_cpu: bool = True  # else a trial on a CPU ends with its help


#: Those of code that has never run on a GPU, and those of what only a GPU can show, come first.
FIRST_TESTS = (
    "tests/gpu", "tests/kernels/test_pooled_head.py", "tests/kernels/test_convolution.py",
    "tests/kernels/test_newton_schulz.py", "tests/kernels/test_update_graph_memory.py",
    "tests/kernels/test_batch_norm_ways.py", "tests/kernels/test_class_stats_kernels.py",
)  # fmt: skip
_PYTEST = "-m pytest -m gpu -q -p no:cacheprovider"
_RACES = "tests/kernels/test_update_kernels.py tests/kernels/test_batch_norm_ways.py"

STEPS = (
    Step("tests", 110, f"{_PYTEST} tests/gpu tests/kernels --maxfail=60 --durations=5"),
    Step("steps", 100, "-m bench.step_times", timed=1.0),
    Step("muon", 25, "-m bench.muon_times", timed=1.0),
    Step("cnn", 52, "-m bench.cnn_times", timed=1.0),
    Step("statistics", 60, "-m bench.statistics_times", timed=0.5),
    Step("large", 28, "-m bench.optimizer_times --no-compile --only {large}", timed=0.2),
    Step("tiny", 22, "-m bench.optimizer_times --no-compile --only tiny", timed=0.2),
    Step("convolutions", 20, "-m bench.convolution_times", timed=0.2, on_cpu=False),
    Step("norm", 30, "-m bench.batch_norm_times --no-compile", timed=0.2),
    Step("sweep", 62, "-m bench.sweep_times --only cnn", timed=10.0),
    Step("races", 31, f"{_PYTEST} {_RACES} -k 'twenty and 700 and adam or every and last and pool'"),
    Step("table", 290, "-m bench.gpu_table", asked=True),
)
_KEPT = 12  # lines of a step's output that the report keeps: what it ended with
_TRIAL = 5  # times as long as on a GPU
_PACKED = 10.0  # seconds between two archives


def lay_out(folder: Path) -> Path:
    """Copy the sources into the layout of an installation: nc/ is ncollapse, kernels/ is ncollapse.kernels."""
    for source, target in (("nc", ""), ("kernels", "kernels"), ("train", "train")):
        shutil.copytree(ROOT / source, folder / "ncollapse" / target, ignore=shutil.ignore_patterns("__pycache__"))
    for source in ("bench", "tests"):
        shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(
    arguments: list[str], seconds: float, log: Path, prefix: tuple[str, ...] = (),
    meanwhile: Callable[[], None] = lambda: None, **where: Any,
) -> int | None:  # fmt: skip
    """Run a Python command; end it with all that it started when its time is up.

    Args:
        log: the file that gets its output as it comes.
        prefix: what runs Python, e.g. compute-sanitizer.
        meanwhile: called every ten seconds.

    Returns:
        The exit status, None where time was up.
    """
    began = packed = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, process_group=0,
            **where,
        )  # fmt: skip
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now - began > seconds:
                    return None
                if now - packed > _PACKED:
                    packed = now
                    meanwhile()
                time.sleep(0.1)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode


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


def limit(step: Step, options: argparse.Namespace) -> float:
    """Seconds that a step may take: a trial is to reach the end of each, on a CPU that others use too."""
    return _TRIAL * step.seconds if options.quick else step.seconds


def arguments_of(step: Step, options: argparse.Namespace, records: Path) -> list[str]:
    """The step's command on this device."""
    cuda = options.device == "cuda"
    arguments = shlex.split(step.command.format(large="100M" if cuda else "resnet9"))
    if "pytest" in arguments:
        arguments += ["-p", "bench.gpu_tests", "--first", ",".join(FIRST_TESTS), "--reports", f"{records}/tests.jsonl"]
        workers = min(12, max(1, (os.cpu_count() or 1) - 2))
        return [*arguments, *(["-p", "xdist", "-n", str(workers)] if step.name == "tests" else [])]
    if not cuda and not step.on_cpu:
        return [*arguments, "--help"]
    arguments += [
        "--out",
        str(records),
        "--minutes",
        f"{(limit(step, options) - 12) / 60:.2f}",
        "--device",
        options.device,
    ]
    arguments += ["--commit", options.commit] if options.commit else []
    if step.timed:
        arguments += ["--seconds", str(0.05 if options.quick else step.timed)]
    if step.name == "table":
        arguments += ["--folder", str(records.parents[1] / "results")]  # its checkpoints are too large to bring home
        arguments += ["--data-dir", str(options.data_dir.resolve())] if options.data_dir else []
    if step.name == "table" and options.quick:
        arguments += shlex.split("-- --data digits --model mlp --epochs 2 --stack 3 --workers 1")
    return arguments


def install(wheels: Path, target: Path, log: Path) -> None:
    """Install the packages that this machine lacks from a folder of wheels."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        raise SystemExit(f"gpu: there are no wheels in {wheels}")
    pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    if run([*pip, *files], 60, log) != 0:
        raise SystemExit(f"gpu: the wheels in {wheels} cannot be installed:\n{log.read_text()[-2000:]}")


def chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Step]:
    """The steps to run."""
    names = [step.name for step in STEPS]
    wanted = [name.strip() for name in options.steps.split(",") if name.strip()]
    wanted = wanted or [step.name for step in STEPS if not step.asked]
    if unknown := {*wanted, *([options.start] if options.start else [])} - set(names):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    first = names.index(options.start) if options.start else 0
    return [step for step in STEPS[first:] if step.name in wanted]


def main(arguments: list[str] | None = None) -> int:
    names = ", ".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of gpu.tgz")
    parser.add_argument("--steps", default="", help=f"separated by commas, in place of all: {names}")
    parser.add_argument("--from", dest="start", default="", metavar="STEP", help="begin there, and add to gpu.tgz")
    parser.add_argument("--data-dir", type=Path, help="of the table: where Fashion-MNIST is, compressed or not")
    parser.add_argument("--wheels", type=Path, help="a folder of packages that the machine lacks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="time each candidate a few times only, to see that it runs"
    )
    parser.add_argument("--commit", default=commit_of_checkout(), help="of the sources, where git cannot tell")
    options = parser.parse_args(arguments)
    steps = chosen(options, parser)
    if options.device == "cuda" and (reason := why_not()):
        print(
            f"gpu: nothing was run: {reason}. The same kernels are tested without a GPU by `make test`.",
            file=sys.stderr,
        )
        return 1
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        return run_steps(steps, options, Path(temporary))


def run_steps(steps: list[Step], options: argparse.Namespace, scratch: Path) -> int:
    """Run the steps in a copy of the sources, if they are not installed, and pack what they leave."""
    import torch

    cuda, archive = options.device == "cuda", options.out / "gpu.tgz"
    records, logs = scratch / "records", scratch / "logs"
    if options.start and archive.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
    records.mkdir(exist_ok=True)
    logs.mkdir(exist_ok=True)
    before, report = records / "gpu.json", dict[str, Any]()
    if before.exists():
        report = json.loads(before.read_text())
    report |= {
        "command": f"python bench/gpu.py --device {options.device} --steps {options.steps or 'all'}",
        "commit": options.commit,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda},
    }
    # The tests need none of the plugins that a machine may have, whose warnings would be errors.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    if options.quick:
        environment["OMP_NUM_THREADS"] = "1"  # threads that wait for one another take seconds where others work too
    if options.wheels is not None:
        install(options.wheels, scratch / "site", logs / "wheels.log")
        environment["PYTHONPATH"] = f"{scratch / 'site'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    imports = ["-c", "import ncollapse.optim, ncollapse.train"]
    installed = run(imports, 120, scratch / "imports.log", cwd="/", env=environment) == 0
    folder = ROOT if installed else lay_out(scratch / "sources")

    def pack_all() -> None:
        pack(archive, {"records": records, "logs": logs})

    for step in steps:
        own, log = records / step.name, logs / f"{step.name}.log"
        prefix = ("compute-sanitizer", "--tool", "racecheck") if step.name == "races" and cuda else ()
        print(f"gpu: {step.name}, {limit(step, options):.0f} s at most", flush=True)
        start = time.monotonic()
        try:
            command = arguments_of(step, options, own)
            status = run(command, limit(step, options), log, prefix, pack_all, cwd=folder, env=environment)
        except OSError as error:  # no compute-sanitizer here
            status = 127
            log.write_text(str(error))
        output, taken = log.read_text(errors="replace"), time.monotonic() - start
        report[step.name] = {"exit": status, "seconds": round(taken, 1), "output": output.splitlines()[-_KEPT:]}
        (records / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        pack_all()
        print(output[-2500:], *outcomes(own / "tests.jsonl"), sep="\n", flush=True)
    failed = 0
    for step in steps:
        status = report[step.name]["exit"]
        said = {0: "done", None: "ended at its limit"}.get(status, f"failed, exit status {status}")
        print(f"gpu: {step.name:<12} {report[step.name]['seconds']:6.1f} s  {said}")
        failed += status not in (0, None)
    print(f"gpu: records and logs in {archive}")
    return 1 if failed else 0


def outcomes(path: Path) -> list[str]:
    """How the tests of a session ended, one that was killed too: their number, and a line for each that failed."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    counts = Counter(one["outcome"] for one in found)
    last = {one["test"]: one["why"].strip().splitlines()[-1:] for one in found if one["outcome"] == "failed"}
    failed = [f"  {test}: {''.join(line)[:200]}" for test, line in last.items()]
    return [f"tests: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}", *failed[:40]]


def pack(archive: Path, folders: dict[str, Path]) -> None:
    """Write folders into an archive that is whole or as it was before."""
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for name, folder in folders.items():
            tar.add(folder, name)
    os.replace(partial, archive)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step that runs is ended too
    raise SystemExit(main())
