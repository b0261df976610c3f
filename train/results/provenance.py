"""What a result was made with: versions, commit, device."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("ncollapse", "torch", "triton", "torchvision", "numpy", "scikit-learn")


def describe_machine(device: str) -> dict[str, Any]:
    """Return commit (None outside a git checkout), versions (None: not installed), device, threads and platform."""
    import torch

    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}},
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a package; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor for a device of torch: "cpu", "cuda:0" …."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside another repository, whose commit has nothing to do with it.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
