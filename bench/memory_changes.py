"""Optimizer steps while other code changes the memory of their tensors: many draws, and under AddressSanitizer.

python -m bench.memory_changes --draws 2000
python -m bench.memory_changes --draws 2000 --sanitize

`tests/support/memory_changes.py` says what a draw is. With --sanitize the C++ extensions of the optimizers are compiled
with AddressSanitizer (g++), into a copy, so that any access beside a tensor ends the run. Recorded in
bench/results/memory-changes.json.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from bench.record import Record, recording

ROOT = Path(__file__).parents[1]
EXTENSIONS = ("kernels/_tensors.cpp", "kernels/update/_cpu.cpp")
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fsanitize=address"]
DRAW = "import json, sys, torch, memory_changes as m; torch.set_num_threads(2); "
DRAW += "print(json.dumps(dict(m.check_many(int(sys.argv[1]), int(sys.argv[2])))))"


def sanitized(folder: Path) -> dict[str, str]:
    """A copy of the package with its extensions under AddressSanitizer: the environment that runs it."""
    package = folder / "ncollapse"
    shutil.copytree(ROOT / "nc", package)
    for name in ("kernels", "train"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("*.so"))
    include = sysconfig.get_paths()["include"]
    for source in EXTENSIONS:
        path = package / source
        command = ["g++", *FLAGS, f"-I{include}", str(path), "-o", str(path.with_suffix(".abi3.so"))]
        subprocess.run(command, check=True)
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(folder),
    }  # fmt: skip


def main() -> int:
    parser = recording(__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--sanitize", action="store_true", help="compile the extensions with AddressSanitizer")
    options = parser.parse_args()
    command = f"python -m bench.memory_changes --draws {options.draws} --first {options.first}"
    kind = "sanitized" if options.sanitize else "plain"
    path = options.out / "memory-changes.json"
    before = json.loads(path.read_text()).get("runs", {}) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        changes = sanitized(Path(folder)) if options.sanitize else {"PYTHONPATH": ""}
        changes["PYTHONPATH"] = os.pathsep.join(filter(None, [changes["PYTHONPATH"], str(ROOT / "tests" / "support")]))
        began = time.monotonic()
        run = [sys.executable, "-W", "ignore", "-c", DRAW, str(options.first), str(options.draws)]
        result = subprocess.run(run, env={**os.environ, **changes}, stdout=subprocess.PIPE, text=True, cwd=folder)
    if result.returncode:
        return result.returncode
    happened = json.loads(result.stdout)
    record = Record(path, command + " [--sanitize]", "cpu", options.commit)
    seconds = round(time.monotonic() - began, 1)
    record.data["runs"] = before | {
        kind: {"draws": options.draws, "first": options.first, "seconds": seconds} | happened
    }
    record.save()
    print(f"{kind}: {options.draws} draws, nothing found")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
