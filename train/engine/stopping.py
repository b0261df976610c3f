"""A request to stop a sweep at checkpoints: a signal of a batch system, or a limit of time."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: Batch systems send SIGTERM some seconds before they kill a job; SIGUSR1 is what users have them send minutes before.
_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopRequest:
    """Whether a sweep was asked to stop; `reason` says by what, empty until then.

    A sweep that trains then stops at the end of every stack's epoch, with checkpoints. A signal ends it at once, by
    KeyboardInterrupt, where nothing trains yet, and where it is the second one.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._stop_training: Callable[[], None] | None = None

    @contextlib.contextmanager
    def listening(self, minutes: float | None = None) -> Iterator[None]:
        """Take signals, in the main thread, and the end of so many minutes as requests."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
                before[number] = signal.signal(number, self._signalled)
        timer = None if minutes is None else threading.Timer(60 * minutes, self._time_is_over, (minutes,))
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def training(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call `stop` at a request while training, at once where there was one before."""
        self._stop_training = stop
        if self.reason:
            stop()
        try:
            yield
        finally:
            self._stop_training = None

    def _signalled(self, number: int, frame: object) -> None:
        again = bool(self.reason)
        self.reason = signal.Signals(number).name
        if again or self._stop_training is None:
            raise KeyboardInterrupt
        self._stop_training()

    def _time_is_over(self, minutes: float) -> None:
        self.reason = self.reason or f"--minutes {minutes:g}"
        if (stop := self._stop_training) is not None:
            stop()
