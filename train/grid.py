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

Model, data, optimizer and loss may be the user's own (`plugins.py`); their options are tables of values and lists:

    model = "mine.py:WideNet"
    optimizer = ["adamw", "pytorch_optimizer:SOAP"]
    metrics = ["mine.py:margin"]      # measured too; the one list that is no axis
    in_memory = false                 # data that do not fit are read from disk while they are used

    [model_options]
    depth = [3, 5]                    # an axis
    [optimizer_options."pytorch_optimizer:SOAP"]
    precondition_frequency = [1, 10]  # an axis of the runs with this optimizer

The border of images may be a table of data sets, the others of which have none:

    pad = {mnist = 2, fashion-mnist = 2}

Nothing of a file is believed: its size and depth and the number of its runs are bounded, every table and key is known,
every value has exactly the type of its setting, and the name can be that of a folder.
"""

import dataclasses
import functools
import itertools
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ncollapse.optimizer_table import OPTIMIZERS
from ncollapse.train.config import (
    DATA_SETS,
    GIVEN,
    NAMED,
    RunConfig,
    canonical_options,
    make_run,
    short,
    takes_options,
    unknown,
    unknown_key,
)
from ncollapse.train.errors import UserError
from ncollapse.train.plugins import Plugins, with_code
from ncollapse.train.results.code_version import CodeVersion

_TOP_LEVEL = ("name", "description", "grid", "run", "metrics", "in_memory")
_SETTINGS = frozenset(field.name for field in GIVEN)
#: Settings whose options are a table: `model_options` of model, ….
_OPTIONS = {f"{setting}_options": setting for setting in NAMED}
#: Bounds on a file, in bytes, on the runs of a grid, and on the characters of its name and its description.
_MOST_BYTES, _MOST_RUNS, _LONGEST_NAME, _LONGEST_DESCRIPTION = 2**18, 200_000, 100, 10_000


@dataclasses.dataclass(frozen=True)
class Grid:
    """A named list of different runs.

    Attributes:
        notes: sentences for the user about how it came about.
        plugins: the user's code that its runs and metrics name.
        metrics: names of the user's metrics, which are measured too.
        in_memory: whether data sets are held in memory; else they are read while they are used.
    """

    name: str
    runs: tuple[RunConfig, ...]
    description: str = ""
    notes: tuple[str, ...] = ()
    plugins: Plugins = dataclasses.field(default_factory=Plugins, compare=False, repr=False)
    metrics: tuple[str, ...] = ()
    in_memory: bool = True

    def __post_init__(self) -> None:
        repeated = [run.describe() for run, n in Counter(self.runs).items() if n > 1]
        if repeated:
            raise UserError(f"grid {self.name!r}: the same run occurs more than once: {'; '.join(repeated[:5])}")
        if not self.runs:
            raise UserError(f"grid {self.name!r} has no runs")

    @functools.cached_property
    def versions(self) -> dict[str, CodeVersion]:
        """The files, packages and given names of the user's code, with their versions."""
        names = {pair for run in self.runs for pair in run.own.items()} | {("metric", name) for name in self.metrics}
        return {key: one for setting, name in sorted(names) for key, one in self.plugins.versions(setting, name)}


def presets() -> dict[str, str]:
    """Return the grids that come with the package, sorted: name -> TOML text."""
    found = [file for file in (files("ncollapse.train") / "grids").iterdir() if file.name.endswith(".toml")]
    return dict(sorted((file.name.removesuffix(".toml"), file.read_text("utf-8")) for file in found))


def load_grid(source: str, overrides: Mapping[str, list[Any]] | None = None, plugins: Plugins | None = None) -> Grid:
    """Read a grid from a TOML file, or a preset by its name; `overrides` replace values in every table of it.

    Where tables differ in a value that is replaced, the grid has a note: what they said together is then taken apart.

    Args:
        plugins: the user's code; by default files are looked for beside the grid's.

    Raises:
        UserError: unreadable, too large or too deep a file, bad TOML, unknown keys or tables, values of another type or
            out of range, an empty axis, too many or duplicate runs, a name that cannot be that of a folder; code of
            the user's that cannot be imported.
    """
    tree, where = _read(source)
    return make_grid(tree, where, Path(source).stem, overrides, plugins or plugins_beside(source))


def plugins_beside(source: str | None) -> Plugins:
    """Return the user's code beside a grid's file; beside a preset or None, in the current folder."""
    return Plugins(Path() if source is None or source in presets() else Path(source).parent)


def make_grid(
    tree: Mapping[str, Any], where: str, stem: str, overrides: Mapping[str, list[Any]] | None = None,
    plugins: Plugins | None = None,
) -> Grid:  # fmt: skip
    """Make a grid of what a file says; `where` names it in messages, `stem` is its name by default; as `load_grid`."""
    plugins = plugins or Plugins()
    shared = {key: value for key, value in tree.items() if key not in _TOP_LEVEL}
    tables = tree.get("grid", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{where}: 'grid' must be tables, each begun with [[grid]]")
    name, description = tree.get("name", stem), tree.get("description", "")
    check_name(name, f"{where}: name")
    if not isinstance(description, str) or len(description) > _LONGEST_DESCRIPTION:
        raise UserError(
            f"{where}: description = {short(description)} must be text of at most {_LONGEST_DESCRIPTION:,} characters"
        )
    metrics, in_memory = tree.get("metrics", []), tree.get("in_memory", True)
    if not isinstance(metrics, list) or not all(isinstance(metric, str) for metric in metrics):
        raise UserError(f'{where}: metrics = {short(metrics)}: it is a list of names, as in ["mine.py:margin"]')
    if not isinstance(in_memory, bool):
        raise UserError(f"{where}: in_memory = {short(in_memory)}: it is true or false")
    runs: list[RunConfig] = []
    for number, table in enumerate(tables, 1):
        place = f"{where}, [[grid]] {number}" if "grid" in tree else where
        runs += _product({**shared, **table, **(overrides or {})}, place, _MOST_RUNS - len(runs), plugins)
    if overrides:  # which can make runs of several tables equal: each is trained once
        runs = list(dict.fromkeys(runs))
    notes = tuple(_crossed(tables, overrides or {}))
    return Grid(name, tuple(runs), description, notes, plugins, tuple(dict.fromkeys(metrics)), in_memory)


def _crossed(tables: Sequence[Mapping[str, Any]], overrides: Mapping[str, list[Any]]) -> Iterator[str]:
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
    for key in _OPTIONS.keys() & shared.keys():
        shared[key] = _without_lists(shared[key])  # which are axes
    settings = _plain(table)
    optimizer = {"optimizer": RunConfig().optimizer, **shared, **settings, **given}["optimizer"]
    of_optimizer = table.get(optimizer, {}) if isinstance(optimizer, str) else {}
    return _with_border(_with_options({**shared, **settings, **of_optimizer, **given}))


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a `[run]`, options included, without its tables for one optimizer."""
    return {key: value for key, value in table.items() if key in _OPTIONS or not isinstance(value, dict)}


def _without_lists(options: Any) -> Any:
    if not isinstance(options, dict):
        return options
    return {key: _without_lists(value) for key, value in options.items() if not isinstance(value, list)}


def _with_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of one run, whose tables of options have those of its own model, data set, … alone."""
    for key, setting in _OPTIONS.items():
        if isinstance(options := settings.get(key), dict):
            name = settings.get(setting, getattr(RunConfig(), setting))
            shared = {option: value for option, value in options.items() if not isinstance(value, dict)}
            own = options.get(name, {}) if isinstance(name, str) else {}
            takes = isinstance(name, str) and takes_options(setting, name)
            settings = {**settings, key: ({**shared, **own} if takes or shared == options else own)}
    return settings


def _with_border(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of one run, whose `pad`, if it is a table of data sets, is that of its own."""
    of_sets = settings.get("pad")
    if not isinstance(of_sets, dict):
        return settings
    name = settings.get("data", RunConfig().data)
    return {**settings, "pad": of_sets.get(name, 0) if isinstance(name, str) else 0}


def _read(source: str) -> tuple[dict[str, Any], str]:
    """Return the TOML tree of a file or a preset, whose `[run]` has been checked, and its name for messages."""
    known = presets()
    where = f"preset {source}" if source in known else source
    if source in known and Path(source).is_file():
        raise UserError(f"{source} is both a preset and a file here: give ./{source} for the file, or rename it")
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
    settings = _plain(table)
    make_run(_with_options(settings), f"{where}, [run]")
    for name, of_optimizer in table.items():
        if isinstance(of_optimizer, dict) and name not in _OPTIONS:
            if name not in OPTIMIZERS and ":" not in name:
                raise UserError(f"{where}, [run]: " + unknown("optimizer", name, OPTIMIZERS))
            make_run(_with_options({**settings, "optimizer": name, **of_optimizer}), f"{where}, [run.{name}]")


def _product(table: dict[str, Any], where: str, most: int, plugins: Plugins) -> list[RunConfig]:
    """Return the runs of a table; raise UserError where there are more than `most`."""
    strange = [key for key in table if key not in _SETTINGS]
    if strange:
        raise UserError(f"{where}: " + "; ".join(unknown_key(key, tuple({*_TOP_LEVEL} - {key})) for key in strange[:5]))
    options = {key: table[key] for key in _OPTIONS if isinstance(table.get(key), dict)}
    axes = {key: value if isinstance(value, list) else [value] for key, value in table.items() if key not in options}
    empty = [key for key, values in axes.items() if not values]
    if empty:
        raise UserError(f"{where}: {', '.join(empty)} has no values; give at least one or leave the key out")
    if isinstance(borders := table.get("pad"), dict):
        known = [*DATA_SETS, *(name for name in axes.get("data", ()) if isinstance(name, str))]
        for name in borders.keys() - known:
            raise UserError(f"{where}, pad: " + unknown("data set", name, known))
    names = {setting: axes.get(setting, [getattr(RunConfig(), setting)]) for setting in NAMED}
    texts_of = {key: _by_name(key, given, names[_OPTIONS[key]], f"{where}, [{key}]") for key, given in options.items()}
    runs: list[RunConfig] = []
    total = 0
    if math.prod(map(len, axes.values())) > most:
        raise UserError(f"{where}: the grid has more than {_MOST_RUNS:,} runs; divide it into several")
    losses = len(axes.get("loss", [None])) > 1
    for values in itertools.product(*axes.values()):
        settings = _with_border(dict(zip(axes, values, strict=True)))
        if losses and settings["loss"] != "cross_entropy":
            settings.pop("label_smoothing", None)  # an axis of the cross-entropy alone
        chosen = {key: str(settings.get(_OPTIONS[key], names[_OPTIONS[key]][0])) for key in texts_of}
        texts = [of.get(chosen[key], [""]) for key, of in texts_of.items()]
        total += math.prod(map(len, texts))
        if total > most:
            raise UserError(f"{where}: the grid has more than {_MOST_RUNS:,} runs; divide it into several")
        for combined in itertools.product(*texts):
            found = settings | dict(zip(texts_of, combined, strict=True))
            runs.append(make_run(with_code(found, plugins), where))
    return list(dict.fromkeys(runs)) if losses else runs


def _by_name(key: str, options: dict[str, Any], names: list[Any], where: str) -> dict[str, list[str]]:
    """Return, for each model (data set, …) of a grid, all combinations of its options, as JSON.

    Values of the table are for all that take options, those of a table within it for one.
    """
    names = [name for name in names if isinstance(name, str)]  # `make_run` says what is wrong with others
    for name, of_one in options.items():
        if isinstance(of_one, dict) and name not in names:
            raise UserError(f"{where}: {short(name)} is none of {', '.join(names)}")
    shared = {key: value for key, value in options.items() if not isinstance(value, dict)}
    takes = {name for name in names if takes_options(_OPTIONS[key], name)}
    if shared and names and not takes:
        raise UserError(f"{where}: none of {', '.join(names)} takes options")
    found: dict[str, list[str]] = {}
    for name in names:
        axes = (shared if name in takes else {}) | options.get(name, {})
        lists = {option: value if isinstance(value, list) else [value] for option, value in axes.items()}
        if empty := [option for option, values in lists.items() if not values]:
            raise UserError(f"{where}: {', '.join(empty)} has no values; give at least one or leave the key out")
        if math.prod(map(len, lists.values())) > _MOST_RUNS:
            raise UserError(f"{where}: the grid has more than {_MOST_RUNS:,} runs; divide it into several")
        try:
            found[name] = [
                canonical_options(dict(zip(lists, values, strict=True)))
                for values in itertools.product(*lists.values())
            ]
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return found
