"""A results folder is a set of runs: larger grids, smaller ones, parts and shares of a grid, all in one folder."""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from interrupts import interrupt_after
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.part import parse_where, part_of, shard_of
from ncollapse.train.engine.scheduler import sweep
from ncollapse.train.errors import InterruptError, UserError
from ncollapse.train.grid import Grid, load_grid
from ncollapse.train.results.reader import load_metrics, load_runs
from sweep_results import assert_same

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few() -> Grid:
    runs = [RunConfig(optimizer=o, lr=lr, epochs=2, limit=200) for o in ("sgd", "adamw") for lr in (0.01, 0.1)]  # type: ignore[arg-type]
    return Grid("few", tuple(runs))


def first(grid: Grid, count: int) -> Grid:
    return dataclasses.replace(grid, runs=grid.runs[:count])


def test_a_superset_trains_what_is_new_and_a_subset_that_part(
    run_sweep: Callable[..., int], few: Grid, tmp_path: Path
) -> None:
    assert run_sweep(first(few, 2), tmp_path / "a") == 2
    before = load_metrics(tmp_path / "a")
    more = dataclasses.replace(few, runs=(*few.runs, dataclasses.replace(few.runs[0], epochs=3)))
    assert run_sweep(more, tmp_path / "a") == 3
    assert run_sweep(first(few, 3), tmp_path / "a") == 0
    other = Grid("other", (dataclasses.replace(few.runs[0], seed=7),))
    assert run_sweep(other, tmp_path / "a") == 1
    runs, metrics = load_runs(tmp_path / "a"), load_metrics(tmp_path / "a")
    assert runs.id.tolist() == [run.id for run in (*more.runs, *other.runs)]
    assert set(runs.status) == {"done"}
    assert metrics[metrics.run.isin(before.run)].reset_index(drop=True).equals(before)


def test_it_says_what_a_folder_holds_and_gets(digits: Dataset, few: Grid, tmp_path: Path) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    for grid in (first(few, 2), dataclasses.replace(few, runs=few.runs[1:])):
        sweep(grid, tmp_path, lambda name, device: digits, CPU, Options(workers=1), console)
    text = console.export_text()
    assert text.count(" held ") == 1
    assert "held 2 runs, 2 are added; 1 of them are not of this grid and stay as they are" in text


def test_a_subset_of_a_stack_that_has_begun_trains_all_of_it(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's last digits depend on its stack: one with a checkpoint goes on from it, as it was."""
    interrupt_after(4, monkeypatch)
    with pytest.raises(InterruptError):
        run_sweep(small_grid, tmp_path, stack=4, checkpoint_minutes=0)
    monkeypatch.undo()
    begun = load_runs(tmp_path)
    mine = begun[begun.status == "running"].id.tolist()
    part = dataclasses.replace(small_grid, runs=tuple(run for run in small_grid.runs if run.id == mine[0]))
    assert run_sweep(part, tmp_path) == 1
    after = load_runs(tmp_path)
    assert set(after.id[after.status == "done"]) == set(mine)
    assert after["stack"].tolist() == begun["stack"].tolist()
    assert run_sweep(small_grid, tmp_path) == 8
    assert_same(swept, tmp_path, but="stack")


def test_conditions() -> None:
    grid = load_grid("paper")
    assert len(part_of(grid, "optimizer=adam,adamw lr<=0.001 model=vgg9").runs) == 432
    assert {run.momentum for run in part_of(grid, "momentum != 0.9 momentum>0.5").runs} == {0.7, 0.95, 0.98}
    assert len(part_of(grid, "limit=none seed=0").runs) == len(grid.runs)
    assert [one.values for one in parse_where("status=done", {"status": ("done",)})] == [("done",)]


def test_conditions_on_code_of_the_users() -> None:
    wide = RunConfig(model="my models/wide.py:Net", model_options='{"depth": 3, "heads": [1, 2]}', code="x=1")
    deep = dataclasses.replace(wide, model_options='{"depth": 5}', optimizer="torch.optim:NAdam", coupling=None)
    given = RunConfig(optimizer="mine", loss="mse", code="optimizer mine=abc")
    grid = Grid("own", (wide, deep, given))
    for where, runs in (
        ("optimizer=torch.optim:NAdam", [deep]),
        ("optimizer=torch.optim:NAdam,mine lr<=0.1", [deep, given]),
        ('model="my models/wide.py:Net"', [wide, deep]),
        ('model_options={"heads": [1, 2],  "depth":3}', [wide]),
        ('model_options={"depth": 5},{}', [deep, given]),
        ("loss=mse optimizer=mine code='optimizer mine=abc'", [given]),
        ("optimizer!=mine coupling=none", [deep]),
    ):
        assert list(part_of(grid, where).runs) == runs, where


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "is no condition"),
        ("lr<0.1 adam", "'adam' is no condition"),
        ("optmizer=adam", "unknown key 'optmizer', did you mean 'optimizer'"),
        ("optimizer=adma", "unknown optimizer 'adma', did you mean 'adam'?"),
        ("status=lost", "unknown key 'status'"),
        ("lr=fast", "lr is a number, or none; got 'fast'"),
        ("lr<0.1,0.2", "< compares a number with one number"),
        ("optimizer>adam", "> compares a number with one number"),
        ("lr>99", "none of the 75 runs of demo"),
        ("model_options={depth}", "model_options = '{depth}': options are JSON"),
        ("model_options=depth", "options are JSON"),
        ("optimizer=mine", "unknown optimizer 'mine'"),
        ('model="x.py:Net', "is no condition"),
    ],
)
def test_conditions_that_are_none_are_explained(where: str, message: str) -> None:
    with pytest.raises(UserError, match="--where") as error:
        part_of(load_grid("demo"), where)
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "count"), [("paper", 7), ("paper", 100), ("demo", 6), ("demo", 75)])
def test_shards_are_disjoint_and_fair(name: str, count: int) -> None:
    grid = load_grid(name)
    shards = [shard_of(grid, f"{i}/{count}") for i in range(1, count + 1)]
    assert Counter(run for shard in shards for run in shard.runs) == Counter(grid.runs)
    for axis in ("optimizer", "model", "data"):
        whole = Counter(getattr(run, axis) for run in grid.runs)
        for shard in shards:
            part = Counter(getattr(run, axis) for run in shard.runs)
            assert all(abs(part[value] - n / count) < (2 if axis == "optimizer" else 7) for value, n in whole.items())
    assert max(len(shard.runs) for shard in shards) - min(len(shard.runs) for shard in shards) <= 1
    assert shards[1].name == f"{name}-shard-2-of-{count}"


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "1/0", "a/b", "76/75000"])
def test_shards_that_are_none_are_refused(shard: str) -> None:
    with pytest.raises(UserError, match="--shard"):
        shard_of(load_grid("demo"), shard)


def test_an_option_that_takes_tables_apart_is_said() -> None:
    assert (
        "--optimizer replaces optimizer in each of the 4 [[grid]] tables"
        in load_grid("demo", {"optimizer": ["adam"]}).notes[0]
    )
    assert load_grid("demo", {"epochs": [3], "batch_size": [64]}).notes == ()
