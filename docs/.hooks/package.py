"""The API pages are read from the sources: a folder of links is the package as it is installed, nc/ being ncollapse."""

from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def on_startup(**_: Any) -> None:  # before mkdocstrings looks for its paths
    package = ROOT / "build" / "api" / "ncollapse"
    package.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if not link.exists():  # what it led to has been renamed
            link.unlink(missing_ok=True)
    for source in [*(ROOT / "nc").iterdir(), ROOT / "kernels", ROOT / "train"]:
        with suppress(FileExistsError):  # of an earlier build, or one at the same time
            (package / source.name).symlink_to(source)
