"""Param groups that tell of every write, so that the numbers on the device follow what a schedule sets."""

import weakref
from collections.abc import Mapping
from typing import Any, Protocol


class Listener(Protocol):
    """Who wants to know."""

    def _written(self, group: "Group", key: str, before: Any) -> None: ...


class Group(dict[str, Any]):
    """A param group: a dict, to everyone who reads or writes it.

    An optimizer that has been captured in a CUDA graph or compiled takes its hyperparameters from device memory.
    Learning rate schedules write floats into dicts; this one passes them on.
    """

    def __init__(self, items: Mapping[str, Any], listener: Listener, row: int) -> None:
        super().__init__(items)
        #: Its place among the param groups.
        self.row = row
        # Weak, so that an optimizer goes with its last user and its states with it.
        self._listener = weakref.ref(listener)

    def _tell(self, key: str, before: Any) -> None:
        if (listener := self._listener()) is not None:
            listener._written(self, key, before)

    def __setitem__(self, key: str, value: Any) -> None:
        before = self.get(key)
        super().__setitem__(key, value)
        self._tell(key, before)

    def __delitem__(self, key: str) -> None:
        before = self[key]
        super().__delitem__(key)
        self._tell(key, before)

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
        self._tell(key, before)
        return before

    def __reduce__(self) -> Any:  # copies and pickles are plain dicts, until an optimizer takes them over
        return dict, (dict(self),)
