"""The exceptions that end a command with a message instead of a traceback."""


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and what to do."""


class InterruptError(UserError):
    """Stopped by the user; the message says what is kept."""
