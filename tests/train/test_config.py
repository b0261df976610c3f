"""Settings and grids: the defaults on which ids depend, the schedule, and every kind of bad input."""

import dataclasses
from pathlib import Path

import pytest

from ncollapse.optimizer_table import OPTIMIZERS, PAPER_OPTIMIZERS
from ncollapse.train.config import RunConfig, make_run
from ncollapse.train.errors import UserError
from ncollapse.train.grid import load_grid, presets, run_settings


def test_the_id_depends_on_the_settings_alone() -> None:
    """These literals must not change: they are the ids of runs in existing results folders."""
    assert RunConfig().as_dict() == {
        "model": "mlp",
        "model_options": "",
        "head": "",
        "width": None,
        "data": "digits",
        "data_options": "",
        "optimizer": "sgd",
        "optimizer_options": "",
        "loss": "cross_entropy",
        "loss_options": "",
        "label_smoothing": 0.0,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "coupling": 1.0,
        "beta2": 0.999,
        "eps": 1e-8,
        "epochs": 200,
        "batch_size": 128,
        "lr_drops": 2,
        "lr_drop_factor": 0.1,
        "seed": 0,
        "limit": None,
        "pad": 0,
        "precision": "fp32",
        "augment": "none",
        "layers": "head",
        "eval_every": 5,
        "code": "",
    }
    assert RunConfig().id == "fdb795d22450"
    assert RunConfig(optimizer="adamw", lr=0.01).id == RunConfig(lr=1e-2, optimizer="adamw", coupling=0).id
    assert len({RunConfig(seed=s, optimizer=o).id for s in range(50) for o in OPTIMIZERS}) == 500


@pytest.mark.parametrize(
    ("epochs", "drops"), [(200, (66, 133)), (3, (1, 2)), (7, (2, 4)), (2, (1,)), (1, ()), (300, (100, 200))]
)
def test_learning_rate_drops_at_thirds(epochs: int, drops: tuple[int, ...]) -> None:
    factors = [RunConfig(epochs=epochs).lr_factor(epoch) for epoch in range(epochs)]
    expected = [0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)]
    assert factors == pytest.approx(expected)
    assert {RunConfig(lr_drops=0).lr_factor(epoch) for epoch in range(200)} == {1.0}


def test_the_last_batch_counts() -> None:
    assert RunConfig(batch_size=128).steps_per_epoch(60_000) == 469
    assert RunConfig(batch_size=128).steps_per_epoch(128) == 1


def test_coupling_follows_the_optimizer() -> None:
    assert [RunConfig(optimizer=o).coupling for o in ("sgd", "sgdw", "signumw", "adam")] == [1.0, 0.0, 0.0, 1.0]
    assert RunConfig(optimizer="adam", coupling=0.25).coupling == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr = -0.1: input should be greater than 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"weight_decay": -1}, "weight_decay = -1: input should be greater than or equal to 0"),
        ({"momentum": 1.0}, "momentum = 1.0: input should be less than 1"),
        ({"coupling": 2}, "coupling = 2: input should be less than or equal to 1"),
        ({"optimizer": "lion9"}, "unknown optimizer 'lion9', did you mean 'lion'?"),
        ({"model": "alexnet"}, "unknown model 'alexnet'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"wieght_decay": 0.1}, "unknown key 'wieght_decay', did you mean 'weight_decay'?"),
        ({"zzz": 0.1}, "unknown key 'zzz'; the keys are model, model_options,"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_run(settings, "grid.toml")
    assert str(error.value).startswith("grid.toml: " + message)


def test_presets_have_the_runs_that_they_describe() -> None:
    grids = {name: load_grid(name) for name in presets()}
    paper = {"paper", "paper-table", "paper-coupling", "paper-momentum"}
    others = {"demo", "coupling", "lion", "muon", "layers", "architectures", "optimizers", "losses", "findings"}
    assert set(grids) == paper | others | {"findings-gpu"}
    assert all(run.precision == "bf16" for name in paper for run in grids[name].runs)
    assert {run.optimizer for run in grids["paper-table"].runs} == set(PAPER_OPTIMIZERS)
    assert {(run.optimizer, run.coupling) for run in grids["muon"].runs} == {("muon", 1.0), ("muonw", 0.0)}
    assert {(run.optimizer, run.coupling) for run in grids["lion"].runs} == {("lion", 1.0), ("lionw", 0.0)}
    # The compared runs differ in momentum alone.
    momenta: dict[str, set[float]] = {}
    for run in grids["paper-momentum"].runs:
        momenta.setdefault(dataclasses.replace(run, momentum=0).id, set()).add(run.momentum)
    assert sum(each == {0.7, 0.9} for each in momenta.values()) == 12
    assert all(grid.name == name and grid.description for name, grid in grids.items())
    assert len(grids["paper"].runs) == 3888
    assert len(grids["demo"].runs) >= 48
    assert {run.optimizer for run in grids["demo"].runs} == set(PAPER_OPTIMIZERS)
    per_cell = {(run.model, run.data, run.optimizer): 0 for run in grids["paper"].runs}
    for run in grids["paper"].runs:
        per_cell[run.model, run.data, run.optimizer] += 1
    assert set(per_cell.values()) == {108}
    assert len({run.id for run in grids["paper"].runs}) == 3888
    couplings = {run.coupling for run in grids["coupling"].runs}
    assert couplings >= {0.0, 1.0}
    assert len(couplings) > 4


def write(folder: Path, text: str) -> str:
    path = folder / "grid.toml"
    path.write_text(text)
    return str(path)


def test_a_grid_is_the_product_of_its_lists(tmp_path: Path) -> None:
    text = (
        'name = "mine"\nepochs = 3\nseed = [0, 1]\n[[grid]]\nlr = [0.1, 0.2]\n[[grid]]\noptimizer = "adam"\nseed = 5\n'
    )
    grid = load_grid(write(tmp_path, text))
    assert grid.name == "mine"
    assert [(r.optimizer, r.seed, r.lr) for r in grid.runs] == [
        ("sgd", 0, 0.1),
        ("sgd", 0, 0.2),
        ("sgd", 1, 0.1),
        ("sgd", 1, 0.2),
        ("adam", 5, 0.1),
    ]
    assert load_grid(write(tmp_path, "lr = [0.1, 0.2]")).name == "grid"
    replaced = load_grid(write(tmp_path, text), {"lr": [0.5], "epochs": [7]})
    assert [(r.optimizer, r.seed, r.lr, r.epochs) for r in replaced.runs] == [
        ("sgd", 0, 0.5, 7),
        ("sgd", 1, 0.5, 7),
        ("adam", 5, 0.5, 7),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = [", "not valid TOML"),
        ("learning_rate = 0.1", "unknown key 'learning_rate'"),
        ("[[grids]]\nlr = 1", "unknown key 'grids', did you mean 'grid'?"),
        ("[[grid]]\nlr = 0.1\n[[grid]]\nlr = -1", r"\[\[grid\]\] 2: lr = -1"),
        ("lr = []", "lr has no values"),
        ("grid = 3", "begun with"),
        ("grid = []", "has no runs"),
        ("lr = [0.1, 0.1]", "more than once: sgd lr=0.1"),
        ('optimizer = ["adam"]\ncoupling = 1\n[[grid]]\nlr = 0.1\n[[grid]]\nlr = 0.1', "more than once"),
    ],
)
def test_bad_grids_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_grid(write(tmp_path, text))


def test_a_missing_grid_lists_the_presets() -> None:
    with pytest.raises(UserError, match=r"neither a file nor a preset \(architectures, coupling, .*paper-table\)"):
        load_grid("dmeo")


def test_the_papers_run() -> None:
    """200 epochs, batches of 128, cross-entropy; 0.0679 and 5e-4 for SGD and SGDW, drops at 66 and 133."""
    run = make_run(run_settings("paper", {}), "run")
    assert (run.model, run.data, run.optimizer) == ("resnet9", "fashion-mnist", "sgd")
    assert (run.epochs, run.batch_size, run.lr, run.weight_decay) == (200, 128, 0.0679, 5e-4)
    assert [epoch for epoch in range(1, 200) if run.lr_factor(epoch) < run.lr_factor(epoch - 1)] == [66, 133]
    assert (run.precision, run.augment) == ("bf16", "none")
    other = make_run(run_settings("paper", {"optimizer": "adamw", "weight_decay": 0.1, "precision": "fp32"}), "run")
    assert (other.optimizer, other.lr, other.weight_decay, other.precision) == ("adamw", 1e-3, 0.1, "fp32")
    for optimizer in OPTIMIZERS:  # each has its own learning rate
        assert make_run(run_settings("paper", {"optimizer": optimizer}), "run").lr != RunConfig().lr


def test_a_grid_without_a_single_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preset demo does not say .* presets that do: paper"):
        run_settings("demo", {})
    with pytest.raises(UserError, match="neither a file nor a preset"):
        run_settings("papper", {})
    source = write(tmp_path, 'epochs = 3\nlr = [0.1, 0.2]\n[run]\noptimizer = "adam"\n[run.adam]\nlr = 0.01\n')
    assert run_settings(source, {"seed": 4}) == {"epochs": 3, "optimizer": "adam", "lr": 0.01, "seed": 4}
    with pytest.raises(UserError, match="unknown key 'beta3'"):
        make_run(run_settings(write(tmp_path, "[run]\nbeta3 = 1\n"), {}), "run")
