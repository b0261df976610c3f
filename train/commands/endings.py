"""How a command that fails ends: one line on standard error, an exit code, and a log file where nobody foresaw it."""

import shlex
import sys
import tempfile
import traceback
from typing import NoReturn

from rich.console import Console

import ncollapse
from ncollapse.train.formatting import plain


class Terminal(Console):
    """A console whose command ends as others do when whoever reads the output has gone; rich exits with 1."""

    def on_broken_pipe(self) -> NoReturn:
        self.quiet = True  # what is still to be printed while the command ends
        raise BrokenPipeError


def end(text: str, code: int) -> NoReturn:
    """Print the one line that a failed command ends with, and exit."""
    Console(stderr=True).print(plain(f"ncollapse: {text}", "red"), soft_wrap=True)
    sys.exit(code)


def unforeseen(error: Exception) -> str:
    """Write the traceback of an error that nobody foresaw into a file, and return the line for the user."""
    what = f"an error that ncollapse did not foresee: {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="ncollapse-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(f"ncollapse {ncollapse.__version__}, {shlex.join(sys.argv)}\n\n{traceback.format_exc()}")
    except (OSError, UnicodeEncodeError) as why:
        traceback.print_exc()
        return f"{what}; no log file could be written ({why})"
    return f"{what}. Its traceback is in {log.name}; please report it"
