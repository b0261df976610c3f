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
"""

import dataclasses
import itertools
import tomllib
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from ncollapse.train.config import FIELDS, RunConfig, make_run, unknown_key
from ncollapse.train.errors import UserError

_TOP_LEVEL = ("name", "description", "grid", "run")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A named list of different runs."""

    name: str
    runs: tuple[RunConfig, ...]
    description: str = ""

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

    Raises:
        UserError: unreadable file, bad TOML, unknown keys, values out of range, an empty axis, duplicate runs.
    """
    tree, where = _read(source)
    shared = {key: value for key, value in tree.items() if key not in _TOP_LEVEL}
    tables = tree.get("grid", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{where}: 'grid' must be tables, each begun with [[grid]]")
    runs: list[RunConfig] = []
    for number, table in enumerate(tables, 1):
        place = f"{where}, [[grid]] {number}" if "grid" in tree else where
        runs += _product({**shared, **table, **(overrides or {})}, place)
    if overrides:  # which can make runs of several tables equal: each is trained once
        runs = list(dict.fromkeys(runs))
    return Grid(str(tree.get("name", Path(where).stem)), tuple(runs), str(tree.get("description", "")))


def run_settings(source: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a single run: the grid's values that are no lists, then `[run]`, then those given.

    Raises:
        UserError: as in `load_grid`; the grid has no `[run]`.
    """
    tree, where = _read(source)
    table = tree.get("run")
    if not isinstance(table, dict):
        with_run = ", ".join(name for name, text in presets().items() if "run" in tomllib.loads(text))
        raise UserError(f"{where} does not say what its single run is: it has no [run]; presets that do: {with_run}")
    shared = {key: value for key, value in tree.items() if key not in _TOP_LEVEL and not isinstance(value, list)}
    settings = {key: value for key, value in table.items() if not isinstance(value, dict)}
    optimizer = given.get("optimizer") or settings.get("optimizer") or shared.get("optimizer") or RunConfig().optimizer
    return {**shared, **settings, **table.get(optimizer, {}), **given}


def _read(source: str) -> tuple[dict[str, Any], str]:
    """Return the TOML tree of a file or a preset, and its name for messages."""
    known = presets()
    where = f"preset {source}" if source in known else source
    try:
        return tomllib.loads(known[source] if source in known else Path(source).read_text("utf-8")), where
    except (OSError, UnicodeDecodeError) as error:
        neither = f"it is neither a file nor a preset ({', '.join(known)})"
        raise UserError(f"cannot read the grid {source!r}: {error}; {neither}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None


def _product(table: dict[str, Any], where: str) -> list[RunConfig]:
    unknown = [key for key in table if key not in {f.name for f in FIELDS}]
    if unknown:
        raise UserError(f"{where}: " + "; ".join(unknown_key(key, _TOP_LEVEL) for key in unknown))
    axes = {key: value if isinstance(value, list) else [value] for key, value in table.items()}
    empty = [key for key, values in axes.items() if not values]
    if empty:
        raise UserError(f"{where}: {', '.join(empty)} has no values; give at least one or leave the key out")
    return [make_run(dict(zip(axes, values, strict=True)), where) for values in itertools.product(*axes.values())]
