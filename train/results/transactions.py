"""Transactions on a results folder's database that outlast other programs: patience, and a buffer.

Where the file system allows it, readers do not matter at all (`journal`). Elsewhere, and where another program writes,
a sweep goes on: what it has to say of its stacks is kept in memory, in order, and written when the database is free.
What is buffered when the process is killed is as if it had not happened: its stacks go on from what the database has.
"""

import contextlib
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ncollapse.train.errors import UserError
from ncollapse.train.results import schema
from ncollapse.train.results.journal import begin_journal, end_journal
from ncollapse.train.results.storage_errors import is_busy, user_errors

#: Seconds for which a change waits while another program holds the database, before the sweep ends.
PATIENCE = 3_600.0
#: Changes in the buffer beyond which the sweep waits: an evaluation of a large stack takes about 0.1 MB.
MOST_BUFFERED = 2_000
#: Seconds of one attempt: of changes that the buffer may take, and of all others.
_BRIEFLY, _AT_ONCE = 0.2, 1.0
#: Seconds between two attempts to empty the buffer.
_RETRY = 1.0


class Database:
    """The database of a results folder, as the sweep that holds the folder's lock writes it; a context manager.

    Without an exception, leaving it waits until all changes are written; with one it says how many could not be.

    Args:
        folder: which must exist; its database is made if missing.
        say: takes a sentence for the user, when another program holds the database.

    Raises:
        UserError: the database cannot be read or written; all methods may raise it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._buffer: deque[tuple[Callable[[], object], Callable[[], object]]] = deque()
        self._busy_since: float | None = None
        self._tried = 0.0  # when the buffer was last to be emptied
        with user_errors(self._folder):
            self.connection = schema.connect(folder, create=True)

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._empty_patiently()
            else:
                with contextlib.suppress(UserError):  # the sweep has ended for another reason
                    self._empty(_AT_ONCE)
            if self._buffer:
                self._say(
                    f"{len(self._buffer)} changes could not be written to {self._folder / schema.FILE}; what they were "
                    "about is trained again"
                )
        finally:
            end_journal(self.connection)
            self.connection.close()

    def let_others_read(self) -> None:
        """Let other programs read, however long, while this one writes, where the file system can; until it closes."""
        begin_journal(self.connection, self._folder)

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        """Return the rows that a query finds, after all changes are written."""
        self._empty_patiently()
        with user_errors(self._folder):
            return self.connection.execute(sql, parameters).fetchall()

    def value(self, sql: str, *parameters: Any) -> Any:
        """Return the first value of the first row that a query finds; None where it finds none."""
        rows = self.rows(sql, *parameters)
        return rows[0][0] if rows else None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Begin a transaction, waiting for other programs, and commit it; all of it is rolled back on an exception."""
        self._empty_patiently()
        while not self._begin(_AT_ONCE):
            pass
        with self._committed():
            yield

    def soon(self, change: Callable[[], object], after: Callable[[], object] = lambda: None) -> None:
        """Make a change in a transaction, at once or, while another program holds the database, later, in order.

        Args:
            after: is called when the change is committed.
        """
        self._buffer.append((change, after))
        if len(self._buffer) > MOST_BUFFERED:
            self._empty_patiently()
        elif len(self._buffer) == 1 or time.monotonic() - self._tried >= _RETRY:
            self._empty(_BRIEFLY)

    def _empty_patiently(self) -> None:
        while self._buffer:
            self._empty(_AT_ONCE)

    def _empty(self, seconds: float) -> None:
        """Write the buffer in one transaction, unless another program holds the database for so many seconds."""
        if not self._buffer:
            return
        begun, self._tried = self._begin(seconds), time.monotonic()
        if not begun:
            return
        with self._committed():
            for change, _ in self._buffer:
                change()
        done = list(self._buffer)
        self._buffer.clear()
        for _, after in done:
            after()

    def _begin(self, seconds: float) -> bool:
        """Begin a transaction that no reader can hold up; return whether the database was free for it.

        Raises:
            UserError: another program has held it for too long.
        """
        with user_errors(self._folder):
            self.connection.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
            try:
                # With a rollback journal it is exclusive from its start: a reader would hold up the commit.
                self.connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                if self._busy_since is None:
                    self._busy_since = time.monotonic()
                    self._say(
                        f"another program holds {self._folder / schema.FILE} ({error}); the sweep goes on as far as it "
                        "can, and waits until that program closes it"
                    )
                if time.monotonic() - self._busy_since >= PATIENCE:
                    raise
                return False
        self._busy_since = None
        return True

    @contextlib.contextmanager
    def _committed(self) -> Iterator[None]:
        """Commit the transaction that has begun; roll it back on an exception."""
        with user_errors(self._folder):
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
