"""How the report shows optimizers, also those that are not ncollapse's: a label, a colour and a kind of line for each.

An optimizer of the user's or of another package may be in the runs with several options. It is then shown as several
optimizers, named "NAME OPTIONS": an option such as `weight_decouple` makes another rule of it.
"""

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING

from ncollapse.formatting import options_text, read_json
from ncollapse.optimizer_table import FAMILY_COLOURS, FOREIGN_COLOURS, LABELS, OPTIMIZERS, row_of

if TYPE_CHECKING:
    import pandas as pd

#: CSS variable -> (colour on light ground, on dark ground).
PAGE_COLOURS = FAMILY_COLOURS | {f"other{i}": pair for i, pair in enumerate(FOREIGN_COLOURS, 1)}
#: Options of an optimizer beyond which it is shown as one, and its options as any other setting.
_MOST_VARIANTS = 6
#: Characters of a label.
_LONGEST = 40
_VARIANT = re.compile(r"([^:]*:[A-Za-z_][A-Za-z_0-9.]*|[A-Za-z_][\w.-]*) (\{.*\})", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Look:
    """How an optimizer is shown.

    Attributes:
        label: as tables and figures write it, another one for every optimizer of a report, unless it is cut.
        colour: in figures.
        family: the CSS variable of its colour.
        dashed: whether its line beside a table is dashed.
        foreign: it is not ncollapse's: whether its decay is coupled is not known.
    """

    label: str
    colour: str
    family: str
    dashed: bool
    foreign: bool


#: The looks that `shown` has chosen.
_CHOSEN: ContextVar[Mapping[str, Look]] = ContextVar("looks", default=MappingProxyType({}))


@contextlib.contextmanager
def shown(optimizers: Iterable[str]) -> Iterator[None]:
    """Choose the looks of all optimizers that are shown together, so that each has its own."""
    token = _CHOSEN.set(choose_looks(optimizers))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def look_of(optimizer: str) -> Look:
    """Return how an optimizer is shown; one that `shown` was not told of as if it were the only one."""
    return _CHOSEN.get().get(optimizer) or choose_looks([optimizer])[optimizer]


def choose_looks(optimizers: Iterable[str]) -> dict[str, Look]:
    """Return how optimizers are shown together. Beyond eight that are not ncollapse's, colours are used again."""
    names = sorted(set(optimizers))
    found = {}
    free: list[int] = []
    for name in names:
        row = row_of(name)
        if not row.foreign:
            found[name] = Look(row.label, row.colour, row.family, row.dashed, foreign=False)
            continue
        free = free or list(range(len(FOREIGN_COLOURS)))
        # The same in most reports: the one that its name stands for, if another one does not have it already.
        wanted = zlib.crc32(_base(name)[0].encode()) % len(FOREIGN_COLOURS)
        place = wanted if wanted in free else free[0]
        free.remove(place)
        label = _label(name, names)
        found[name] = Look(label, FOREIGN_COLOURS[place][0], f"other{place + 1}", dashed=False, foreign=True)
    return found


def base_of(name: str) -> str:
    """Return the setting `optimizer` of the runs that are shown by a name, which may have options at its end."""
    return _base(name)[0]


def _base(name: str) -> tuple[str, str]:
    """Return the name of an optimizer, and its options where these are part of the given one."""
    match = _VARIANT.fullmatch(name)
    return (match[1], match[2]) if match else (name, "")


def _label(name: str, names: Iterable[str]) -> str:
    base, own = _base(name)
    label = row_of(base).label
    bases = {_base(other)[0] for other in names} - {base}
    others = {row_of(other).label for other in bases if row_of(other).foreign} | set(LABELS.values())
    if label.casefold() in {other.casefold() for other in others}:
        label = base
    variants = [read_json(_base(other)[1]) or {} for other in names if _base(other)[0] == base]
    given = read_json(own) or {}
    same = {key for key in given if all(key in one and one[key] == given[key] for one in variants)}
    text = f"{label} {options_text({k: v for k, v in given.items() if k not in same})}".strip()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def ordered(optimizers: Iterable[str]) -> list[str]:
    """Sort optimizers, each once: those of the table of optimizers in its order, then the others by their labels."""
    known = {name: place for place, name in enumerate(OPTIMIZERS)}
    return sorted(set(optimizers), key=lambda name: (known.get(name, len(known)), look_of(name).label, name))


def with_variants(runs: "pd.DataFrame") -> "pd.DataFrame":
    """Return the runs with an optimizer for each of its options, for those that are not ncollapse's."""
    options = runs.groupby("optimizer").optimizer_options.agg(lambda texts: texts.nunique())
    several = [name for name, count in options.items() if 1 < count <= _MOST_VARIANTS and row_of(str(name)).foreign]
    chosen = runs.optimizer.isin(several)
    if not chosen.any():
        return runs
    names = (runs.optimizer + " " + runs.optimizer_options).str.strip()
    return runs.assign(optimizer=runs.optimizer.where(~chosen, names))


def about_lines(optimizers: Iterable[str]) -> str:
    """Say what the kinds of lines mean, for a caption."""
    return "Solid: weight decay coupled into the gradient; dashed: decoupled" + _about_others(optimizers, "dash-dotted")


def about_points(optimizers: Iterable[str]) -> str:
    """Say what the kinds of points mean, for a caption."""
    return "Discs: weight decay coupled into the gradient; diamonds: decoupled" + _about_others(optimizers, "triangles")


def _about_others(optimizers: Iterable[str], kind: str) -> str:
    others = any(look_of(name).foreign for name in optimizers)
    return f"; {kind}: optimizers that are not ncollapse's, with a decay of their own." if others else "."
