"""Networks that run as their modules do, every block's metrics, and Muon: in the loop and in sweeps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from ncollapse import measure, ufm
from ncollapse.train import load_layers
from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.grouping import make_stacks
from ncollapse.train.errors import UserError
from ncollapse.train.grid import Grid
from ncollapse.train.networks.models import build
from ncollapse.train.results.columns import LAYER_METRICS
from ncollapse.train.results.export import export_results
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training
from ncollapse.train.training.stack import make_optimizer

CPU = torch.device("cpu")


def evaluations(runs: list[RunConfig], data: Dataset) -> tuple[Training, list[Evaluation]]:
    training = Training(runs, data, CPU)
    return training, [event for event in training if isinstance(event, Evaluation)]


@pytest.mark.parametrize("model", ["vit", "densenet"])
def test_they_train_as_a_plain_loop(model: str, digits: Dataset) -> None:
    width = {"vit": 16, "densenet": 4}[model]
    run = RunConfig(model=model, width=width, lr=0.01, epochs=2, limit=100, batch_size=64)  # type: ignore[arg-type]
    training, events = evaluations([run], digits)
    plain = build(model, 1, 8, 10, 0, width)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(0)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.01 * run.lr_factor(epoch)
        for batch in torch.randperm(100, generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(plain(digits.train_x[batch]), digits.train_y[batch]).backward()
            optimizer.step()
    state = training.stack.state_dict(0)
    assert set(state) == set(plain.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4)
    assert events[-1].values["train_loss"] != events[0].values["train_loss"]


def test_a_transformer_refuses_images_that_its_patches_do_not_cover(digits: Dataset) -> None:
    data = dataclasses.replace(digits, train_x=digits.train_x[..., :6, :6], val_x=digits.val_x[..., :6, :6])
    with pytest.raises(UserError, match=r"model vit needs images whose side is a multiple of 4 pixels; .* has 6"):
        Training([RunConfig(model="vit")], data, CPU)


@pytest.mark.parametrize(("model", "width"), [("vit", 16), ("densenet", 4)])
def test_their_stacks_match_single_runs(model: str, width: int, digits: Dataset) -> None:
    runs = [
        RunConfig(model=model, width=width, lr=lr, seed=seed, epochs=1, limit=96, batch_size=48)
        for lr, seed in ((0.01, 0), (0.02, 1))
    ]
    together, _ = evaluations(runs, digits)
    for i, run in enumerate(runs):
        alone, _ = evaluations([run], digits)
        for name, theirs in alone.stack.state_dict(0).items():
            torch.testing.assert_close(together.stack.state_dict(i)[name], theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("model", "width"), [("mlp", 16), ("cnn", 10), ("resnet9", 10), ("vit", 16), ("densenet", 6)])
def test_blocks_have_the_metrics_of_measure(model: str, width: int, digits: Dataset) -> None:
    run = RunConfig(model=model, width=width, epochs=2, limit=200, lr=0.02, layers="all", eval_every=2)  # type: ignore[arg-type]
    training, events = evaluations([run], digits)
    plain = build(model, 1, 8, 10, 0, width)
    plain.load_state_dict(training.stack.state_dict(0))

    def pool(output: torch.Tensor) -> torch.Tensor:
        return output.mean((-2, -1)) if output.dim() == 4 else output.mean(1) if output.dim() == 3 else output

    expected = measure(plain, (digits.train_x[:200], digits.train_y[:200]), layers=plain.blocks, pool=pool)
    assert tuple(events[-1].layers) == plain.blocks
    assert len(plain.blocks) >= 2
    for name, layer in expected.layers.items():
        for metric, values in events[-1].layers[name].items():
            assert values == [pytest.approx(getattr(layer, metric), rel=1e-3, abs=1e-5)], (name, metric)
    assert events[-1].values["nc1"][0] == pytest.approx(expected.nc1, rel=1e-3)


def test_blocks_of_stacked_runs_are_stored_and_exported(tmp_path: Path, run_sweep: Callable[..., int]) -> None:
    runs = [RunConfig(model="cnn", layers="all", epochs=2, limit=150, eval_every=1, lr=lr) for lr in (0.1, 0.01)]
    grid = Grid("deep", (*runs, RunConfig(model="cnn", epochs=1, limit=150)))
    run_sweep(grid, tmp_path, workers=1)
    layers = load_layers(tmp_path)
    assert set(layers.run) == {run.id for run in runs}
    assert len(layers) == 2 * 3 * 2
    assert list(layers.layer.unique()) == ["features.0", "features.1"]
    assert layers[list(LAYER_METRICS)].notna().all(axis=None)
    assert list(layers.dtypes[["run", "epoch", "position", "layer"]]) == ["string", "int64", "int64", "string"]
    files = export_results(tmp_path, "csv")
    assert "layers.csv" in {path.name for path in files}
    columns = pd.read_csv(tmp_path / "export" / "columns.csv")
    assert set(columns.column[columns.table == "layers"]) == set(layers.columns)


def muons(**settings: Any) -> list[RunConfig]:
    base = RunConfig(optimizer="muon", model="cnn", limit=200, eval_every=3, epochs=3, momentum=0.95, **settings)
    return [
        dataclasses.replace(base, optimizer=name, lr=lr, weight_decay=decay, coupling=None)
        for name, lr, decay in (("muon", 1e-2, 0.01), ("muonw", 3e-3, 0.1), ("muonw", 1e-2, 1.0))
    ]


def test_stacked_muons_match_single_runs(digits: Dataset) -> None:
    together, _ = evaluations(muons(), digits)
    for i, run in enumerate(muons()):
        alone, _ = evaluations([run], digits)
        for name, theirs in alone.stack.state_dict(0).items():
            torch.testing.assert_close(together.stack.state_dict(i)[name], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_is_told_which_matrix_is_the_head(digits: Dataset, precision: str) -> None:
    runs = muons(precision=precision)
    stack = Training(runs, digits, CPU).stack
    seen = make_optimizer(stack, runs)._stepper.observed
    assert seen is not None
    assert seen.head is not None
    assert seen.head.data_ptr() == stack.weight.data_ptr()
    assert bool(seen.weights) == (precision == "bf16")


def test_muons_continue_from_a_checkpoint_and_are_removed_from_the_stack(digits: Dataset) -> None:
    runs = [*muons(), dataclasses.replace(muons()[0], epochs=1)]
    whole = Training(runs, digits, CPU)
    *_, expected = (event for event in whole if isinstance(event, Evaluation))
    half = Training(runs, digits, CPU)
    checkpoint = next(half.checkpoint() for event in half if event == 2)
    resumed = Training(runs, digits, CPU, checkpoint=checkpoint)
    *_, last = (event for event in resumed if isinstance(event, Evaluation))
    assert resumed.stack.runs == 3
    assert last.values == expected.values


def test_decoupled_muon_changes_the_row_sum_only_by_its_decay(digits: Dataset) -> None:
    """Also at a small loss, where Newton–Schulz would amplify the rounding error of the gradient's row sum."""
    run = RunConfig(optimizer="muonw", lr=1e-2, weight_decay=0.05, epochs=80, limit=400, eval_every=80, lr_drops=0)
    _, events = evaluations([run], digits)
    assert events[-1].values["train_loss"][0] < 2e-3
    lrs = [run.lr * run.lr_factor(epoch) for epoch in range(80) for _ in range(4)]
    factor = ufm.row_sum_factor(lrs, weight_decay=0.05, coupling=0.0)[-1]
    assert events[-1].values["nc0"][0] == pytest.approx(factor**2 * events[0].values["nc0"][0], rel=1e-3)


def test_muons_have_separate_stacks() -> None:
    runs = [RunConfig(optimizer=name, seed=s) for s in range(3) for name in ("sgd", "lionw", "muon", "muonw")]  # type: ignore[arg-type]
    kinds = [{run.family == "muon" for run in stack} for stack in make_stacks(runs, lambda key: 100)]
    assert sorted(kinds, key=str) == [{False}, {True}]
