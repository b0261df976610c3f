"""Exceptions that end a command with a message instead of a traceback."""

import sys
import sysconfig
import traceback
from pathlib import Path


class UserError(Exception):
    """An error that the user can correct; the message says what is wrong, where, and what to do."""


class InterruptError(UserError):
    """The user has stopped the command; the message says what is kept."""


class StoppedError(InterruptError):
    """A signal of a batch system or a limit of time has stopped the command; the same command continues."""


class LostRunsError(UserError):
    """All runs have ended, but some of them diverged or were given up as hopeless."""


class NoResultsError(UserError):
    """A folder holds no results: no sweep has run there, or one is just starting."""


class CheckpointError(UserError):
    """A checkpoint from which a training cannot continue: damaged, or of other runs or another version."""


class DamageError(UserError):
    """What a results folder holds is damaged: `ncollapse check` lists what is whole."""


class OwnCodeError(UserError):
    """Code of the user's has raised an error; the message names the line.

    Attributes:
        log: the traceback.
        run: the id of the run whose code it is, if that is known.
    """

    log: str = ""
    run: str = ""

    @classmethod
    def of(cls, what: str, error: BaseException) -> "OwnCodeError":
        """Make the error for an exception that code of the user's, `what`, has raised."""
        new = cls(f"{what}: {blamed(error)}")
        new.log = "".join(traceback.format_exception(error))
        return new


class DataError(UserError):
    """A data set cannot be read, or is no longer the one that a sweep began with."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is used up; on the CPU torch says so only in a RuntimeError's text."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the class is torch's
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_installed(file: Path) -> bool:
    """Return whether a file is of Python or of an installed package."""
    return str(file.absolute()).startswith(_INSTALLED)


def blamed(error: BaseException) -> str:
    """Return the line of the user's code that an error comes from, "mine.py, line 12", and what it says."""
    mine = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_installed(Path(frame.filename))
        and not frame.filename.startswith("<frozen")
        and not _is_of_package(frame.filename)
    ]
    place = f"{Path(mine[-1].filename).name}, line {mine[-1].lineno}: " if mine else ""
    return f"{place}{type(error).__name__}: {first_line(error)}".removesuffix(": ")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says that is not blank; "" where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), "")


def _is_of_package(file: str) -> bool:
    """Return whether a file is of ncollapse, which may be installed from a checkout with other folders."""
    return any(
        getattr(module, "__file__", None) == file
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "ncollapse"
    )
