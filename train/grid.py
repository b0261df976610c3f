"""A grid: the runs of a sweep, read from a small TOML file and all checked before the first one starts.

    name = "demo"
    model = "mlp"                     # a value: the same in every run
    epochs = 200

    [[grid]]                          # each table is the full product of its lists; values above are its defaults
    optimizer = ["sgd", "sgdw"]
    lr = [0.03, 0.1]
    weight_decay = [5e-4, 5e-3]

    [[grid]]
    optimizer = ["adam", "adamw"]
    lr = [1e-3, 3e-3]

    [run]                             # settings of a single run (`ncollapse run --preset`), in place of the lists
    weight_decay = 5e-4

    [run.adam]                        # the same for one optimizer
    lr = 1e-3

The keys are the fields of `RunConfig`. Without a `[[grid]]` table the top level itself is the product.

Nothing of a file is believed: its size and depth and the number of its runs are bounded, every table and key is known,
every value has exactly the type of its setting, and the name can be that of a folder.
"""

import dataclasses
import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from ncollapse.train.config import FIELDS, RunConfig, make_run, short, unknown, unknown_key
from ncollapse.train.errors import UserError
from ncollapse.train.optimizers import OPTIMIZERS

_TOP_LEVEL = ("name", "description", "grid", "run")
_SETTINGS = frozenset(field.name for field in FIELDS)
#: Bounds on a file, in bytes, on the runs of a grid, and on the characters of its name and its description.
_MOST_BYTES, _MOST_RUNS, _LONGEST_NAME, _LONGEST_DESCRIPTION = 2**18, 200_000, 100, 10_000


@dataclasses.dataclass(frozen=True)
class Grid:
    """A named list of different runs; `notes` are sentences for the user about how it came about."""

    name: str
    runs: tuple[RunConfig, ...]
    description: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        repeated = [run.describe() for run, n in Counter(self.runs).items() if n > 1]
        if repeated:
            raise UserError(f"grid {self.name!r}: the same run occurs more than once: {'; '.join(repeated[:5])}")
        if not self.runs:
            raise UserError(f"grid {self.name!r} has no runs")


def presets() -> dict[str, str]:
    """Return the grids that come with the package, sorted: name -> TOML text."""
    found = [file for file in (files("ncollapse.train") / "grids").iterdir() if file.name.endswith(".toml")]
    return dict(sorted((file.name.removesuffix(".toml"), file.read_text("utf-8")) for file in found))


def load_grid(source: str, overrides: dict[str, list[Any]] | None = None) -> Grid:
    """Read a grid from a TOML file, or a preset by its name; `overrides` replace values in every table of it.

    Where tables differ in a value that is replaced, the grid has a note: what they said together is then taken apart.

    Raises:
        UserError: unreadable, too large or too deep a file, bad TOML, unknown keys or tables, values of another type or
            out of range, an empty axis, too many or duplicate runs, a name that cannot be that of a folder.
    """
    tree, where = _read(source)
    shared = {key: value for key, value in tree.items() if key not in _TOP_LEVEL}
    tables = tree.get("grid", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{where}: 'grid' must be tables, each begun with [[grid]]")
    name, description = tree.get("name", Path(source).stem), tree.get("description", "")
    check_name(name, f"{where}: name")
    if not isinstance(description, str) or len(description) > _LONGEST_DESCRIPTION:
        raise UserError(
            f"{where}: description = {short(description)} must be text of at most {_LONGEST_DESCRIPTION:,} characters"
        )
    runs: list[RunConfig] = []
    for number, table in enumerate(tables, 1):
        place = f"{where}, [[grid]] {number}" if "grid" in tree else where
        runs += _product({**shared, **table, **(overrides or {})}, place, _MOST_RUNS - len(runs))
    if overrides:  # which can make runs of several tables equal: each is trained once
        runs = list(dict.fromkeys(runs))
    return Grid(name, tuple(runs), description, tuple(_crossed(tables, overrides or {})))


def _crossed(tables: list[dict[str, Any]], overrides: dict[str, list[Any]]) -> Iterator[str]:
    """Yield a sentence for each option that is combined with tables which differ in it."""
    for key in overrides:
        values = [table.get(key) for table in tables]
        if any(value != values[0] for value in values):
            option, first = key.replace("_", "-"), overrides[key][0]
            yield (
                f"--{option} replaces {key} in each of the {len(tables)} [[grid]] tables, which differ in it: each "
                "value is combined with all other settings of every table. To train a part of the grid as it is, give "
                f'--where "{key}={first}" instead'
            )


def check_name(name: object, what: str) -> None:
    """Raise UserError, about `what`, for a name that cannot be that of a results folder on every system.

    It would decide where results go: "../x" is another folder, an absolute path is any.
    """
    ok = isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and name.isprintable()
    if not ok or name != str(name).strip() or str(name).startswith(".") or set(str(name)) & set('/\\:*?"<>|'):
        raise UserError(
            f"{what} = {short(name)} cannot be the name of a results folder: give 1 to {_LONGEST_NAME} printable "
            'characters, none of /\\:*?"<>|, that begin with no dot and neither begin nor end with a space'
        )


def run_settings(source: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a single run: the grid's values that are no lists, then `[run]`, then those given.

    Raises:
        UserError: as in `load_grid`; the grid has no `[run]`.
    """
    tree, where = _read(source)
    table = tree.get("run")
    if table is None:
        with_run = ", ".join(name for name, text in presets().items() if "run" in tomllib.loads(text))
        raise UserError(f"{where} does not say what its single run is: it has no [run]; presets that do: {with_run}")
    shared = {key: value for key, value in tree.items() if key not in _TOP_LEVEL and not isinstance(value, list)}
    settings = {key: value for key, value in table.items() if not isinstance(value, dict)}
    optimizer = {"optimizer": RunConfig().optimizer, **shared, **settings, **given}["optimizer"]
    if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:  # `make_run` says what is wrong with it
        return {**shared, **settings, **given}
    return {**shared, **settings, **table.get(optimizer, {}), **given}


def _read(source: str) -> tuple[dict[str, Any], str]:
    """Return the TOML tree of a file or a preset, whose `[run]` has been checked, and its name for messages."""
    known = presets()
    where = f"preset {source}" if source in known else source
    try:
        tree = tomllib.loads(known[source] if source in known else _read_text(Path(source)))
    except OSError as error:
        neither = f"it is neither a file nor a preset ({', '.join(known)})"
        raise UserError(f"cannot read the grid {source!r}: {error}; {neither}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: a grid is text in UTF-8, this is not: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not a grid: its lists or tables are nested too deeply") from None
    except ValueError as error:  # bad TOML, or an integer of thousands of digits
        raise UserError(f"{where}: not valid TOML: {error}") from None
    _check_run(tree.get("run", {}), where)
    return tree, where


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device may never end
        raise OSError(f"{path} is not a file")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: more than {_MOST_BYTES:,} bytes: not a grid")
    return content.decode("utf-8-sig")


def _check_run(table: Any, where: str) -> None:
    """Raise UserError for a `[run]` with unknown tables or keys, or with values that are not allowed."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: run = {short(table)}: it must be a table, begun with [run]")
    settings = {key: value for key, value in table.items() if not isinstance(value, dict)}
    make_run(settings, f"{where}, [run]")
    for name, of_optimizer in table.items():
        if isinstance(of_optimizer, dict):
            if name not in OPTIMIZERS:
                raise UserError(f"{where}, [run]: " + unknown("optimizer", name, OPTIMIZERS))
            make_run({**settings, **of_optimizer}, f"{where}, [run.{name}]")


def _product(table: dict[str, Any], where: str, most: int) -> list[RunConfig]:
    """Return the runs of a table; raise UserError where there are more than `most`."""
    strange = [key for key in table if key not in _SETTINGS]
    if strange:
        raise UserError(f"{where}: " + "; ".join(unknown_key(key, tuple({*_TOP_LEVEL} - {key})) for key in strange[:5]))
    axes = {key: value if isinstance(value, list) else [value] for key, value in table.items()}
    empty = [key for key, values in axes.items() if not values]
    if empty:
        raise UserError(f"{where}: {', '.join(empty)} has no values; give at least one or leave the key out")
    if math.prod(map(len, axes.values())) > most:
        raise UserError(f"{where}: the grid has more than {_MOST_RUNS:,} runs; divide it into several")
    return [make_run(dict(zip(axes, values, strict=True)), where) for values in itertools.product(*axes.values())]
