"""What a sweep does before it trains: read the data, start the engine, plan the stacks of the runs that are left."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ncollapse.train.config import RunConfig, split_data_key
from ncollapse.train.data.sets import Dataset, load
from ncollapse.train.engine.grouping import StackKey, group, make_stacks
from ncollapse.train.engine.messages import Engine, WorkerSettings
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.stack_size import Plan, StackPolicy
from ncollapse.train.engine.this_machine import ThisMachine
from ncollapse.train.engine.throughput import DataFacts
from ncollapse.train.engine.trial import try_own
from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.formatting import plain
from ncollapse.train.grid import Grid
from ncollapse.train.plugins import Plugins, metric_names
from ncollapse.train.results import schema
from ncollapse.train.results.own_code import adopt_code
from ncollapse.train.results.own_metrics import check_full_names
from ncollapse.train.results.reader import load_meta, query
from ncollapse.train.results.schema import FINISHED
from ncollapse.train.results.storage_errors import damaged
from ncollapse.train.results.writer import Store


def say(console: Console, text: str) -> None:
    """Print a sentence for the user about what happens."""
    console.print(plain(f"ncollapse: {text}", "yellow"), soft_wrap=True)


def device_of(name: str | None, engine: str) -> torch.device:
    """Return the device of a name, by default cuda where there is a GPU.

    Raises:
        UserError: it is not there, or is none that runs train on.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: runs train on cpu or cuda")
        if engine == "local":  # a cluster checks this itself: it may have GPUs where this machine has none
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"--device {name}: {(str(error).splitlines() or ['no device'])[0]}") from None
    return device


def load_keyed(key: str, device: torch.device, **options: Any) -> Dataset:
    """Load a data set by its `RunConfig.data_key`; see `data.sets.load`."""
    name, own, pad = split_data_key(key)
    return load(name, device, options=own, pad=pad, **options)


def loader(grid: Grid, data_dir: Path | None, download: bool) -> Callable[[str, torch.device], Dataset]:
    """Return the function that loads the data sets of a grid by their keys onto a device."""
    return functools.partial(
        load_keyed, data_dir=data_dir, download=download, plugins=grid.plugins, in_memory=grid.in_memory
    )


def adopted(grid: Grid, folder: Path, options: Options, console: Console) -> Grid:
    """Return the grid with the versions of the user's code under which the folder knows its runs.

    Raises:
        UserError: the code has changed since the folder's runs were made, and `--accept-changes` was not given.
    """
    if grid.metrics:
        with contextlib.suppress(NoResultsError):
            check_full_names(folder, load_meta(folder), metric_names(grid.metrics))
    runs, notes = adopt_code(grid.runs, grid.versions, folder, options.accept_changes)
    for note in notes:
        say(console, note)
    return dataclasses.replace(grid, runs=tuple(runs))


def metric_meanings(grid: Grid) -> dict[str, str]:
    """Return the user's metrics as the results have them: name -> the first line of its docstring, or its full name.

    Raises:
        UserError: see `metric_names`.
    """
    found = {}
    for name, full in metric_names(grid.metrics).items():
        text = getattr(grid.plugins.find("metric", full), "__doc__", None) or ""
        found[name] = text.strip().partition("\n")[0] or full
    return found


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a sweep has read and tried before it trains.

    Attributes:
        loaded, facts: by `RunConfig.data_key`, data sets on the CPU, and what is known of them.
        settings: what workers have to know.
    """

    loaded: dict[str, Dataset]
    facts: dict[str, DataFacts]
    settings: WorkerSettings


def prepare(
    left: Sequence[RunConfig], load_data: Callable[[str, torch.device], Dataset], options: Options, grid: Grid,
    console: Console,
) -> Prepared:  # fmt: skip
    """Load the data of some runs, and try the code of the user's.

    Raises:
        UserError: data that cannot be loaded; code with which the runs cannot train.
    """
    prepared = Prepared(*load_all((run.data_key for run in left), load_data, options, grid, console))
    try_own(left, prepared.loaded, grid.plugins, grid.metrics)
    return prepared


def unfinished(grid: Grid, folder: Path) -> list[RunConfig]:
    """Return the runs of a grid that have not ended in a folder, which may be new; before it is opened.

    Raises:
        UserError: see `query`.
    """
    statuses, _ = held(folder)
    return [run for run in grid.runs if statuses.get(run.id) not in FINISHED]


def held(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return id -> status of the runs in a folder, and what it says of itself; both empty for a new folder."""
    try:
        runs = query(folder, "SELECT id, status FROM runs")
        return dict(zip(runs.id, runs.status, strict=True)), load_meta(folder)
    except NoResultsError:
        return {}, {}


def load_all(
    names: Iterable[str],
    load_data: Callable[[str, torch.device], Dataset],
    options: Options,
    grid: Grid,
    console: Console,
) -> tuple[dict[str, Dataset], dict[str, DataFacts], WorkerSettings]:
    """Load data sets, by `data_key`, on the CPU; return them, their facts, and what the sweep's workers have to know.

    Raises:
        UserError: one cannot be loaded.
    """
    settings = WorkerSettings(
        load_data, 60 * options.checkpoint_minutes, options.save_weights, hopeless_after=options.stop_hopeless,
        plugins=grid.plugins, metrics=grid.metrics,
    )  # fmt: skip
    loaded = {name: settings.load(name, torch.device("cpu")) for name in dict.fromkeys(names)}
    for note in dict.fromkeys(note for data in loaded.values() for note in data.notes):
        say(console, note)
    facts = {name: DataFacts.of(data) for name, data in loaded.items()}
    fingerprints = {name: of.fingerprint for name, of in facts.items()}
    return loaded, facts, dataclasses.replace(settings, fingerprints=fingerprints)


def make_engine(
    options: Options, device: torch.device, settings: WorkerSettings, loaded: dict[str, Dataset], console: Console
) -> tuple[Engine, int | str]:
    """Return the engine and its number of workers, or "auto"."""
    if options.engine == "ray":
        from ncollapse.train.engine.ray_cluster import Cluster

        cluster = Cluster(options.ray_address, device, settings, loaded)
        if cluster.note:
            say(console, cluster.note)
        return cluster, options.workers
    engine = ThisMachine(device, settings, loaded)
    if options.workers == "auto" and engine.unpicklable:
        say(
            console,
            f"code or data cannot be sent to other processes ({engine.unpicklable}), so this process trains all stacks",
        )
        return engine, 1
    return engine, options.workers


def stored_plan(store: Store) -> tuple[dict[str, Any], Plan | None]:
    """Return what the store keeps of the plan of an earlier session, and that plan.

    Raises:
        DamageError: it is no plan.
    """
    kept = store.engine()
    try:
        return kept or {}, None if kept is None else Plan.from_dict(kept)
    except ValueError as error:
        raise damaged(store.folder / schema.FILE, error) from None


def plan_stacks(
    store: Store, left: list[RunConfig], facts: Mapping[str, DataFacts], options: Options, engine: Engine,
    workers: int | str, console: Console, plugins: Plugins,
) -> None:  # fmt: skip
    """Have the engine use a plan, and store it with the stacks that are new in it.

    The last digits of a run depend on the other runs of its stack and on the number of threads. So stacks that have
    begun stay, and with them their threads. For all other runs the machine is measured anew in each session: their
    stacks stay too, unless others are much faster now, the user asks for another size, or runs have been added.
    """
    kept, before = stored_plan(store)
    if options.engine != kept.get("engine"):
        before = None
    stack = options.stack
    if stack == "auto" and before is not None and isinstance(kept.get("stack"), int):
        stack = kept["stack"]
    begun, stacks = store.begun(), store.stacks()
    fixed = {run.id for one in stacks if one.id in begun for run in one.runs}
    free = [run for run in left if run.id not in fixed]
    policy = StackPolicy(free or left, facts, stack, workers, before, pinned=bool(fixed), plugins=plugins)
    if before is not None and not free:
        policy.keep(engine)
        return
    plan = policy.choose(engine)
    planned = group((one for one in stacks if one.id not in begun), lambda one: StackKey.of(one.runs[0]))
    new: list[RunConfig] = []
    sizes, branches = dict(plan.sizes), plan.branches
    if before is not None:
        sizes, branches = before.sizes | sizes, branches | (before.branches - sizes.keys())
    for key, members in group(free, StackKey.of).items():
        wanted = {run.id for run in members}
        members_now = [{run.id for run in one.runs} for one in planned.get(key, ())]
        whole = {run for each in members_now if each & wanted for run in each} == wanted
        known, size = 0 if before is None else before.sizes.get(key, 0), plan.sizes[key]
        same_form = size == 1 or before is None or (key in plan.branches) == (key in before.branches)
        # A smaller size is no other plan where it is that of the few runs that are left.
        if whole and same_form and (size == known or known > size >= -(-len(members) // plan.workers)):
            sizes[key] = known
            branches |= {key} & (frozenset() if before is None else before.branches)
        else:
            new += members
    whole_plan = dataclasses.replace(plan, sizes=sizes, branches=branches)
    stored = {"engine": options.engine, "stack": stack, **whole_plan.as_dict()}
    made = make_stacks(new, plan.sizes.__getitem__, plan.workers)
    store.set_plan(made, stored, branches=[StackKey.of(members[0]) in plan.branches for members in made])
    for line in plan.describe():
        console.print(plain(line))
