"""The file of a checkpoint: a line with its epoch and a SHA-256 of all the rest, then what the training has serialised.

A single wrong bit gives other numbers without any error: nothing is read of a file whose hash does not match. Files of
older versions have no such line; they are ZIP archives, whose parts have a CRC-32 each.
"""

import hashlib
import io
import re
import zipfile
import zlib
from pathlib import Path

from ncollapse.train.errors import CheckpointError

_LINE = re.compile(rb"ncollapse checkpoint ([0-9a-f]{64}) ([0-9]{1,9})\n")
#: Bytes that the first line takes at most.
_LONGEST_LINE = 128


def file_name(stack: int, epoch: int) -> str:
    """Return the only name that the checkpoint of a stack after an epoch may have."""
    return f"{stack}-{epoch}.pt"


def seal(content: bytes, epoch: int) -> bytes:
    """Return the bytes of the file that keeps `content`, the state of a training after an epoch."""
    return b"ncollapse checkpoint %s %d\n" % (_digest(content, epoch), epoch) + content


def unseal(file: bytes, epoch: int | None = None) -> bytes:
    """Return the content of a file, which is whole.

    Args:
        epoch: that the checkpoint must be of; None: any.

    Raises:
        CheckpointError: the file is damaged, or of another epoch.
    """
    line = _LINE.match(file[:_LONGEST_LINE])
    if line is None:
        check_archive(file)
        return file
    content, stored = file[line.end() :], int(line[2])
    if line[1] != _digest(content, stored):
        raise CheckpointError("the checkpoint is damaged: its SHA-256 does not match")
    if epoch is not None and stored != epoch:
        raise CheckpointError(f"the checkpoint is of epoch {stored}, not of epoch {epoch}")
    return content


def read_checkpoint(path: Path, epoch: int | None = None) -> bytes:
    """Read and return the content of the file of a checkpoint; see `unseal`."""
    try:
        return unseal(path.read_bytes(), epoch)
    except OSError as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from None


def _digest(content: bytes, epoch: int) -> bytes:
    digest = hashlib.sha256(b"%d\n" % epoch)
    digest.update(content)
    return digest.hexdigest().encode()


def check_archive(file: bytes) -> None:
    """Raise CheckpointError unless a file without a hash is a ZIP archive with parts that match their CRC-32."""
    if not file.startswith(b"PK\x03\x04"):  # `zipfile` also takes an archive behind a damaged first line
        raise CheckpointError("the checkpoint is damaged: its first line cannot be read")
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(f"the checkpoint cannot be read ({type(error).__name__})") from None
    if bad is not None:
        raise CheckpointError("the checkpoint is damaged: its CRC-32 does not match")
