"""The package as it was at another commit, beside the present one in the same process: for timings before and after."""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
NAME = "ncollapse_before"


def package_of(commit: str) -> ModuleType:
    """Build the package of a commit under the name `ncollapse_before`, its C++ kernels included, and import it."""
    folder = Path(tempfile.mkdtemp(prefix="ncollapse-before-"))
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    source = folder / "source"
    source.mkdir()
    subprocess.run(["tar", "x"], cwd=source, input=archive, check=True)
    for path in [
        source / "pyproject.toml",
        *(p for top in ("nc", "kernels", "train") for p in (source / top).rglob("*.py")),
    ]:
        path.write_text(path.read_text().replace("ncollapse", NAME))
    # The metadata alone keep the old name, which is not imported.
    install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-build-isolation", "--target", folder / "target", source], check=True)
    sys.path.append(str(folder / "target"))
    return importlib.import_module(NAME)
