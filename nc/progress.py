"""A progress bar for a pass over the data."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
# Seconds after which a pass is long enough for a bar that nobody asked for.
_PATIENCE = 3.0


def tracked(batches: Iterable[T], total: int | None, show: bool | None, title: str = "measure") -> Iterator[T]:
    """Yield the batches, with a progress bar on stderr.

    Args:
        total: how many there are, if known.
        show: None: if stderr is a terminal and the pass takes longer than some seconds.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from batches
        return
    from rich.console import Console  # slow to import
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=show is None)
    task = bar.add_task(title, total=total)
    start = time.monotonic()
    try:
        for batch in batches:
            if not bar.live.is_started and (show or time.monotonic() - start > _PATIENCE):
                bar.start()
            yield batch
            bar.advance(task)
    finally:
        if bar.live.is_started:
            bar.stop()
