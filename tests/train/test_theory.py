"""`ncollapse theory`: the table, the figure, and bad arguments."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ncollapse.optimizer_table import LABELS, OPTIMIZERS, TABLE
from ncollapse.plot.step_lines import Trajectory, nc0_over_steps
from ncollapse.train.commands.theory import Setting, print_theory, trajectories
from ncollapse.train.errors import UserError

SMALL = Setting(classes=4, dim=5, steps=120, lr=0.1, weight_decay=0.1)


@pytest.fixture(scope="module")
def found() -> list[Trajectory]:
    return trajectories(SMALL)


def test_every_optimizer_starts_at_the_same_point(found: list[Trajectory]) -> None:
    assert [one.optimizer for one in found] == list(OPTIMIZERS)
    assert {one.nc0[0] for one in found} == {found[0].nc0[0]}
    assert all(one.coupling == TABLE[one.optimizer].coupling for one in found)
    assert all(one.steps[0] == 0 and one.steps[-1] == 120 for one in found)


def test_predictions_are_of_the_same_runs(found: list[Trajectory]) -> None:
    kinds = {one.optimizer: one.prediction.kind for one in found if one.prediction}
    assert kinds == {
        "sgd": "exact", "sgdw": "exact", "signum": "bound", "signumw": "exact", "lionw": "exact", "muonw": "exact",
    }  # fmt: skip
    for one in found:
        if one.prediction is None:
            assert TABLE[one.optimizer].theorem == "–" or "idealises" in TABLE[one.optimizer].theorem
            continue
        predicted = one.prediction.nc0[one.steps]
        if one.prediction.kind == "exact":
            np.testing.assert_allclose(one.nc0, predicted, rtol=1e-9)
        else:
            assert (one.nc0[1:] <= predicted[1:]).all()


def test_learning_rates_drop_tenfold_at_a_third_and_two_thirds() -> None:
    np.testing.assert_allclose(Setting(steps=6, lr=0.5).lrs, [0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_prints_a_table_and_writes_a_figure(tmp_path: Path, decay: float) -> None:
    text = io.StringIO()
    setting = Setting(classes=3, steps=30, weight_decay=decay)
    print_theory(setting, tmp_path / "out", Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines[:-2])) <= 80
    rows = {cells[0]: cells for line in lines if (cells := line.split()) and cells[0] in LABELS.values()}
    assert list(rows) == [LABELS[name] for name in OPTIMIZERS]
    for one in trajectories(setting):
        cells = rows[LABELS[one.optimizer]]
        assert cells[1:3] == [f"{one.nc0[0]:.3g}", f"{one.nc0[-1]:.3g}"]
        if one.prediction:
            assert cells[3:5] == [f"{one.prediction.nc0[-1]:.3g}", one.prediction.kind]
        else:
            assert cells[3] == "–"
    assert ("K(K − 2)²/λ² = 300" in text.getvalue()) == (decay > 0)
    assert lines[-2:] == [str(tmp_path / "out" / name) for name in ("theory.png", "theory.svg")]
    assert (tmp_path / "out" / "theory.png").read_bytes().startswith(b"\x89PNG\r\n")
    drawn = {element.text for element in ET.parse(tmp_path / "out" / "theory.svg").iter() if element.text}
    assert {*LABELS.values(), "predicted", "upper bound", "step", "NC0 = ‖Wᵀ1‖²"} <= drawn


def test_it_says_up_to_where_a_prediction_holds(tmp_path: Path) -> None:
    text = io.StringIO()
    setting = Setting(classes=3, steps=600, lr=3.0, weight_decay=1e-3)
    print_theory(setting, tmp_path, Console(file=text, width=80))
    found = {one.optimizer: one.prediction for one in trajectories(setting)}
    theory = found["signumw"]
    assert theory is not None
    assert theory.holds_until is not None
    lines = [line for line in text.getvalue().splitlines() if "underflows" in line]
    assert max(map(len, lines)) <= 80
    expected = f"SignumW: exact to step {theory.holds_until:,}; then the softmax underflows (logit gap 743)"
    assert expected in lines
    assert not any(line.startswith("SGD") for line in lines)


def test_the_figure_has_a_line_for_every_trajectory_and_prediction(found: list[Trajectory]) -> None:
    figure = nc0_over_steps(found)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    predicted = [one for one in found if one.prediction]
    assert len(lines) == len(found) + len(predicted)
    for line, one in zip(lines, found, strict=False):
        np.testing.assert_array_equal(line.get_xdata(), one.steps[1:])
        np.testing.assert_array_equal(line.get_ydata(), one.nc0[1:])
    for line, one in zip(lines[len(found) :], predicted, strict=True):
        assert one.prediction is not None
        np.testing.assert_array_equal(line.get_ydata(), one.prediction.nc0[one.steps[1:]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": 1}, "--classes must be at least 2; got 1"),
        ({"dim": 4}, "--dim must be at least the number of classes, 10; got 4"),
        ({"steps": 2}, "--steps must be at least 3; got 2"),
        ({"lr": 0.0}, "--lr must be positive; got 0"),
        ({"lr": float("nan")}, "--lr must be positive; got nan"),
        ({"momentum": 1.0}, r"--momentum must lie in \[0, 1\); got 1"),
        ({"weight_decay": -0.1}, "--weight-decay must be at least 0; got -0.1"),
    ],
)
def test_bad_arguments_are_explained(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Setting(**options)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        print_theory(Setting(classes=2, steps=3), tmp_path / "file", Console(quiet=True))
