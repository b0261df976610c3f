"""`ncollapse rerun`: train runs of a results folder again, or the same runs with other settings."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ncollapse.train.config import NAMED, RunConfig, make_run, short
from ncollapse.train.engine.part import matching, parse_where
from ncollapse.train.errors import InterruptError, UserError
from ncollapse.train.grid import Grid
from ncollapse.train.plugins import Plugins, with_code
from ncollapse.train.results.own_code import adopt_code
from ncollapse.train.results.own_metrics import full_names
from ncollapse.train.results.reader import load_meta, load_runs
from ncollapse.train.results.schema import FINISHED, SETTINGS, STATUSES
from ncollapse.train.results.writer import Store


def chosen_runs(folder: Path, where: str) -> dict[RunConfig, str]:
    """Return the runs of a folder that satisfy conditions on their settings and their status, with their status.

    Runs that a stopped sweep has left in training count as pending.

    Raises:
        UserError: no results, or conditions that are none; no run satisfies them.
    """
    frame = load_runs(folder)[["status", *SETTINGS]].astype(object)
    rows = frame.where(frame.notna(), None).to_dict("records")
    runs = [make_run({name: row[name] for name in SETTINGS}, str(folder)) for row in rows]
    conditions = parse_where(where, {"status": STATUSES}, runs)
    chosen = {}
    for row, run in zip(rows, runs, strict=True):
        status = "pending" if row["status"] not in FINISHED else row["status"]
        of_status = (one for one in conditions if one.key == "status")
        of_settings = [one for one in conditions if one.key != "status"]
        if all(one.holds(status) for one in of_status) and matching([run], of_settings):
            chosen[run] = status
    if not chosen:
        raise UserError(f"--where {short(where)}: none of the {len(frame)} runs in {folder}")
    return chosen


def changed(runs: Sequence[RunConfig], settings: Mapping[str, Sequence[Any]], plugins: Plugins) -> list[RunConfig]:
    """Return the runs with every combination of other settings, each once; what is given replaces what they have."""
    found: dict[RunConfig, None] = {}
    for old in runs:
        for values in itertools.product(*settings.values()):
            new = dict(zip(settings, values, strict=True))
            # The coupling of an optimizer follows from its name.
            kept: dict[str, Any] = {"coupling": None} if "optimizer" in new else {}
            # So do options, and what goes with one model or one loss only.
            kept |= {f"{name}_options": "" for name in NAMED if name in new}
            kept |= {"head": ""} if "model" in new else {}
            kept |= {"label_smoothing": 0.0} if "loss" in new else {}
            run = make_run(with_code({**old.as_dict(), **kept, **new}, plugins), "rerun")
            found[run] = None
    return list(found)


def train_again(
    folder: Path, where: str, settings: Mapping[str, Sequence[Any]], train: Callable[[Grid], object],
    metrics: Sequence[str] = (), *, accept_changes: bool = False, code_dir: Path = Path(),
) -> Grid:  # fmt: skip
    """Train the runs of a folder that satisfy conditions, and return them.

    Without other settings what was measured of them is deleted first; with some the folder gets new runs, and keeps the
    old ones as they are.

    Args:
        train: trains the runs of a grid in the folder.
        metrics: names of metrics of the user's that are measured beside those that the folder has.
        code_dir: where files of the user's are looked for, before the current folder.
        accept_changes: whether code of the user's that has changed counts as that of the runs.

    Raises:
        UserError: as in `chosen_runs` and `Store`; runs of a stack that is still to be trained.
    """
    chosen, meta = chosen_runs(folder, where), load_meta(folder)
    plugins = Plugins(code_dir)
    metrics = list(dict.fromkeys([*full_names(meta).values(), *metrics]))
    runs = changed(list(chosen), settings, plugins) if settings else list(chosen)
    grid = Grid(meta["grid"], tuple(runs), meta.get("description", ""), plugins=plugins, metrics=tuple(metrics))
    if not settings:
        # Before anything is deleted.
        adopt_code(grid.runs, grid.versions, folder, accept_changes)
        with Store(folder, grid) as store:
            store.reset(run.id for run, status in chosen.items() if status in FINISHED)
    try:
        train(grid)
    except InterruptError as error:  # the same command would not find what is no longer as it was
        again = f"ncollapse rerun {folder} --where status=pending"
        raise type(error)(str(error).replace("the same command continues", f"`{again}` continues")) from None
    return dataclasses.replace(grid, notes=())
