"""Versions of the user's code in a results folder: those that its runs were made with, and those accepted later.

The entry "code KEY" of `meta`, for a file, a package or a name given in Python, is JSON: `version`, which the ids of
the folder's runs have; `accepted`, later versions that count as the same; `source`, the text of the last of them all.
Texts are compared with those of today, and never run.
"""

import dataclasses
import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ncollapse.formatting import read_json
from ncollapse.train.config import RunConfig, short
from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.formatting import visible
from ncollapse.train.results.own_metrics import SOURCE
from ncollapse.train.results.reader import load_meta
from ncollapse.train.results.schema import FILE
from ncollapse.train.results.storage_errors import damaged

if TYPE_CHECKING:
    from ncollapse.train.results.code_version import CodeVersion
    from ncollapse.train.results.writer import Store

_PREFIX = "code "
#: Bytes of a source beyond which it is not kept; versions that are accepted of one file, at most.
_MOST_BYTES, _MOST_ACCEPTED = 2**20, 1_000
#: Lines of a difference that a message shows, characters of each, and lines from the first difference on in which
#: further ones are looked for.
_SHOWN, _WIDE, _COMPARED = 6, 100, 60


@dataclasses.dataclass(frozen=True)
class KeptCode:
    """What a folder knows of a file, package or given name: see above."""

    version: str
    accepted: tuple[str, ...] = ()
    source: str = ""

    @property
    def last(self) -> str:
        """The version that `source` is of."""
        return self.accepted[-1] if self.accepted else self.version

    def knows(self, version: str) -> bool:
        """Return whether the folder's runs count as those of a version."""
        return version in (self.version, *self.accepted)

    def accepting(self, new: "CodeVersion") -> "KeptCode":
        """Return the same with another version that counts."""
        return KeptCode(self.version, (*self.accepted, new.version)[-_MOST_ACCEPTED:], _bounded(new.source))

    def as_json(self) -> str:
        """Return the entry for `meta`."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: object) -> "KeptCode":
        """Read an entry of `meta`.

        Raises:
            ValueError: it is none.
        """
        kept = read_json(text)
        if not isinstance(kept, dict) or not isinstance(kept.get("accepted"), list):
            raise ValueError("it cannot be read")
        texts = [kept.get("version"), kept.get("source"), *kept["accepted"]]
        if not all(isinstance(one, str) for one in texts):
            raise ValueError("a version or its source is no text")
        return KeptCode(kept["version"], tuple(kept["accepted"]), _bounded(kept["source"]))


def code_key(key: object) -> str:
    """Return what an entry of `meta` knows the code of; empty where it is about something else."""
    return key.removeprefix(_PREFIX) if isinstance(key, str) and key.startswith(_PREFIX) else ""


def code_problem(text: object) -> str:
    """Return what is wrong with an entry of `meta` on code; empty where it is whole."""
    try:
        KeptCode.from_json(text)
    except ValueError as error:
        return str(error)
    return ""


def kept_code(meta: Mapping[str, str], folder: Path) -> dict[str, KeptCode]:
    """Return what a folder's table `meta` knows of the user's code, by file, package or given name.

    Raises:
        DamageError: an entry that cannot be read.
    """
    found = {}
    for key, text in meta.items():
        if name := code_key(key):
            try:
                found[name] = KeptCode.from_json(text)
            except ValueError as error:
                raise damaged(folder / FILE, f"what it knows of {short(name)}: {error}") from None
    return found


def adopt_code(
    runs: Sequence[RunConfig], versions: Mapping[str, "CodeVersion"], folder: Path, accept: bool
) -> tuple[tuple[RunConfig, ...], list[str]]:
    """Return the runs of a grid as a folder has them, where its code counts as that of today; before it is opened.

    A run of an accepted version has in `code`, and so in its id, the version with which the folder's runs were made.

    Args:
        versions: file, package or given name -> its version of today.
        accept: whether a version that the folder does not know counts from now on; `record_code` records it.

    Returns:
        The runs, and a sentence on each version that is accepted now.

    Raises:
        UserError: a version that the folder does not know; the message says what differs.
        DamageError: see `load_meta`.
    """
    try:
        kept = kept_code(load_meta(folder), folder)
    except NoResultsError:
        return tuple(runs), []
    changed = {key: kept[key] for key in versions.keys() & kept.keys() if kept[key].version != versions[key].version}
    new = {key: one for key, one in sorted(changed.items()) if not one.knows(versions[key].version)}
    if new and not accept:
        what = "; ".join(_difference(key, one, versions[key]) for key, one in new.items())
        raise UserError(
            f"{folder}: {what}. Its runs would not be comparable: give the earlier version back, --accept-changes to "
            "go on all the same (it is recorded), or another --out"
        )
    notes = [
        f"{key} has changed since the runs of {folder} were begun ({one.last} then, {versions[key].version} now): "
        "accepted; runs that have ended stay as they are"
        for key, one in new.items()
    ]
    originals = {(key, versions[key].version): one.version for key, one in changed.items()}
    return tuple(_with_versions(run, originals) for run in runs) if changed else tuple(runs), notes


def _with_versions(run: RunConfig, originals: Mapping[tuple[str, str], str]) -> RunConfig:
    if not any(pair in originals for pair in run.versions.items()):
        return run
    found = {key: originals.get((key, version), version) for key, version in run.versions.items()}
    return dataclasses.replace(run, code="; ".join(f"{key}={version}" for key, version in sorted(found.items())))


def record_code(store: "Store", versions: Mapping[str, "CodeVersion"], accept: bool) -> None:
    """Keep the versions of the user's code of a grid in its folder; those that `adopt_code` has accepted count."""
    for key, version in versions.items():
        text = store.meta(_PREFIX + key)
        if text is None:
            store.keep(_PREFIX + key, KeptCode(version.version, (), _bounded(version.source)).as_json())
            continue
        kept = kept_code({_PREFIX + key: text}, store.folder)[key]
        if accept and not kept.knows(version.version):
            store.keep(_PREFIX + key, kept.accepting(version).as_json())


def record_metrics(store: "Store", metrics: Mapping[str, str]) -> None:
    """Keep in a folder which code its metrics are, name -> full name."""
    for name, full in metrics.items():
        if store.meta(SOURCE + name) is None:
            store.keep(SOURCE + name, full)


def merged_code(folders: Iterable[tuple[Path, Mapping[str, str]]]) -> dict[str, str]:
    """Return the entries on code of `meta` for the union of some folders, each with its `meta`.

    Raises:
        UserError: the runs of two folders were made with different versions of a file or package.
    """
    merged: dict[str, tuple[Path, KeptCode]] = {}
    for folder, meta in folders:
        for key, kept in kept_code(meta, folder).items():
            first, other = merged.setdefault(key, (folder, kept))
            if other.version != kept.version:
                raise UserError(
                    f"{folder}: its runs were made with another version of {key} than those of {first} "
                    f"({kept.version}, not {other.version}): their numbers cannot be compared, merge them apart"
                )
            later = tuple(dict.fromkeys((*other.accepted, *kept.accepted)))
            # The source is that of the last version in the list.
            last = kept if later and later[-1] == kept.last else other
            merged[key] = first, KeptCode(kept.version, later, last.source)
    return {_PREFIX + key: kept.as_json() for key, (_, kept) in merged.items()}


def _bounded(source: str) -> str:
    return source if len(source.encode("utf-8", "replace")) <= _MOST_BYTES else ""


def _difference(key: str, kept: KeptCode, now: "CodeVersion") -> str:
    """Say that code has changed, with the first lines that differ where it is known."""
    what = f"{key} is not the one that its runs were made with ({now.version} now, {kept.last} then)"
    if not kept.source or not now.source:
        return what
    old, new = kept.source.splitlines(), now.source.splitlines()
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    parts = old[same : same + _COMPARED], new[same : same + _COMPARED]
    lines = [
        line for line in difflib.unified_diff(*parts, n=0, lineterm="") if not line.startswith(("---", "+++", "@@"))
    ]
    shown = " | ".join(visible(line)[:_WIDE].rstrip() for line in lines[:_SHOWN])
    more = " | …" if len(lines) > _SHOWN else ""
    return f"{what}; from line {same + 1} on: {shown}{more}"


def readable_entries(meta: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the entries of a damaged folder's `meta` without those on code that cannot be read."""
    return {key: text for key, text in meta.items() if not (code_key(key) and code_problem(text))}
