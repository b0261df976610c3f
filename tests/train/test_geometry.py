"""The geometry that a store keeps of runs: at which epochs, of which runs, and that it comes and goes with metrics."""

import contextlib
import dataclasses
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from interrupts import interrupt_after
from ncollapse import metrics
from ncollapse.snapshot import Snapshot
from ncollapse.stats import ClassStats
from ncollapse.train import load_geometry, load_metrics, load_runs
from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.sets import load
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.errors import DamageError, InterruptError
from ncollapse.train.grid import Grid, load_grid
from ncollapse.train.networks.models import build
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.inspection import inspect_folder
from ncollapse.train.results.merging import merge_folders
from ncollapse.train.results.record import Evaluation, shown_epochs
from ncollapse.train.results.salvage import salvage_folder
from ncollapse.train.results.schema import FILE, SCHEMA_VERSION
from ncollapse.train.results.writer import Store
from ncollapse.train.training.loop import Training

CPU = torch.device("cpu")
FORMAT_3 = Path(__file__).parents[1] / "fixtures" / "format-3"


def sql(folder: Path, text: str, *given: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as connection, connection:
        return connection.execute(text, given).fetchall()


def rows(folder: Path) -> list[Any]:
    return sql(folder, "SELECT run, epoch, content FROM geometry ORDER BY run, epoch")


def of_training(runs: list[RunConfig], data: Dataset, **options: Any) -> dict[int, dict[int, Snapshot]]:
    """Run -> epoch -> snapshot of the evaluations of a training."""
    found: dict[int, dict[int, Snapshot]] = {i: {} for i in range(len(runs))}
    for event in Training(runs, data, CPU, **options):
        for i, content in event.snapshots.items() if isinstance(event, Evaluation) else ():
            found[i][event.epoch] = Snapshot.from_bytes(content)
    return found


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [
        (200, 10, (0, 50, 100, 150, 200)), (200, 1, (0, 50, 100, 150, 200)), (30, 4, (0, 8, 16, 24, 30)),
        (10, 4, (0, 4, 8, 10)), (7, 5, (0, 5, 7)), (1, 5, (0, 1)), (3, 100, (0, 3)), (4, 2, (0, 2, 4)),
        (1_000_000, 7, (0, 249_998, 499_996 + 7, 750_001, 1_000_000)),
    ],
)  # fmt: skip
def test_the_evaluated_epochs_nearest_to_each_quarter(epochs: int, every: int, expected: tuple[int, ...]) -> None:
    run = RunConfig(epochs=epochs, eval_every=every)
    assert shown_epochs(run) == expected
    evaluated = np.array(sorted({*range(0, epochs + 1, every), epochs}))
    for quarter in range(5):
        least = np.abs(4 * evaluated - epochs * quarter).min()
        assert any(abs(4 * shown - epochs * quarter) == least for shown in expected)


def test_a_sweep_keeps_it_of_all_runs(swept: Path, small_grid: Grid) -> None:
    found = load_geometry(swept)
    assert found.keys() == {run.id for run in small_grid.runs}
    assert all(list(of_run) == [0, 2, 4] for of_run in found.values())
    one = small_grid.runs[3].id
    assert load_geometry(swept, [one, "not there", "'"]).keys() == {one}
    assert load_geometry(swept, []) == {}
    # NC2 and NC0 can be read off it.
    ends = load_runs(swept).set_index("id")
    for run, of_run in found.items():
        for epoch, suffix in ((0, "_start"), (4, "")):
            off = of_run[epoch].means[~np.eye(10, dtype=bool)]
            assert np.abs(off + 1 / 9).mean() == pytest.approx(ends.loc[run, f"nc2_equiangularity{suffix}"], rel=2e-3)
            nc0 = 10 * (of_run[epoch].singular_values ** 2 * of_run[epoch].row_sum ** 2).sum()
            assert nc0 == pytest.approx(ends.loc[run, f"nc0{suffix}"], rel=0.01, abs=1e-4)


def test_it_is_that_of_the_weights(digits: Dataset) -> None:
    run = RunConfig(model="cnn", epochs=2, eval_every=1, limit=300, lr=0.05)
    training = Training([run], digits, CPU)
    *_, last = (event for event in training if isinstance(event, Evaluation))
    shown = Snapshot.from_bytes(last.snapshots[0])
    model = build("cnn", 1, 8, 10, seed=0)
    model.load_state_dict(training.stack.state_dict(0))
    seen: list[torch.Tensor] = []
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(digits.train_x[:300])
    stats = ClassStats(10, head.in_features)
    stats.update(seen[0], digits.train_y[:300])
    for name, matrix in metrics.matrices(head.weight.detach(), stats).items():
        matrix = matrix / matrix.abs().max()
        np.testing.assert_allclose(getattr(shown, name), matrix.numpy(), atol=1e-3)
    assert shown.three == (0, 1, 2)
    labels = digits.train_y[:300]
    centre = np.nanmean(shown.samples, 1)
    assert np.abs(centre - shown.corners).max() < 0.5  # 24 samples of some 30
    assert [int((labels == k).sum()) >= 24 for k in range(3)] == np.isfinite(shown.samples[:, 23, 0]).tolist()


def test_of_a_run_that_ends_early_its_end_is_kept_if_finite(digits: Dataset) -> None:
    runs = [RunConfig(lr=lr, epochs=9, limit=300, eval_every=2, loss="mse") for lr in (0.5, 1e9, 1e-9)]
    found = of_training(runs, digits, hopeless_after=0.6)
    assert [list(of_run) for of_run in found.values()] == [[0, 2, 4, 6, 9], [0], [0, 2, 4, 6]]
    found = of_training([dataclasses.replace(runs[2], eval_every=1)], digits, hopeless_after=0.6)
    assert list(found[0]) == [0, 2, 4, 6]  # 6 is where it ends


def test_runs_of_one_stack_with_other_epochs(digits: Dataset) -> None:
    runs = [RunConfig(epochs=epochs, eval_every=every, limit=200) for epochs, every in ((8, 1), (4, 1), (6, 3))]
    found = of_training(runs, digits)
    assert [list(of_run) for of_run in found.values()] == [[0, 2, 4, 6, 8], [0, 1, 2, 3, 4], [0, 3, 6]]
    alone = of_training(runs[2:], digits)[0]
    np.testing.assert_allclose(found[2][6].product, alone[6].product, atol=2e-3)


class Mine(nn.Module):
    """A model whose head has its own name and class."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classify = nn.Linear(64, 9), nn.Linear(9, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.classify(self.body(x.flatten(1)).relu())
        return result


class Samples:
    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i], int(self.y[i])


@pytest.mark.filterwarnings("ignore:.*10 classes cannot form a simplex")
def test_of_models_and_streamed_data_of_the_users_and_of_all_layers(digits: Dataset) -> None:
    plugins = Plugins(given={
        "model": {"mine": Mine},
        "data": {"stream": lambda: tuple(Samples(x[:150], y[:150]) for x, y in
                                         ((digits.train_x, digits.train_y), (digits.val_x, digits.val_y)))},
    })  # fmt: skip
    stream = load("stream", CPU, data_dir=None, download=False, plugins=plugins, in_memory=False)
    assert isinstance(stream, Streamed)
    run = RunConfig(model="mine", epochs=2, eval_every=1, limit=150, layers="all", code="model mine=1")
    streamed, memory = (of_training([run], data, plugins=plugins)[0] for data in (stream, digits))
    assert list(streamed) == list(memory) == [0, 1, 2]
    for epoch, one in streamed.items():
        assert (one.to_bytes(), one.three, len(one.singular_values)) == (memory[epoch].to_bytes(), (0, 1, 2), 9)


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(swept, tmp_path / "results"))


def test_an_interrupted_sweep_has_what_an_undisturbed_one_has(
    run_sweep: Callable[..., int], small_grid: Grid, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"
    interrupt_after(4, monkeypatch)  # after the evaluation of epoch 2, whose checkpoint is of epoch 1
    with pytest.raises(InterruptError):
        run_sweep(small_grid, out, checkpoint_minutes=0)
    monkeypatch.undo()
    assert {row[1] for row in rows(out)} == {0, 2}
    run_sweep(small_grid, out)
    assert rows(out) == rows(swept)


def test_it_goes_with_the_metrics_where_runs_are_trained_again(folder: Path, small_grid: Grid, swept: Path) -> None:
    runs = {run.id for run in small_grid.runs[:2]}
    with Store(folder, small_grid) as store:
        store.reset(runs)
    left = [row for row in rows(swept) if row[0] not in runs]
    assert rows(folder) == left
    assert load_metrics(folder).run.nunique() == len(small_grid.runs) - 2
    # A row without its metrics, as an older version leaves one, goes when its run begins.
    sql(folder, "INSERT INTO geometry VALUES (?, 2, x'00')", small_grid.runs[0].id)
    with Store(folder, small_grid) as store:
        store.set_plan([small_grid.runs[:2]])
        store.begin(store.stacks()[0], store.begin_session("test", {}), 10, resume=False)
    assert rows(folder) == left


def test_damage_is_named_and_left_behind(folder: Path, small_grid: Grid, swept: Path) -> None:
    run = small_grid.runs[4].id
    sql(folder, "UPDATE geometry SET content = substr(content, 1, 100) WHERE run = ? AND epoch = 2", run)
    with pytest.raises(DamageError, match=f"the geometry of run {run} at epoch 2: .*`ncollapse check"):
        load_geometry(folder)
    with pytest.raises(DamageError, match=f"of run {run} at epoch 2"):
        load_geometry(folder, [run])
    assert len(load_geometry(folder, [small_grid.runs[0].id])) == 1
    assert len(load_runs(folder)) == len(small_grid.runs)  # no number depends on it
    found = [(one.what, one.problem) for one in inspect_folder(folder) if one.problem]
    assert found == [(f"geometry of run '{run}'", "at epoch 2: a damaged snapshot: its checksum is another")]
    out = folder.parent / "salvaged"
    assert salvage_folder(folder, out).finished == len(small_grid.runs)
    assert rows(out) == [row for row in rows(folder) if row[:2] != (run, 2)]
    assert list(load_geometry(out)[run]) == [0, 4]
    whole = rows(swept)[0][2]
    for change in ("run = x'00'", "epoch = 'x'", "content = 'text'", "content = 7"):
        sql(folder, "UPDATE geometry SET content = ? WHERE run = ? AND epoch = 2", whole, run)
        sql(folder, f"UPDATE geometry SET {change} WHERE run = ? AND epoch = 2", run)
        with pytest.raises(DamageError):
            load_geometry(folder)
        assert any(one.problem for one in inspect_folder(folder))
        sql(folder, "DELETE FROM geometry WHERE run = x'00' OR epoch = 'x'")
        sql(folder, "INSERT OR REPLACE INTO geometry VALUES (?, 2, x'00')", run)


def test_merged_folders_have_it(folder: Path, small_grid: Grid, swept: Path, tmp_path: Path) -> None:
    """Of a run that two folders have it is that of the one which kept it."""
    other = Path(shutil.copytree(swept, tmp_path / "other"))
    sql(folder, "DELETE FROM geometry")
    merge_folders([folder, other], tmp_path / "all")
    assert rows(tmp_path / "all") == rows(swept)
    assert all(not one.problem for one in inspect_folder(tmp_path / "all"))


@pytest.mark.filterwarnings("ignore:.*10 classes cannot form a simplex")
def test_a_folder_from_before_has_none_and_gets_it_as_it_goes_on(
    tmp_path: Path, run_sweep: Callable[..., int], swept: Path
) -> None:
    old = Path(shutil.copytree(FORMAT_3, tmp_path / "old"))
    before = (old / FILE).read_bytes()
    assert sql(old, "SELECT count(*) FROM sqlite_master WHERE name = 'geometry'") == [(0,)]
    assert load_geometry(old) == {}
    assert load_geometry(old, ["x"]) == {}
    assert (old / FILE).read_bytes() == before
    assert not [one for one in inspect_folder(old) if one.problem]
    salvage_folder(old, tmp_path / "salvaged")
    assert load_geometry(tmp_path / "salvaged") == {}
    merge_folders([old, swept], tmp_path / "merged")
    assert rows(tmp_path / "merged") == rows(swept)
    assert sql(old, "PRAGMA user_version") == sql(swept, "PRAGMA user_version") == [(SCHEMA_VERSION,)] == [(3,)]
    stopped = load_runs(old).query("status == 'running'").id.tolist()
    run_sweep(load_grid(str(FORMAT_3 / "grid.toml")), old)
    assert [row[:2] for row in rows(old)] == [(run, epoch) for run in sorted(stopped) for epoch in (8, 12)]
    assert list(load_geometry(old)[stopped[0]]) == [8, 12]
