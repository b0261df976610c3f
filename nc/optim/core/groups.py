"""Param groups that report every write, so that the numbers on the device follow a schedule."""

import weakref
from collections.abc import Mapping
from typing import Any, Protocol


class Listener(Protocol):
    """Receives the writes into a group."""

    def _written(self, group: "Group", key: str, before: Any) -> None: ...


class Group(dict[str, Any]):
    """A param group, as a dict that reports writes.

    An optimizer that has been captured in a CUDA graph or compiled reads its hyperparameters from device memory, but
    learning rate schedules write floats into dicts; this one passes them on to the optimizer, its `listener`. `row` is
    the group's index among the param groups.
    """

    def __init__(self, items: Mapping[str, Any], listener: Listener) -> None:
        super().__init__(items)
        self.row = 0  # the stepper sets it
        # Weak, so that an optimizer and its states are freed with its last reference.
        self._listener = weakref.ref(listener)

    def _report(self, key: str, before: Any) -> None:
        if (listener := self._listener()) is not None:
            listener._written(self, key, before)

    def __setitem__(self, key: str, value: Any) -> None:
        before = self.get(key)
        super().__setitem__(key, value)
        self._report(key, before)

    def __delitem__(self, key: str) -> None:
        before = self[key]
        super().__delitem__(key)
        self._report(key, before)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "Group":  # type: ignore[override,misc]
        self.update(other)
        return self

    def pop(self, key: str, *default: Any) -> Any:
        before = super().pop(key, *default)
        self._report(key, before)
        return before

    def __reduce__(self) -> Any:  # copies and pickles are plain dicts, which an optimizer wraps again
        return dict, (dict(self),)
