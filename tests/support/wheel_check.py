"""Whether a wheel installs, and its C++ kernels load, in every Python from 3.11 on that is found here.

python wheel_check.py dist/ncollapse-….whl
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

#: Torch, which takes gigabytes, is not installed: the kernels are loaded from their files.
_LOAD = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
import ncollapse
files = sorted(Path(ncollapse.__file__).parent.glob("kernels/**/*.so"))
for file in files:
    loader = ExtensionFileLoader(file.name.partition(".")[0], str(file))
    loader.exec_module(module_from_spec(spec_from_loader(loader.name, loader)))
print(f"Python {sys.version.split()[0]}: ncollapse {ncollapse.__version__}, {len(files)} C++ modules load")
if len(files) != 3:
    sys.exit("three C++ modules were expected")
"""


def pythons() -> dict[str, Path]:
    """The interpreters of version 3.11 and later that are here, one of each minor version."""
    places = [Path(found) for n in range(11, 20) if (found := shutil.which(f"python3.{n}"))]
    places += sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3"))
    found = {}
    for place in places:
        asked = [
            place,
            "-c",
            "import sys; print('%d.%d' % sys.version_info[:2] if sys.version_info >= (3, 11) else '')",
        ]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            found.setdefault(done.stdout.strip(), place)
    return found


def main(wheel: str) -> None:
    for python in pythons().values():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([python, "-m", "venv", folder], check=True)
            own = Path(folder, "bin", "python")
            pip = [own, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", wheel]
            subprocess.run(pip, check=True)
            subprocess.run([own, "-c", _LOAD], check=True, cwd=folder)


if __name__ == "__main__":
    main(sys.argv[1])
