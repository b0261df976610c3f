"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
from pathlib import Path

from ncollapse.train.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after a crash or a loss of power it is there as it was before, or as it is after.

    Raises:
        UserError: it cannot be written; nothing is left of it.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too, has to reach the disk
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    """What to tell the user."""
    return UserError(
        f"cannot write to {path.resolve()}: {error}. Every finished run is kept; make room or make the folder "
        "writable, then give the same command again"
    )
