"""What a failed write or read of a results folder means, by its kind, and what the user can do."""

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ncollapse.train.errors import DamageError, UserError

_KEPT = "Every finished run is kept"
_AGAIN = "then give the same command again"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


def sqlite_code(error: Exception) -> int | None:
    """Return the primary result code of an error of SQLite; None for one that Python has raised."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def is_busy(error: Exception) -> bool:
    """Return whether another program holds the database."""
    return sqlite_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def cannot_write(path: Path, error: Exception) -> UserError:
    """Return the error that tells the user why a file or folder was not written and what to do."""
    code, number = sqlite_code(error), getattr(error, "errno", None)
    said = f"cannot write to {path.resolve()}: {error}. {_KEPT}"
    if _is_gone(path, error):
        return UserError(
            f"{path.resolve()} was deleted or moved while it was in use ({error}): put it back to continue, or give "
            "the same command again to begin anew"
        )
    if code == sqlite3.SQLITE_FULL or number in _FULL:
        return UserError(f"{said}; make room, {_AGAIN}")
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM) or number in _READ_ONLY:
        return UserError(f"{said}; make the folder and its files writable, or choose another --out, {_AGAIN}")
    if is_busy(error):
        return UserError(f"{said}; another program holds the database: close what reads it, {_AGAIN}")
    if is_damage(error):
        return damaged(path, error)
    if code == sqlite3.SQLITE_IOERR or number == errno.EIO:
        return UserError(f"{said}; the disk or the network that it is on fails: look after it, {_AGAIN}")
    return UserError(f"{said}; mend that, {_AGAIN}")


@contextlib.contextmanager
def user_errors(folder: Path) -> Iterator[None]:
    """Raise `UserError`, by `cannot_write`, where a file or the database of a results folder cannot be written."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise cannot_write(folder, error) from error


def cannot_read(path: Path, error: Exception) -> UserError:
    """Return the error that tells the user why a results folder was not read and what to do."""
    if is_busy(error):
        return UserError(f"cannot read {path}: {error}; another program writes to it: try again when it has finished")
    return damaged(path, error) if is_damage(error) else UserError(f"cannot read {path}: {error}")


def is_damage(error: Exception) -> bool:
    """Return whether an error says that a database does not hold what was once written to it."""
    codes = (
        sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_TOOBIG,
    )  # fmt: skip
    return sqlite_code(error) in codes or "decode to UTF-8" in str(error)


def damaged(path: Path, what: object) -> DamageError:
    """Return the error for a results folder, or a file of it, that holds what cannot be there."""
    folder = path if path.is_dir() else path.parent
    return DamageError(
        f"{path} is damaged: {what}. `ncollapse check {folder}` says what is whole, and with --salvage OUT copies it"
    )


def _is_gone(path: Path, error: Exception) -> bool:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_DBMOVED:
        return True
    lost = sqlite_code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
    return (lost or isinstance(error, FileNotFoundError)) and not (path.exists() or path.parent.exists())
