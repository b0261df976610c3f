"""Param groups that report every write: settings are checked, and the numbers on the device follow a schedule."""

import weakref
from collections import UserDict
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
        taken: the settings as the optimizer last took them over.
        row: the group's index among the param groups.
    """

    def __init__(self, items: dict[str, Any], listener: Listener) -> None:
        self.data = items
        self.taken = {key: frozen(key, value) for key, value in items.items()}
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

    # Copies and pickles are plain dicts, which an optimizer wraps again.

    def __copy__(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self.data)

    def __reduce__(self) -> Any:
        return dict, (dict(self.data),)

    def __or__(self, other: Any) -> Any:
        return self.data | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | self.data


def frozen(key: str, value: Any) -> Any:
    """A setting as it is now: of a list, which may be written to, its items."""
    return tuple(value) if isinstance(value, list) and key not in ("params", "param_names") else value


def changed(before: Any, value: Any) -> bool:
    """Whether a setting is not the one `before`, a result of `frozen`. By identity: a tensor may change later."""
    if isinstance(value, list) and isinstance(before, tuple):
        return len(before) != len(value) or any(a is not b for a, b in zip(before, value, strict=True))
    return before is not value
