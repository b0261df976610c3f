"""The exceptions that end a command with a message instead of a traceback."""


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


class InterruptError(UserError):
    """Stopped by the user; the message says what is kept."""


class NoResultsError(UserError):
    """A folder holds no results: none were made there, or a sweep is just starting."""


class CheckpointError(UserError):
    """A checkpoint from which a training cannot continue: unreadable, or of other runs or another version."""
