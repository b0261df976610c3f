"""Exceptions that end a command with a message instead of a traceback."""


class UserError(Exception):
    """An error that the user can correct; the message says what is wrong, where, and what to do."""


class InterruptError(UserError):
    """The user has stopped the command; the message says what is kept."""


class NoResultsError(UserError):
    """A folder holds no results: no sweep has run there, or one is just starting."""


class CheckpointError(UserError):
    """A checkpoint from which a training cannot continue: unreadable, or of other runs or another version."""
