"""Exceptions that end a command with a message instead of a traceback."""


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


class DataError(UserError):
    """A data set cannot be read, or is no longer the one that a sweep began with."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is used up; on the CPU torch says so only in a RuntimeError's text."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the class is torch's
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
