"""Ctrl-C in the middle of a sweep."""

from typing import Any

import pytest

from ncollapse.train.engine import this_machine


def interrupt_after(events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C after `events` messages of training."""
    real, left = this_machine.train_stack, events

    def interrupted(*args: Any) -> object:
        nonlocal left
        for event in real(*args):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield event

    monkeypatch.setattr(this_machine, "train_stack", interrupted)
