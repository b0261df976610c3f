"""How SQLite keeps transactions: in write-ahead logging, where the file system can, or in a rollback journal.

With write-ahead logging a reader never holds up the writer: a database browser with an open transaction, or a suspended
report, does not matter to a sweep. It needs memory that the processes of *one* machine share, so that it would damage a
database on a network file system (https://sqlite.org/wal.html). A sweep's folder has it only while the sweep runs:
afterwards the database is a single file, which can be copied, and read where nothing can be written.
"""

import contextlib
import sqlite3
from pathlib import Path

#: Types of file systems that belong to one machine, as the operating system names them. On any other one, known or
#: not, the database has a rollback journal.
_LOCAL = frozenset(
    ("apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "ntfs", "overlay", "ramfs", "refs", "tmpfs",
     "ufs", "xfs", "zfs")
)  # fmt: skip


def is_local(folder: Path) -> bool:
    """Return whether a folder lies on a file system of this machine alone, as far as its type tells."""
    import psutil  # readers of results need no list of file systems

    folder, found = folder.resolve(), None
    for partition in psutil.disk_partitions(all=True):
        point = Path(partition.mountpoint)
        # Of two at the same place the later one hides the other.
        if folder.is_relative_to(point) and (found is None or len(point.parts) >= found[0]):
            found = len(point.parts), partition
    return found is not None and found[1].fstype.lower() in _LOCAL and "remote" not in found[1].opts.split(",")


def begin_journal(connection: sqlite3.Connection, folder: Path) -> None:
    """Have the database of a folder log ahead where it can; elsewhere it gets or keeps its rollback journal."""
    _set(connection, "WAL" if is_local(folder) else "DELETE")


def end_journal(connection: sqlite3.Connection) -> None:
    """Make the database a single file again, unless another program reads it at the moment."""
    _set(connection, "DELETE")


def _set(connection: sqlite3.Connection, mode: str) -> None:
    # Busy: another program reads. The journal stays as it is, and everything works with either.
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute(f"PRAGMA journal_mode = {mode}")
