"""Models, data, optimizers, losses and metrics of the user's: found by the names that settings have, and versioned.

A name is FILE.py:NAME, package.module:NAME, for data FILE.npz, or one that was given in Python. A file is identified by
a hash of its text and of the modules beside it that it imports, a package by its version, what was given in Python by a
hash of its source. Other processes get the text of the files, and what was given in Python by cloudpickle.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from ncollapse.train.config import NAMED, RunConfig, is_own
from ncollapse.train.errors import OwnCodeError, UserError, is_installed
from ncollapse.train.results.provenance import package_version

_MOST_BYTES = 2**20
#: Packages whose version is in the record of every session anyway, and is not that of the user's code.
_OURS = ("torch", "ncollapse")


@dataclasses.dataclass(frozen=True)
class CodeVersion:
    """A version of the user's code: a hash or the version of a package, and the text of a file."""

    version: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of the user's: where it was found, and its text with that of the modules beside it that it imports."""

    path: Path
    sources: tuple[tuple[str, str], ...]  # (name of the file, text); the file itself is the first

    @property
    def version(self) -> CodeVersion:
        digest = hashlib.sha256(repr([self.sources[0][1], *sorted(self.sources[1:])]).encode()).hexdigest()[:12]
        return CodeVersion(digest, "\n".join(text for _, text in self.sources))


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
        self._modules: dict[str, ModuleType] = {}  # not sent
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

        self._folder, self._files, self._modules = state["folder"], state["files"], {}
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
        for setting, name in names.items():
            if not name.endswith(".npz"):
                self.find(setting, name)
        found = {key: one.version for setting, name in names.items() for key, one in self.versions(setting, name)}
        return "; ".join(f"{key}={version}" for key, version in sorted(found.items()))

    def versions(self, kind: str, name: str) -> list[tuple[str, CodeVersion]]:
        """Return the file, package or given name that a name needs, with its version; none for an .npz or torch."""
        if name in (given := self._given.get(kind, {})):
            return [(name, _version_given(given[name]))]
        place, separator, _ = name.rpartition(":")
        if not separator:
            if name.endswith(".npz"):
                return []
            raise UserError(f"{kind} {name!r} was given in Python: train these runs from there")
        module = self._module(kind, place)
        if place.endswith(".py"):
            return [(Path(place).as_posix(), self._files[place].version)]
        top = module.__name__.partition(".")[0]
        if top in _OURS:
            return []
        for distribution in packages_distributions().get(top, ()):
            return [(distribution, CodeVersion(package_version(distribution) or "unknown"))]
        source = _source_of(module)
        return [(top, CodeVersion(_digest(source), source))]

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
        except Exception as error:
            raise OwnCodeError.of(f"{kind} {name}", error) from None

    def _load_file(self, kind: str, name: str) -> ModuleType:
        known = self._files.get(name)
        path = self._path_of(known) if known else self.path(name)
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{kind} {path}: more than {_MOST_BYTES:,} bytes: no Python of yours")
        folder = str(path.parent.absolute())
        if folder not in sys.path:
            sys.path.append(folder)
        before = set(sys.modules)
        module = _import_file(kind, path)
        if known is None:
            beside = [_source_file(sys.modules[n]) for n in sorted(set(sys.modules) - before) if n != module.__name__]
            texts = [
                (file.relative_to(folder).as_posix(), file.read_text("utf-8"))
                for file in beside
                if file is not None and file.is_relative_to(folder) and not is_installed(file)
            ]
            self._files[name] = _File(path.absolute(), ((path.name, path.read_text("utf-8")), *texts))
        return module

    @staticmethod
    def _path_of(file: _File) -> Path:
        """Return where the file is on this machine; where it is not, or another version of it, write it."""
        try:
            there = all((file.path.parent / name).read_text("utf-8") == text for name, text in file.sources)
        except (OSError, UnicodeDecodeError):
            there = False
        if there:
            return file.path
        folder = Path(tempfile.mkdtemp(prefix="ncollapse-code-"))
        for name, text in file.sources:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        return folder / file.sources[0][0]


def with_code(run: Callable[..., RunConfig], plugins: Plugins, settings: Mapping[str, Any]) -> RunConfig:
    """Make a run of settings, with the versions of the user's code that they name."""
    own = {
        setting: name
        for setting, names in NAMED.items()
        if isinstance(name := settings.get(setting), str) and name not in names and plugins.may_know(setting, name)
    }
    return run({**settings, "code": plugins.code_of(own)} if own else {**settings, "code": ""})


def _import_file(kind: str, path: Path) -> ModuleType:
    name = f"ncollapse_own_{_digest(str(path.absolute()))}_{path.stem}"
    try:
        text = path.read_text("utf-8")
        code = compile(text, str(path), "exec", dont_inherit=True)
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
    except Exception as error:
        del sys.modules[name]
        raise OwnCodeError.of(f"{kind} {path}", error) from None
    return module


def _names(module: Any) -> str:
    names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return ", ".join(names[:20]) or "no functions or classes"


def _version_given(value: Any) -> CodeVersion:
    top = getattr(value, "__module__", "") or ""
    for distribution in packages_distributions().get(top.partition(".")[0], ()):
        return CodeVersion(f"{distribution}-{package_version(distribution)}")
    source = _source_of(value)
    return CodeVersion(_digest(source) if source else "unknown", source)


def _source_of(value: Any) -> str:
    value = getattr(value, "func", value)  # functools.partial
    if not (inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value)):
        value = type(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _source_file(module: Any) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file) if isinstance(file, str) and file.endswith(".py") else None


def _line_of(value: Any) -> str:
    value = getattr(value, "func", value)
    try:
        file, (_, line) = inspect.getsourcefile(value), inspect.getsourcelines(value)
    except (OSError, TypeError):
        return ""
    return f"{Path(file).name}, line {line}" if file else ""
