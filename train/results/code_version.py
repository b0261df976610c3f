"""Versions of code of the user's: of a file with the modules beside it, of a package, of what was given in Python."""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import sys
import types
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

from ncollapse.train.errors import is_installed
from ncollapse.train.results.provenance import package_version

#: Packages whose version is in the record of every session anyway, and is not that of the user's code.
_OURS = ("torch", "ncollapse")


@dataclasses.dataclass(frozen=True)
class CodeVersion:
    """A version of the user's code: a hash or the version of a package, and the text of its files."""

    version: str
    source: str = ""


def digest(text: str) -> str:
    """Return 12 hexadecimal digits: a hash of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_source(path: Path) -> str:
    """Read a file of Python, with or without a byte order mark; raises UnicodeDecodeError and OSError."""
    return path.read_text("utf-8-sig")


def of_sources(sources: Mapping[str, str]) -> CodeVersion:
    """Return the version of some files, name -> text; the first is the one that was named."""
    text, *_ = sources.values()
    others = list(sources.items())[1:]
    return CodeVersion(digest(repr([text, *sorted(others)])), "\n".join(sources.values()))


def files_of(path: Path, root: Path) -> dict[str, Path]:
    """Return a file and the modules below `root` that it imports, and those import, name below `root` -> path.

    They are found in the text, so that nothing depends on what this process has imported before.
    """
    found: dict[str, Path] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop(0)
        name = file.relative_to(root).as_posix()
        if name in found:
            continue
        found[name] = file
        try:
            tree = ast.parse(read_source(file))
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue  # importing it says what is wrong
        waiting += (there for module in _imported(tree, file, root) for there in _places(module, root))
    return found


def _imported(tree: ast.AST, file: Path, root: Path) -> Iterator[str]:
    """Yield the names of the modules that a file may import: package.module, package.module.name."""
    package = file.parent.relative_to(root).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def _places(module: str, root: Path) -> Iterator[Path]:
    """Yield the files below `root` that are run when a module is imported."""
    parts = module.split(".")
    for i in range(len(parts)):
        place = root.joinpath(*parts[: i + 1])
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file() and not is_installed(file):
                yield file


def of_module(module: types.ModuleType) -> tuple[str, CodeVersion] | None:
    """Return what a module is known by, and its version; None where that of every session is enough."""
    top = module.__name__.partition(".")[0]
    if top in _OURS:
        return None
    file = getattr(module, "__file__", None)
    if not (name := installed_as(top)):
        return module.__name__, _of_local(module, Path(file)) if file else CodeVersion("unknown")
    return name, CodeVersion(package_version(name) or "unknown")


def _of_local(module: types.ModuleType, file: Path) -> CodeVersion:
    """Return the version of a module that is in no installed package, of its text and what it imports beside it."""
    depth = module.__name__.count(".") + (file.name == "__init__.py")
    root = file.absolute().parents[depth]
    return of_sources({name: read_source(path) for name, path in files_of(file.absolute(), root).items()})


@functools.cache  # it reads the metadata of every package
def installed_as(top: str) -> str:
    """Return the installed package that a module at the top level is of; "" for none, or an editable one."""
    for name in _packages().get(top, ()):
        try:
            if not _is_editable(distribution(name)):
                return name
        except PackageNotFoundError:
            continue
    return ""


@functools.cache
def _packages() -> Mapping[str, list[str]]:
    return packages_distributions()


def _is_editable(of: Distribution) -> bool:
    try:
        return bool(json.loads(of.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False


def of_given(value: Any) -> CodeVersion:
    """Return the version of what was given in Python: of its code and of the arguments that it holds.

    Code of a module in a file is known by the file and the modules beside it; that of a notebook or script by its own
    text and that of the functions and classes of the notebook that it uses.
    """
    seen: dict[int, tuple[str, Any]] = {}
    sources: list[str] = []
    return CodeVersion(digest(_described(value, seen, sources)), "\n".join(dict.fromkeys(sources)))


def _described(value: Any, seen: dict[int, tuple[str, Any]], sources: list[str]) -> str:
    """Describe a value so that equal descriptions mean equal code and arguments."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if id(value) in seen:
        return seen[id(value)][0]
    seen[id(value)] = f"again {len(seen)}", value  # which must live, or another value gets its id

    def of(part: Any) -> str:
        return _described(part, seen, sources)

    if isinstance(value, functools.partial):
        return f"partial {of(value.func)} {of(value.args)} {of(value.keywords)}"
    if isinstance(value, types.MethodType):
        return f"method {of(value.__func__)} {of(value.__self__)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} {[(of(key), of(one)) for key, one in value.items()]}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} {[of(one) for one in value]}"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} {sorted(of(one) for one in value)}"
    if isinstance(value, types.FunctionType):
        return _function(value, of, sources)
    if isinstance(value, type):
        return _class(value, of, sources)
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return f"{type(value).__name__} {value.__name__}"
    if hasattr(value, "__array__"):
        import numpy as np

        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        content = np.ascontiguousarray(array).tobytes() if array.dtype != object else repr(array).encode()
        return f"array {array.dtype} {array.shape} {hashlib.sha256(content).hexdigest()}"
    return f"object {of(type(value))} {of(dict(getattr(value, '__dict__', {})))}"


def _function(value: types.FunctionType, of: Any, sources: list[str]) -> str:
    cells = [_content(cell) for cell in value.__closure__ or ()]
    held = of([cells, value.__defaults__, value.__kwdefaults__])
    if place := _place(value):
        return f"{place} {value.__qualname__} {held}"
    text = _source(value) or repr(_code(value.__code__))
    sources.append(text)
    used = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
    return f"function {text} {held} {[of(one) for one in used if _is_beside(one, value.__module__)]}"


def _class(value: type, of: Any, sources: list[str]) -> str:
    if place := _place(value):
        return f"{place} {value.__qualname__}"
    text = _source(value)
    sources += filter(None, [text])
    # The methods too: they use other functions and classes of the notebook, and a notebook may not have the text.
    members = {name: one for name, one in vars(value).items() if not (name.startswith("__") and not callable(one))}
    described = {name: of(getattr(one, "__func__", one)) for name, one in members.items() if _is_code(one)}
    values = {name: repr(one) for name, one in members.items() if isinstance(one, bool | int | float | str | None)}
    return f"class {text} {described} {values} {[of(base) for base in value.__bases__]}"


def _is_code(value: Any) -> bool:
    return isinstance(getattr(value, "__func__", value), types.FunctionType)


def _place(value: Any) -> str:
    """Return how the module is known that a function or class is of; "" for one of a notebook or script."""
    module = sys.modules.get(getattr(value, "__module__", "") or "")
    if module is None or module.__name__ == "__main__":
        return ""
    if (known := of_module(module)) is None:
        return module.__name__
    name, version = known
    return version.version if getattr(module, "__file__", None) else f"{name}={version.version}"


def _is_beside(value: Any, module: str) -> bool:
    return isinstance(value, types.FunctionType | type) and value.__module__ == module


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _code(code: types.CodeType) -> list[Any]:
    """Return what code does, in values with a stable representation."""
    inner: list[Any] = []
    for one in code.co_consts:
        is_set = isinstance(one, frozenset)  # whose order depends on the process
        inner.append(_code(one) if isinstance(one, types.CodeType) else sorted(map(repr, one)) if is_set else repr(one))
    return [code.co_code.hex(), code.co_names, inner]


def _names(code: types.CodeType) -> list[str]:
    """Return the global names that code uses, in order."""
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""
