"""One process at a time owns a results folder: it holds the folder's lock."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ncollapse.train.errors import UserError
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.storage_errors import user_errors
from ncollapse.train.results.validation import FILES, check_not_lost

#: The file that is locked.
LOCK = ".lock"
#: Seconds for which a starting sweep waits for the lock, which `ncollapse status` holds for an instant.
_SECONDS = 2.0


def own_folder(folder: Path) -> AbstractContextManager[Any]:
    """Make a results folder if missing and take its lock; return the context that releases it.

    Raises:
        UserError: another process owns it, or it holds symbolic links.
        DamageError: its database is missing beside files of runs.
    """
    with user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LOCK, *FILES):
            if (folder / name).is_symlink():
                raise UserError(f"{folder / name} is a symbolic link: a results folder holds its own files only")
        if not (folder / FILE).exists():
            check_not_lost(folder)
        try:
            return FileLock(folder / LOCK).acquire(_SECONDS, poll_interval=0.02)
        except Timeout:
            raise UserError(f"{folder} is in use by another process; wait for it, or choose another --out") from None
