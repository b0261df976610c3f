"""Data of the user's by their name: a function in a file or a package, an .npz file, or what was given in Python."""

import inspect
import json
import zipfile
from typing import Any

import numpy as np

from ncollapse.train.data.map_style import class_names, is_map_style, read_all
from ncollapse.train.data.own import Data
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.errors import OwnCodeError, UserError, blamed
from ncollapse.train.limits import available_memory
from ncollapse.train.plugins import Plugins

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_RESULTS = "Data(…), (x, y, x_test, y_test), or a pair (train, test) of data sets of pairs (x, label)"


def find_own(name: str, options: str, plugins: Plugins, *, in_memory: bool) -> tuple[Data | Streamed, str]:
    """Return the data that a name stands for, and their name for messages.

    Args:
        options: arguments of the function, as JSON.
        in_memory: whether to read data sets into memory; else stream them.

    Raises:
        OwnCodeError: the user's code raises an error.
        UserError: no such file or name, arguments that are missing or not known, data that cannot be used.
    """
    arguments = json.loads(options or "{}")
    what = f"data {name}"
    if name.endswith(".npz"):
        given, read = (lambda: _of_file(name, plugins)), "an .npz file"
    else:
        found = plugins.find("data", name)
        where = plugins.where("data", name) if callable(found) else name
        what += f" ({where})" if where != name else ""
        given, read = (lambda: found), "data given in Python"
        if callable(found):
            return _used(_call(found, arguments, name, what), what, in_memory=in_memory), what
    if arguments:
        raise UserError(f"{what}: data_options are arguments of a function; {read} takes none")
    return _used(given(), what, in_memory=in_memory), what


def _call(function: Any, arguments: dict[str, Any], name: str, what: str) -> Any:
    try:
        inspect.signature(function).bind(**arguments)
    except ValueError:  # compiled code has no signature
        pass
    except TypeError as error:
        takes = str(inspect.signature(function))[:200]
        raise UserError(f"{what}: {error}; data_options are its arguments, it takes {takes}") from None
    try:
        return function(**arguments)
    except UserError as error:  # of `Data`
        raise UserError(f"data {name}: {blamed(error).replace('UserError: ', '', 1)}") from None
    except (Exception, SystemExit) as error:
        raise OwnCodeError.of(f"data {name}", error) from None


def _used(found: Any, what: str, *, in_memory: bool) -> Data | Streamed:
    """Return data of what a function returns."""
    pair = isinstance(found, tuple | list) and len(found) == 2
    if pair and all(map(is_map_style, found)):
        train, test = found
        return _read(train, test, what) if in_memory else Streamed.of(train, test, what)
    if pair and all(isinstance(part, tuple | list) and len(part) == 2 for part in found):
        found = (*found[0], *found[1])
    if not isinstance(found, Data):
        if not isinstance(found, tuple | list) or len(found) != 4:
            raise UserError(f"{what} is {_described(found)}; it must be {_RESULTS}")
        found = _checked(what, *found)
    if not in_memory:
        raise UserError(
            f"{what}: in_memory = false streams a pair (train, test) of data sets; these are in memory: leave it out"
        )
    return found


def _read(train: Any, test: Any, what: str) -> Data:
    (x, y), (x_test, y_test) = read_all(train, f"{what}, training data"), read_all(test, f"{what}, test data")
    return _checked(what, x, y, x_test, y_test, class_names(train, test, what))


def _checked(what: str, *parts: Any) -> Data:
    try:
        return Data(*parts)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def _described(found: Any) -> str:
    kinds = f" of {', '.join(type(part).__name__ for part in found[:5])}" if isinstance(found, tuple | list) else ""
    return f"a {type(found).__name__}{kinds}"


def _of_file(name: str, plugins: Plugins) -> Data:
    """Read an .npz file with x_train, y_train, x_test, y_test, and perhaps classes."""
    path = plugins.path(name)
    try:
        with zipfile.ZipFile(path) as archive:
            needed, free = sum(part.file_size for part in archive.infolist()), available_memory()
        if needed > free:
            raise UserError(f"data {path}: {needed / 2**30:.1f} GiB, of {free / 2**30:.1f} that are free")
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file]
            if missing:
                has = ", ".join(file.files[:10]) or "nothing"
                raise UserError(f"data {path}: no {', '.join(missing)}; the file has {has}")
            arrays = {key: file[key] for key in (*_KEYS, "classes") if key in file}
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"data {path}: there is no memory for its arrays") from None
    except Exception as error:  # whatever decoding a damaged file raises
        raise UserError(f"data {path}: not an .npz file of arrays: {str(error) or type(error).__name__}") from None
    return _checked(f"data {path}", *(arrays[key] for key in _KEYS), arrays.get("classes"))
