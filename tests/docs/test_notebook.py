"""The notebook runs, and its numbers are what its text says of them."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "ten_minutes.ipynb"
#: What the text speaks of, as JSON, of the notebook's variables.
READ = """
import json as _json

print(_json.dumps({
    "before": before.as_dict(), "after": after.as_dict(), "runs": runs.set_index("optimizer").T.to_dict(),
    "epochs": epochs[["run", "epoch", "nc0"]].to_dict("records"),
    "predictions": {run: list(values) for run, values in predictions.items()},
    "row_sum": float(row_sum), "row_sum_of_sign": float(row_sum_of_sign),
}, default=str))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """The notebook with its outputs, and what `READ` prints after its last cell."""
    notebook = nbformat.read(NOTEBOOK, 4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
    read = nbformat.v4.new_code_cell(READ)
    notebook.cells.append(read)
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    notebook.cells.pop()
    return notebook, json.loads(read.outputs[0].text)


def test_it_shows_pictures_and_no_noise(ran: tuple[Any, dict[str, Any]]) -> None:
    notebook, _ = ran
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


def test_collapse_happens(ran: tuple[Any, dict[str, Any]]) -> None:
    _, found = ran
    for name in ("nc0", "nc1", "nc2", "nc3", "nc4"):
        assert found["after"][name] <= found["before"][name] / 3, name
    assert found["after"]["train_accuracy"] >= 0.999


def test_the_optimizer_decides(ran: tuple[Any, dict[str, Any]]) -> None:
    _, found = ran
    runs, epochs = found["runs"], found["epochs"]
    assert all(run["train_accuracy"] >= 0.999 for run in runs.values())
    accuracies = [run["val_accuracy"] for run in runs.values()]
    assert max(accuracies) - min(accuracies) < 0.02
    adam, adamw = runs["adam"], runs["adamw"]
    of_adam = [row["nc0"] for row in epochs if row["run"] == adam["id"]]
    assert max(of_adam) > adam["nc0_start"]
    assert adam["nc0"] < 0.1 * adam["nc0_start"]
    assert adamw["nc0"] > 3 * adamw["nc0_start"]
    for coupled, decoupled in (("adam", "adamw"), ("sgd", "sgdw")):
        assert all(runs[coupled][name] < runs[decoupled][name] for name in ("nc1", "nc3"))
    assert adamw["nc1"] < 0.1 * adamw["nc1_start"]


def test_the_row_sum_is_as_predicted(ran: tuple[Any, dict[str, Any]]) -> None:
    _, found = ran
    runs, predictions = found["runs"], found["predictions"]
    assert set(predictions) == {runs["sgd"]["id"], runs["sgdw"]["id"]}
    for row in found["epochs"]:
        if row["run"] in predictions:
            assert row["nc0"] == pytest.approx(predictions[row["run"]][int(row["epoch"])], rel=1e-3)
    assert runs["sgd"]["nc0"] < 0.1 * runs["sgdw"]["nc0"]
    assert found["row_sum"] < 1e-5
    assert found["row_sum_of_sign"] >= 2
