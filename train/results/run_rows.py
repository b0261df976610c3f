"""The rows of runs in a folder's database: added with a grid, and made pending again."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.results import schema
from ncollapse.train.results.schema import SETTINGS, quoted
from ncollapse.train.results.storage_errors import damaged, user_errors
from ncollapse.train.results.transactions import Database


def add_runs(database: Database, folder: Path, grid: Grid) -> tuple[int, int]:
    """Add the runs of a grid that the folder does not have, within a transaction.

    Returns:
        Number of runs that the folder had, and of those that were added.
    """
    db = database.connection
    stored = {row[0]: row[1:] for row in db.execute(f"SELECT id, {quoted(SETTINGS, 'runs')} FROM runs")}
    wanted = {run.id: tuple(run.as_dict().values()) for run in grid.runs}
    if changed := [run for run, settings in wanted.items() if stored.get(run, settings) != settings]:
        raise damaged(folder / schema.FILE, f"the settings of run {changed[0]} are not those of its id")
    new = [(run, settings) for run, settings in wanted.items() if run not in stored]
    (last,) = db.execute("SELECT max(position) FROM runs").fetchone()
    if not (last is None or isinstance(last, int)):
        raise damaged(folder / schema.FILE, "the place of a run in its grid is not a number")
    rows = [(run, i, "pending", *settings) for i, (run, settings) in enumerate(new, (-1 if last is None else last) + 1)]
    columns = ("id", "position", "status", *SETTINGS)
    db.executemany(f"INSERT INTO runs ({quoted(columns)}) VALUES ({', '.join('?' * len(columns))})", rows)
    return len(stored), len(new)


def reset_runs(database: Database, folder: Path, runs: Iterable[str], finished: Mapping[str, str]) -> list[str]:
    """Make runs pending again, delete what was measured of them and their files, and return their ids.

    Raises:
        UserError: one of them is in a stack that is still to be trained, which has to stay the same program.
    """
    names = [(run,) for run in runs]
    stacks = dict(database.rows("SELECT id, stack FROM runs"))
    unfinished = {stack for run, stack in stacks.items() if run not in finished}
    if held := [run for (run,) in names if stacks[run] is not None and stacks[run] in unfinished]:
        raise UserError(
            f"{folder}: {len(held)} of these runs are in stacks that are still to be trained; continue the sweep first"
        )
    with database.transaction():
        for table in schema.MEASURED:
            database.connection.executemany(f"DELETE FROM {table} WHERE run = ?", names)
        database.connection.executemany(
            "UPDATE runs SET status = 'pending', stack = NULL, session = NULL, seconds = NULL, "
            "diverged_epoch = NULL, digest = NULL WHERE id = ?",
            names,
        )
    with user_errors(folder):
        for (run,) in names:
            for file in run_files(folder, run):
                file.unlink(missing_ok=True)
    return [run for (run,) in names]


def run_files(folder: Path, run: str) -> tuple[Path, Path]:
    """Return the files of a run: its weights, and the traceback of one that has failed. Its id must be a hash."""
    return folder / "weights" / f"{run}.pt", failure_file(folder, run)


def failure_file(folder: Path, run: str) -> Path:
    """Return the file that says why a run has failed. Its id must be a hash."""
    return folder / "failures" / f"{run}.txt"
