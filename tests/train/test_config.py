"""Settings and grids: defaults that identities rest on, the schedule, and every kind of bad input."""

from pathlib import Path

import pytest

from nc.train.config import OPTIMIZERS, RunConfig, make_run
from nc.train.errors import UserError
from nc.train.grid import load_grid, presets


def test_identity_rests_on_the_settings_alone() -> None:
    """These literals must not change: they name the runs in people's results folders."""
    assert RunConfig().as_dict() == {
        "model": "mlp",
        "data": "digits",
        "optimizer": "sgd",
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
        "eval_every": 5,
    }
    assert RunConfig().id == "fdb795d22450"
    assert RunConfig(optimizer="adamw", lr=0.01).id == RunConfig(lr=1e-2, optimizer="adamw", coupling=0).id
    assert len({RunConfig(seed=s, optimizer=o).id for s in range(50) for o in OPTIMIZERS}) == 300


@pytest.mark.parametrize(
    ("epochs", "drops"), [(200, (66, 133)), (3, (1, 2)), (7, (2, 4)), (2, (1,)), (1, ()), (300, (100, 200))]
)
def test_learning_rate_drops_at_thirds(epochs: int, drops: tuple[int, ...]) -> None:
    factors = [RunConfig(epochs=epochs).lr_factor(epoch) for epoch in range(epochs)]
    expected = [0.1 ** sum(epoch >= drop for drop in drops) for epoch in range(epochs)]
    assert factors == pytest.approx(expected)
    assert {RunConfig(lr_drops=0).lr_factor(epoch) for epoch in range(200)} == {1.0}


def test_last_batch_counts() -> None:
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
        ({"optimizer": "lion9"}, "optimizer = 'lion9': input should be 'sgd'"),
        ({"model": "vit"}, "model = 'vit': input should be 'mlp'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"epochs": 2.5}, "epochs = 2.5"),
        ({"wieght_decay": 0.1}, "unknown key 'wieght_decay', did you mean 'weight_decay'?"),
        ({"zzz": 0.1}, "unknown key 'zzz'; the keys are model, data"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_run(settings, "grid.toml")
    assert str(error.value).startswith("grid.toml: " + message)


def test_presets_are_what_they_say() -> None:
    grids = {name: load_grid(name) for name in presets()}
    assert set(grids) == {"demo", "paper", "coupling"}
    assert all(grid.name == name and grid.description for name, grid in grids.items())
    assert len(grids["paper"].runs) == 3888
    assert len(grids["demo"].runs) >= 48
    assert {run.optimizer for run in grids["demo"].runs} == set(OPTIMIZERS)
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


def test_a_grid_that_is_not_there_lists_the_presets() -> None:
    with pytest.raises(UserError, match=r"neither a file nor a preset \(coupling, demo, paper\)"):
        load_grid("dmeo")
