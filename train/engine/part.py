"""A part of a grid: the runs that satisfy conditions (`--where`), or a fair share of all (`--shard`)."""

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ncollapse.train.config import FIELDS, RunConfig, make_run, short, unknown
from ncollapse.train.engine.grouping import StackKey, group
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid

_CONDITION = re.compile(r"(\w+)\s*(!=|<=|>=|=|<|>)\s*([^\s<>=!]+)")
_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_KEYS = [field.name for field in FIELDS]
_TEXTS = frozenset(field.name for field in FIELDS if isinstance(field.default, str))


@dataclasses.dataclass(frozen=True)
class Condition:
    """A key, how it is compared, and with what: one of several values for = and !=, a number otherwise."""

    key: str
    comparison: str
    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Return whether a value satisfies it; one that is None is equal to none alone, and neither less nor more."""
        if self.comparison in ("=", "!="):
            return (value in self.values) == (self.comparison == "=")
        return value is not None and _COMPARE[self.comparison](value, self.values[0])


def parse_where(text: str, also: Mapping[str, Sequence[str]] | None = None) -> list[Condition]:
    """Read conditions on runs, all of which must hold: "optimizer=adam,adamw lr<0.1".

    Args:
        also: keys that are no settings -> the values that they have.

    Raises:
        UserError: something that is no condition, an unknown key, or a value that the key cannot have.
    """
    rest = _CONDITION.sub("", text).strip()
    if rest or not text.strip():
        raise UserError(
            f"--where {short(text)}: {short(rest)} is no condition; write them as in "
            '--where "optimizer=adam,adamw lr<0.1"; they are = != < <= > >='
        )
    return [_condition(found[1], found[2], found[3], also or {}) for found in _CONDITION.finditer(text)]


def _condition(key: str, comparison: str, text: str, also: Mapping[str, Sequence[str]]) -> Condition:
    values: list[Any] = text.split(",")
    if key in also:
        for value in values:
            if value not in also[key]:
                raise UserError("--where: " + unknown(key, value, also[key]))
    elif key not in _KEYS:
        raise UserError("--where: " + unknown("key", key, [*_KEYS, *also]))
    elif key in _TEXTS:
        for value in values:
            make_run({key: value}, "--where")
    else:
        values = [_number(key, value) for value in values]
        if comparison in ("=", "!=") or (len(values) == 1 and values[0] is not None):
            return Condition(key, comparison, tuple(values))
    if comparison not in ("=", "!="):
        raise UserError(f"--where: {key}{comparison}{text}: {comparison} compares a number with one number")
    return Condition(key, comparison, tuple(values))


def _number(key: str, text: str) -> float | None:
    try:
        return None if text == "none" else int(text) if text.isdigit() else float(text)
    except ValueError:
        raise UserError(f"--where: {key} is a number, or none; got {short(text)}") from None


def matching(runs: Iterable[RunConfig], conditions: Sequence[Condition]) -> list[RunConfig]:
    """Return the runs whose settings satisfy all conditions."""
    return [run for run in runs if all(one.holds(getattr(run, one.key)) for one in conditions)]


def part_of(grid: Grid, where: str) -> Grid:
    """Return the grid with those of its runs that satisfy the conditions.

    Raises:
        UserError: see `parse_where`; no run does.
    """
    runs = matching(grid.runs, parse_where(where))
    if not runs:
        raise UserError(f"--where {short(where)}: none of the {len(grid.runs)} runs of {grid.name}")
    return dataclasses.replace(grid, runs=tuple(runs))


def shard_of(grid: Grid, shard: str) -> Grid:
    """Return share i of n of a grid, written "i/n" with i from 1 to n; the n shares together are the grid.

    Each share has as many runs as the others, to one, of every optimizer, model and data set, with the other settings
    drawn at random: by the ids of the runs, so that all machines agree.

    Raises:
        UserError: no such share, or one without runs.
    """
    found = _SHARD.fullmatch(shard)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--shard {short(shard)}: give I/N with I from 1 to N, as in --shard 3/8")
    runs = [
        run
        for members in group(grid.runs, lambda run: (StackKey.of(run), run.optimizer)).values()
        for run in sorted(members, key=lambda run: run.id)
    ]
    mine = frozenset(run.id for run in runs[number - 1 :: count])
    if not mine:
        raise UserError(f"--shard {shard}: {grid.name} has only {len(runs)} runs; give at most as many shares")
    name = f"{grid.name}-shard-{number}-of-{count}"
    return dataclasses.replace(grid, name=name, runs=tuple(run for run in grid.runs if run.id in mine))
