"""`sweep --dry-run`: what a sweep would train, how long that would take and what it would write; writes nothing."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from ncollapse.formatting import read_json
from ncollapse.train.config import RunConfig, unpadded
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.grouping import StackKey, group, make_stacks
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.planning import held, make_engine, prepare
from ncollapse.train.engine.stack_size import Plan, StackPolicy
from ncollapse.train.engine.throughput import DataFacts
from ncollapse.train.errors import UserError
from ncollapse.train.formatting import plain, rough_duration
from ncollapse.train.grid import Grid
from ncollapse.train.networks.architecture import Architecture, build, parts_of
from ncollapse.train.results.columns import LAYER_METRICS, METRICS
from ncollapse.train.results.record import shown_epochs
from ncollapse.train.results.schema import FINISHED

#: An evaluation takes about as long as this share of an epoch: a forward pass over all data instead of three.
_EVALUATION = 1 / 3
#: Bytes of a run's row, of a row of metrics beside its numbers, and of a row of geometry, which has a fourth of a page.
_RUN_BYTES, _ROW_BYTES, _GEOMETRY_BYTES = 700, 30, 1024


def print_preview(
    grid: Grid, out: Path, load_data: Callable[[str, torch.device], Dataset], device: torch.device,
    options: Options, console: Console,
) -> None:  # fmt: skip
    """Print what `sweep` would do with these arguments: runs, stacks, estimates of the time and of the store's size.

    Raises:
        UserError: data that cannot be loaded, or that are not those of the folder.
    """
    statuses, meta = held(out)
    finished = {run for run, status in statuses.items() if status in FINISHED}
    left = [run for run in grid.runs if run.id not in finished]
    new = sum(run.id not in statuses for run in left)

    def tell(text: str) -> None:
        console.print(plain(text), soft_wrap=True)

    there = f"{out} holds {len(statuses)} runs" if statuses else f"{out} holds no runs yet"
    tell(
        f"{grid.name}: {len(grid.runs)} runs; {there}. {len(grid.runs) - len(left)} of the grid's are finished there, "
        f"{len(left)} are to be trained, {new} of them new"
    )
    if left:
        ready = prepare(left, load_data, options, grid, console)
        facts = ready.facts
        for name, of in facts.items():
            if meta.get(f"data {unpadded(name)}", of.fingerprint) != of.fingerprint:
                raise UserError(f"{out}: the data set {name} is not the one that its earlier runs were trained on")
        engine, workers = make_engine(options, device, ready.settings, ready.loaded, console)
        try:
            stored = read_json(meta.get("engine"))
            before = Plan.from_dict(stored) if isinstance(stored, dict) else None
            policy = StackPolicy(left, facts, options.stack, workers, before, plugins=grid.plugins)
            plan = policy.choose(engine)
            rates = dict(plan.rates)
            for key, size in plan.sizes.items():
                if key not in rates and (rate := policy.measure(engine, key, size, key in plan.branches, quick=True)):
                    rates[key] = rate.alone
            for line in plan.describe():
                tell(line)
            stacks = make_stacks(left, plan.sizes.__getitem__, plan.workers)
            seconds = sum(_steps(run, facts) / rates.get(StackKey.of(run), math.nan) for run in left)
            tell(
                f"{len(left)} runs in {len(stacks)} stacks; about {rough_duration(seconds)} on {engine.device}, with "
                "evaluations, where no other program takes the processors"
            )
        finally:
            engine.close()
        architectures = {key: Architecture.of(key, facts[key.data]) for key in group(left, StackKey.of)}
        blocks = {key: len(parts_of(one, grid.plugins).blocks) for key, one in architectures.items()}
        size = sum(_row_bytes(run, blocks[StackKey.of(run)]) for run in left)
        tell(f"The store grows by about {_bytes(size)}")
        if options.save_weights:
            weights = {key: _weight_bytes(build(one, 0, grid.plugins)) for key, one in architectures.items()}
            size = sum(weights[StackKey.of(run)] for run in left)
            tell(f"The weights take about {_bytes(size)}")
    tell("Nothing was trained or written (--dry-run)")


def _evaluations(run: RunConfig) -> int:
    return 1 + -(-run.epochs // run.eval_every)


def _steps(run: RunConfig, facts: Mapping[str, DataFacts]) -> float:
    """Return the training steps of a run, with its evaluations counted as steps."""
    epochs = run.epochs + _EVALUATION * _evaluations(run)
    return epochs * run.steps_per_epoch(facts[run.data_key].samples_of(StackKey.of(run)))


def _row_bytes(run: RunConfig, blocks: int) -> int:
    row = _ROW_BYTES + 8 * len(METRICS)
    if run.layers == "all":
        row += blocks * (_ROW_BYTES + 8 * len(LAYER_METRICS))
    return _RUN_BYTES + _evaluations(run) * row + len(shown_epochs(run)) * _GEOMETRY_BYTES


def _weight_bytes(network: nn.Module) -> int:
    return sum(value.nbytes for value in network.state_dict().values())


def _bytes(count: float) -> str:
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} kB"
    )
