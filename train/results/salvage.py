"""Copy what is whole of a damaged results folder into a new one, from which the same command continues."""

import contextlib
import dataclasses
import shutil
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

from ncollapse.formatting import read_json
from ncollapse.train.config import MOST
from ncollapse.train.errors import DamageError, UserError
from ncollapse.train.results import schema
from ncollapse.train.results.checkpoint_file import file_name
from ncollapse.train.results.columns import OwnMetrics
from ncollapse.train.results.inspection import (
    StoredRun,
    checkpoint_problem,
    due_epochs,
    failure_problem,
    geometry_problem,
    open_damaged,
    read_rows,
    read_runs,
    weights_problem,
)
from ncollapse.train.results.own_code import readable_entries
from ncollapse.train.results.own_metrics import metric_key, readable_metrics
from ncollapse.train.results.run_rows import failure_file
from ncollapse.train.results.storage_errors import cannot_write
from ncollapse.train.results.validation import session_facts


@dataclasses.dataclass(frozen=True)
class Salvaged:
    """What was copied: runs of each kind, and files."""

    finished: int
    unfinished: int
    lost: int
    weights: int
    checkpoints: int


def salvage_folder(folder: Path, out: Path) -> Salvaged:
    """Copy the runs, evaluations, weights and checkpoints of a folder that are whole into `out`, which must be new.

    A finished run with damaged evaluations is pending in `out`: it is trained again. A run whose settings cannot be
    read is lost.

    Raises:
        UserError: `out` exists and is not empty, cannot be written, or nothing of the folder can be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--salvage {out}: it exists already; give a new folder")
    with open_damaged(folder) as source:
        runs = list(read_runs(source))
        kept = [
            run
            for run in runs
            if run.config is not None and type(run.row["position"]) is int and abs(run.row["position"]) <= MOST
        ]
        if not kept:
            raise UserError(f"{folder}: no run can be read, so there is nothing to salvage")
        try:
            out.mkdir(parents=True, exist_ok=True)
            stacks = {row["id"]: row for row in read_rows(source, "stacks") if isinstance(row["size"], int)}
            checkpoints = _copy_checkpoints(folder, out, stacks, kept)
            weights = _copy_weights(folder, out, kept)
            _copy_failures(folder, out, kept)
            with contextlib.closing(schema.connect(out, create=True)) as target:
                target.execute("BEGIN IMMEDIATE")
                own = readable_metrics(source)[0]
                schema.create_tables(target, own)
                _copy_meta(source, target, folder)
                _copy_plan(target, stacks, checkpoints)
                for run in kept:
                    _copy_run(source, target, run, stacks, checkpoints, own)
                target.execute("COMMIT")
        except OSError as error:
            raise cannot_write(out, error) from None
    finished = sum(run.finished and not run.problem for run in kept)
    return Salvaged(finished, len(kept) - finished, len(runs) - len(kept), weights, len(checkpoints))


def _copy_checkpoints(
    folder: Path, out: Path, stacks: dict[int, dict[str, Any]], runs: list[StoredRun]
) -> dict[int, int]:
    """Copy the checkpoints from which all runs of a stack can continue; return stack -> epoch."""
    members = defaultdict(list)
    for run in runs:
        members[run.row["stack"]].append(run)
    copied = {}
    for number, row in stacks.items():
        name, epoch = row.get("checkpoint"), row.get("checkpoint_epoch")
        if type(epoch) is not int or name != file_name(number, epoch) or checkpoint_problem(folder, name, epoch):
            continue
        if all(_continues(run, epoch) for run in members[number]):
            (out / "checkpoints").mkdir(exist_ok=True)
            shutil.copyfile(folder / "checkpoints" / name, out / "checkpoints" / name)
            copied[number] = epoch
    return copied


def _continues(run: StoredRun, epoch: int) -> bool:
    """Return whether a run has all its evaluations up to an epoch."""
    if run.problem or run.finished or run.config is None:
        return not run.problem
    return tuple(e for e in run.epochs if e <= epoch) == due_epochs(run.config, epoch)


def _copy_weights(folder: Path, out: Path, runs: list[StoredRun]) -> int:
    count = 0
    for run in runs:
        path = folder / "weights" / f"{run.row['id']}.pt"  # an id that is a hash, as `read_runs` has found
        if run.finished and not run.problem and path.is_file() and not weights_problem(path):
            (out / "weights").mkdir(exist_ok=True)
            shutil.copyfile(path, out / "weights" / path.name)
            count += 1
    return count


def _copy_failures(folder: Path, out: Path, runs: list[StoredRun]) -> None:
    for run in runs:
        if run.row["status"] == "failed" and not run.problem:
            path = failure_file(folder, run.row["id"])  # an id that is a hash, as `read_runs` has found
            if path.is_file() and not failure_problem(path):
                path_out = failure_file(out, run.row["id"])
                path_out.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, path_out)


def _copy_meta(source: sqlite3.Connection, target: sqlite3.Connection, folder: Path) -> None:
    meta = {row["key"]: row["value"] for row in read_rows(source, "meta") if isinstance(row["value"], str)}
    if not isinstance(read_json(meta.get("engine")), dict):
        meta.pop("engine", None)
    own, known = readable_metrics(source)[0], readable_entries(meta)
    meta = {key: text for key, text in known.items() if metric_key(key) is None or metric_key(key) in own}
    for key, value in {"grid": folder.name, "description": "", **meta}.items():
        if isinstance(key, str):
            target.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))
    for row in read_rows(source, "sessions"):
        with contextlib.suppress(DamageError):
            session_facts(row, folder)
            _insert(target, "sessions", {name: row[name] for name in schema.TABLES["sessions"]})


def _copy_plan(target: sqlite3.Connection, stacks: dict[int, dict[str, Any]], checkpoints: dict[int, int]) -> None:
    for number, row in stacks.items():
        values: dict[str, Any] = {"id": number, "size": row["size"], "branches": int(row.get("branches") == 1)}
        if number in checkpoints:
            epoch = checkpoints[number]
            values |= {"checkpoint": file_name(number, epoch), "checkpoint_epoch": epoch, "epoch": epoch}
        _insert(target, "stacks", values)


def _copy_run(
    source: sqlite3.Connection, target: sqlite3.Connection, run: StoredRun, stacks: dict[int, dict[str, Any]],
    checkpoints: dict[int, int], own: OwnMetrics,
) -> None:  # fmt: skip
    assert run.config is not None
    whole = run.finished and not run.problem
    stack = run.row["stack"] if run.row["stack"] in stacks else None
    last = run.config.epochs if whole else checkpoints.get(stack, -1) if stack is not None else -1
    row = {"id": run.row["id"], "position": run.row["position"], "status": run.row["status"] if whole else "pending"}
    row |= {**run.config.as_dict(), "stack": stack}
    if whole:
        row |= {name: run.row[name] for name in ("session", "train_samples", "seconds", "diverged_epoch", "digest")}
    _insert(target, "runs", row)
    for table in ("metrics", "layers") if last >= 0 else ():
        columns = tuple(schema.tables_with(own)[table])
        # A layer's name that looks like a number may have become one; its digits, and so the digest, are the same.
        wanted = schema.quoted(columns).replace('"layer"', 'CAST("layer" AS TEXT)')
        rows = source.execute(
            f"SELECT {wanted} FROM {table} WHERE run = ? AND typeof(epoch) = 'integer' AND epoch BETWEEN 0 AND ?",
            (run.row["id"], last),
        )
        places = ", ".join("?" * len(columns))
        target.executemany(f"INSERT OR IGNORE INTO {table} ({schema.quoted(columns)}) VALUES ({places})", rows)
    where = "run = ? AND typeof(epoch) = 'integer' AND epoch BETWEEN 0 AND ?"
    with contextlib.suppress(sqlite3.DatabaseError):  # of what cannot be read, a run has no pictures
        for epoch, content in source.execute(
            f"SELECT epoch, content FROM geometry WHERE {where}", (run.row["id"], last)
        ):
            if not geometry_problem(content):
                _insert(target, "geometry", {"run": run.row["id"], "epoch": epoch, "content": content})


def _insert(target: sqlite3.Connection, table: str, values: dict[str, Any]) -> None:
    places = ", ".join("?" * len(values))
    target.execute(f"INSERT OR IGNORE INTO {table} ({schema.quoted(values)}) VALUES ({places})", tuple(values.values()))
