"""The settings of a run as options of the command line: one value of each, or several."""

import dataclasses
from types import GenericAlias, NoneType
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from tyro import conf

from ncollapse.train.config import DESCRIPTIONS, GIVEN, RunConfig


def _options(name: str, several: bool) -> Any:
    """Make a dictionary type with a key for each field of `RunConfig`, of one value or several; it holds those given.

    Only types are checked by it. `make_run` checks values later; its messages name the grid and the key.
    """
    kinds = get_type_hints(RunConfig)

    def argument(f: dataclasses.Field[Any]) -> Any:
        kind, of = kinds[f.name], get_args(kinds[f.name])
        kind = of[0] if NoneType in of else kind
        one = "{" + ",".join(of) + "}" if get_origin(kind) is Literal else kind.__name__.upper()
        default = "" if several or f.default in (None, "") else f"(default: {f.default})"
        text = conf.arg(help=DESCRIPTIONS[f.name], help_behavior_hint=default, metavar=one + several * " ...")
        return Annotated[GenericAlias(tuple, (kind, ...)) if several else kind, text]

    typed_dict: Any = TypedDict
    return typed_dict(name, {f.name: argument(f) for f in GIVEN}, total=False)


OneOfEach: Any = _options("settings", several=False)
SeveralOfEach: Any = _options("axes", several=True)
