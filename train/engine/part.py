"""A part of a grid: the runs that satisfy conditions (`--where`), or a fair share of all (`--shard`)."""

import dataclasses
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ncollapse.train.config import FIELDS, NAMED, RunConfig, canonical_options, make_run, short, unknown
from ncollapse.train.engine.grouping import StackKey, group
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid

#: A value: options as JSON, with one mapping within another at most; text between quotes; or a word.
_VALUE = r"""\{(?:[^{}]|\{[^{}]*\})*\}|"[^"]*"|'[^']*'|[^\s<>=!,"'{}]+"""
_CONDITION = re.compile(rf"(\w+)\s*(!=|<=|>=|=|<|>)\s*((?:{_VALUE})(?:,(?:{_VALUE}))*)")
_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_KEYS = [field.name for field in FIELDS]
_TEXTS = frozenset(field.name for field in FIELDS if isinstance(field.default, str))
_OPTIONS = frozenset(f"{setting}_options" for setting in NAMED)
#: Texts that may be anything.
_FREE = ("head", "code")


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


def parse_where(
    text: str, also: Mapping[str, Sequence[str]] | None = None, runs: Iterable[RunConfig] = ()
) -> list[Condition]:
    """Read conditions on runs, all of which must hold: "optimizer=adam,torch.optim:NAdam lr<0.1".

    Options are JSON, model_options={"depth": 3}; a text with spaces, commas or = stands between quotes.

    Args:
        also: keys that are no settings -> the values that they have.
        runs: whose names that were given in Python may be values too.

    Raises:
        UserError: something that is no condition, an unknown key, or a value that the key cannot have.
    """
    rest = _CONDITION.sub("", text).strip()
    if rest or not text.strip():
        raise UserError(
            f"--where {short(text)}: {short(rest)} is no condition; write them as in "
            '--where "optimizer=adam,adamw lr<0.1"; they are = != < <= > >='
        )
    given = {(setting, name) for run in runs for setting, name in run.own.items()}
    return [_condition(found[1], found[2], found[3], also or {}, given) for found in _CONDITION.finditer(text)]


def _condition(
    key: str, comparison: str, text: str, also: Mapping[str, Sequence[str]], given: Collection[tuple[str, str]]
) -> Condition:
    values: list[Any] = [one[1:-1] if one[0] in "\"'" else one for one in re.findall(_VALUE, text)]
    if key in also:
        for value in values:
            if value not in also[key]:
                raise UserError("--where: " + unknown(key, value, also[key]))
    elif key not in _KEYS:
        raise UserError("--where: " + unknown("key", key, [*_KEYS, *also]))
    elif key in _OPTIONS:
        values = [_options(key, value) for value in values]
    elif key in _TEXTS:
        for value in values:
            if key not in _FREE and (key, value) not in given:
                make_run({key: value}, "--where")
    else:
        values = [_number(key, value) for value in values]
        if comparison in ("=", "!=") or (len(values) == 1 and values[0] is not None):
            return Condition(key, comparison, tuple(values))
    if comparison not in ("=", "!="):
        raise UserError(f"--where: {key}{comparison}{text}: {comparison} compares a number with one number")
    return Condition(key, comparison, tuple(values))


def _options(key: str, text: str) -> str:
    try:
        return canonical_options(text)
    except ValueError as error:
        raise UserError(f"--where: {key} = {short(text)}: {error}") from None


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
    runs = matching(grid.runs, parse_where(where, runs=grid.runs))
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
