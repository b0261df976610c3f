"""Models, data, optimizers, losses and metrics of the user's: found by the names that settings have, and versioned.

A name is FILE.py:NAME, package.module:NAME, for data FILE.npz, or one that was given in Python. Its version is in the
id of every run that uses it (`results/code_version.py`). Other processes get the text of the files, and what was given
in Python by cloudpickle.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from ncollapse.train.config import NAMED, given_key, is_own
from ncollapse.train.errors import OwnCodeError, UserError, is_installed
from ncollapse.train.results.code_version import (
    CodeVersion,
    digest,
    files_of,
    of_given,
    of_module,
    of_sources,
    read_source,
)

_MOST_BYTES = 2**20
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of the user's: where it was found, and its text with that of the modules beside it that it imports."""

    path: Path
    sources: dict[str, str]  # name beside the file -> text; the file itself is the first


class Plugins:
    """The user's code of a sweep: what names of a kind, a setting of `NAMED` or "metric", stand for.

    Args:
        folder: in which files are looked for, before the current one.
        given: kind -> name -> what was given in Python: a factory, a class or a function.
    """

    def __init__(self, folder: Path = Path(), given: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._folder = folder.absolute()
        self._given: dict[str, dict[str, Any]] = {kind: dict(named) for kind, named in (given or {}).items()}
        self._files: dict[str, _File] = {}  # name of the file -> the file; sent to other processes
        self._modules: dict[str, ModuleType] = {}  # these are not sent
        self._versions: dict[tuple[str, str], list[tuple[str, CodeVersion]]] = {}
        self.found: dict[Any, Any] = {}  # what functions with `kept_with_plugins` have found
        for kind, named in self._given.items():
            for name, value in named.items():
                if kind in NAMED and not is_own(kind, name):
                    raise UserError(f"{kind} {name!r} comes with ncollapse: give yours another name")
                if not callable(value) and kind != "data":
                    raise UserError(f"{kind} {name!r} must be a function or a class; got {value!r}")

    def __getstate__(self) -> dict[str, Any]:
        import cloudpickle

        return {"folder": self._folder, "given": cloudpickle.dumps(self._given), "files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import cloudpickle

        self._folder, self._files = state["folder"], state["files"]
        self._modules, self._versions, self.found = {}, {}, {}
        self._given = cloudpickle.loads(state["given"])

    def may_know(self, kind: str, name: str) -> bool:
        """Return whether a name is of a file or module, or was given; any other is a mistake in a setting."""
        return name in self._given.get(kind, {}) or ":" in name or name.endswith(".npz")

    def find(self, kind: str, name: str) -> Any:
        """Return what a name stands for.

        Raises:
            UserError: no such file, module or name in it.
            OwnCodeError: the file raises an error when it is imported.
        """
        if name in (given := self._given.get(kind, {})):
            return given[name]
        place, separator, attribute = name.rpartition(":")
        if not separator:
            raise UserError(f"{kind} {name!r} was given in Python: train these runs from there")
        found: Any = self._module(kind, place)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise UserError(f"{kind} {name}: {place} has no {attribute!r}; it has {_names(found)}")
            found = getattr(found, part)
        if not callable(found):
            raise UserError(f"{kind} {name}: {attribute} is a {type(found).__name__}, not a function or a class")
        return found

    def path(self, name: str) -> Path:
        """Return the path of a file of the user's, relative to the folder of the grid or to the current one.

        Raises:
            UserError: it is in neither.
        """
        for folder in (self._folder, Path.cwd()):
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"no file {name} in {self._folder}" + ("" if self._folder == Path.cwd() else " or here"))

    def code_of(self, names: Mapping[str, str]) -> str:
        """Return the setting `code` of a run, from the settings that name code of the user's; errors as in `find`."""
        found = {key: one.version for setting, name in names.items() for key, one in self.versions(setting, name)}
        return "; ".join(f"{key}={version}" for key, version in sorted(found.items()))

    def versions(self, kind: str, name: str) -> list[tuple[str, CodeVersion]]:
        """Return the file, module, package or given name that a name needs, with its version; errors as in `find`.

        None for an .npz file and for torch, whose versions are kept otherwise.
        """
        if (kind, name) not in self._versions:
            self._versions[kind, name] = self._find_versions(kind, name)
        return self._versions[kind, name]

    def _find_versions(self, kind: str, name: str) -> list[tuple[str, CodeVersion]]:
        if name.endswith(".npz"):
            return []
        found, place = self.find(kind, name), name.rpartition(":")[0]
        if not place:
            # The fingerprint of data tells what they are.
            return [(given_key(kind, name), of_given(found) if callable(found) else CodeVersion("given"))]
        if place.endswith(".py"):
            return [(Path(place).as_posix(), of_sources(self._files[place].sources))]
        known = of_module(self._module(kind, place))
        return [] if known is None else [known]

    def where(self, kind: str, name: str) -> str:
        """Return where a name is defined, for messages: "mine.py, line 12"; the name itself where that is not known."""
        return _line_of(self.find(kind, name)) or name

    def _module(self, kind: str, place: str) -> ModuleType:
        if place not in self._modules:
            load = self._load_file if place.endswith(".py") else self._load_module
            self._modules[place] = load(kind, place)
        return self._modules[place]

    def _load_module(self, kind: str, name: str) -> ModuleType:
        for folder in (str(self._folder), str(Path.cwd())):
            if folder not in sys.path:
                sys.path.append(folder)
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise OwnCodeError.of(f"{kind} {name}", error) from None
            raise UserError(f"{kind} {name}: there is no module {error.name!r}; is its package installed?") from None
        except (Exception, SystemExit) as error:
            raise OwnCodeError.of(f"{kind} {name}", error) from None

    def _load_file(self, kind: str, name: str) -> ModuleType:
        known = self._files.get(name)
        path = (_path_of(known) if known else self.path(name)).absolute()
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{kind} {path}: more than {_MOST_BYTES:,} bytes: no Python of yours")
        files = files_of(path, path.parent)
        with _importing_from(path.parent, files):
            module = _import_file(kind, path)
        if known is None:
            self._files[name] = _File(path, {beside: read_source(file) for beside, file in files.items()})
        return module


def with_code(settings: Mapping[str, Any], plugins: Plugins) -> dict[str, Any]:
    """Return the settings of a run with `code`: the versions of the user's code that they name."""
    own = {
        setting: name
        for setting, names in NAMED.items()
        if isinstance(name := settings.get(setting), str) and name not in names and plugins.may_know(setting, name)
    }
    return {**settings, "code": plugins.code_of(own) if own else ""}


def metric_name(name: str) -> str:
    """Return the name that a metric has in the results: "margin" for "mine.py:margin"."""
    return name.rpartition(":")[2].rpartition(".")[2]


def metric_names(metrics: Iterable[str]) -> dict[str, str]:
    """Return metrics as the results have them: "margin" -> "mine.py:margin".

    Raises:
        UserError: two have one name.
    """
    found: dict[str, str] = {}
    for full in metrics:
        if (other := found.setdefault(metric_name(full), full)) != full:
            raise UserError(f"metrics {other} and {full}: both are called {metric_name(full)}; give one another name")
    return found


def kept_with_plugins(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have a function whose last argument is `Plugins` compute each result once, as long as these live."""

    signature = inspect.signature(function)

    @functools.wraps(function)
    def kept(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        *key, plugins = bound.arguments.values()
        assert isinstance(plugins, Plugins)
        place = (function.__qualname__, *key)
        if place not in plugins.found:
            plugins.found[place] = function(*args, **kwargs)
        found: _T = plugins.found[place]
        return found

    return kept


def _path_of(file: _File) -> Path:
    """Return where a file is on this machine; where it is not, or another version of it, write it."""
    try:
        there = all(read_source(file.path.parent / name) == text for name, text in file.sources.items())
    except (OSError, UnicodeDecodeError):
        there = False
    if there:
        return file.path
    folder = Path(tempfile.mkdtemp(prefix="ncollapse-code-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, text in file.sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder / next(iter(file.sources))


@contextlib.contextmanager
def _importing_from(folder: Path, files: Mapping[str, Path]) -> Iterator[None]:
    """Have modules beside a file be imported from its folder, also where others of their names were imported before."""
    for name, path in list(files.items())[1:]:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        before = getattr(sys.modules.get(module), "__file__", None)
        if before is not None and not is_installed(Path(before)) and _differs(sys.modules[module], path):
            del sys.modules[module]
    with contextlib.suppress(ValueError):
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.path.append(str(folder))  # functions may import later, and no module there hides one of a package
    for name, path in list(files.items())[1:]:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module in sys.modules:
            _IMPORTED[module] = str(path), read_source(path)


#: Module beside a file of the user's -> its path and text when it was imported.
_IMPORTED: dict[str, tuple[str, str]] = {}


def _differs(module: ModuleType, path: Path) -> bool:
    """Return whether a module that was imported is of another file, or the file has changed."""
    known = _IMPORTED.get(module.__name__)
    return str(module.__file__) != str(path) or (known is not None and known != (str(path), read_source(path)))


def _import_file(kind: str, path: Path) -> ModuleType:
    name = f"ncollapse_own_{digest(str(path))}_{path.stem}"
    try:
        code = compile(read_source(path), str(path), "exec", dont_inherit=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{kind} {path}: Python is text in UTF-8, this is not: {error}") from None
    except SyntaxError as error:
        raise UserError(f"{kind} {path}, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # null bytes; nested too deeply
        raise UserError(f"{kind} {path}: no Python: {error}") from None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise OwnCodeError.of(f"{kind} {path}", error) from None
    return module


def _names(module: Any) -> str:
    known = getattr(module, "__dict__", None) or dir(module)  # in the order of the file, where there is one
    names = [name for name in known if not name.startswith("_") and callable(getattr(module, name, None))]
    return ", ".join(names[:20]) or "no functions or classes"


def _line_of(value: Any) -> str:
    value = getattr(value, "func", value)
    try:
        file, (_, line) = inspect.getsourcefile(value), inspect.getsourcelines(value)
    except (OSError, TypeError):
        return ""
    return f"{Path(file).name}, line {line}" if file else ""
