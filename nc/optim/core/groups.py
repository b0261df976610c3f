"""Param groups that report every write: settings are checked, and the numbers on the device follow a schedule."""

import weakref
from collections import UserDict
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from sys import getrefcount
from typing import Any, Protocol


class Listener(Protocol):
    """Is asked before a write into a group, and told after it."""

    def _writing(self, group: "Group", key: str, value: Any) -> None: ...
    def _written(self, group: "Group", key: str) -> None: ...


class Group(UserDict[str, Any], dict[str, Any]):  # type: ignore[misc]  # UserDict's methods, for whoever asks for a dict
    """A param group: a view of a user's own dict that reports writes.

    An optimizer that has been captured in a CUDA graph or compiled reads its hyperparameters from device memory, but
    learning rate schedules write floats into dicts; this one passes them on to the optimizer, its `listener`. As in
    `torch.optim`, the dict that was given to `add_param_group` stays the group: reads and writes go to it. What is
    written into that dict itself, or into a list in it, the optimizer notices at its next step, but not a replay.

    Attributes:
        data: the user's dict.
        taken: the settings as the optimizer last took them over, of a list its items.
        loose: whether the settings may have changed without a report: a key was deleted, or one holds a list.
        row: the group's index among the param groups.
    """

    def __init__(self, items: dict[str, Any], listener: Listener) -> None:
        self.data = items
        self.take_all()
        self.row = 0  # the stepper sets it
        # Weak, so that an optimizer and its states are freed with its last reference.
        self._listener = weakref.ref(listener)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if (listener := self._listener()) is None:
            self.data[key] = value
            return
        listener._writing(self, key, value)
        self.data[key] = value
        listener._written(self, key)

    def __delitem__(self, key: str) -> None:
        del self.data[key]  # a report comes when it is set again; a step without it fails
        self.loose = True

    def take(self, key: str) -> None:
        """Note that the optimizer has taken over a setting."""
        value = self.data[key]
        listed = isinstance(value, list) and key not in ("params", "param_names")
        self.taken[key] = tuple(value) if listed else value
        self.loose |= listed

    def take_all(self) -> None:
        """Note that the optimizer has taken over all settings."""
        self.taken: dict[str, Any] = {}
        self.loose = False
        for key in self.data:
            self.take(key)

    def changes(self) -> list[str]:
        """The keys of settings that are not those taken. By identity: an equal tensor may change later."""
        if len(self.data) == len(self.taken) and all(map(is_, self.data.values(), self.taken.values())):
            return []
        return [key for key, value in self.data.items() if not _same(self.taken.get(key, _MISSING), value)]

    # Copies and pickles are plain dicts, which an optimizer wraps again.

    def __copy__(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self.data)

    def __reduce__(self) -> Any:
        return dict, (dict(self.data),)

    def __or__(self, other: Any) -> Any:
        return self.data | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | self.data


def _same(taken: Any, value: Any) -> bool:
    if isinstance(value, list) and isinstance(taken, tuple):
        return len(taken) == len(value) and all(map(is_, taken, value))
    return taken is value


def _holders(groups: Sequence[Group]) -> list[int]:
    return list(map(getrefcount, [group.data for group in groups]))


class _Nobody:
    def _writing(self, group: Group, key: str, value: Any) -> None: ...
    def _written(self, group: Group, key: str) -> None: ...


_MISSING = object()
# References to the dict of a group that nobody else holds. A step looks at the settings of the other groups only.
_ALONE = _holders([Group({}, _Nobody())])[0]


def report_to(groups: Sequence[dict[str, Any]], listener: Listener) -> bool:
    """Whether all of these are groups, of this listener."""
    own = repeat(weakref.ref(listener))
    return all(map(is_, map(getattr, groups, repeat("_listener"), repeat(None)), own))


def not_alone(groups: Sequence[Group]) -> list[Group]:
    """The groups whose settings may have changed without a report: others hold their dict or a list in it."""
    return [group for group, n in zip(groups, _holders(groups), strict=True) if n > _ALONE or group.loose]
