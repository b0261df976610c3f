"""Sweeps with a model, data, an optimizer, a loss and a metric of the user's: from a file, and from Python."""

import gc
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from ncollapse.train import Data, cli, load_metrics, load_runs, sweep, train
from ncollapse.train.errors import NoResultsError, UserError
from ncollapse.train.plugins import Plugins

EXAMPLE = Path(__file__).parents[2] / "examples" / "bring_your_own"

MINE = """
    import torch
    from torch import nn
    from ncollapse.train import Data

    class Net(nn.Module):
        def __init__(self, channels, size, num_classes, depth=1):
            super().__init__()
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 8), nn.ReLU())
            self.norm = nn.BatchNorm1d(8)
            self.last = nn.Linear(8, num_classes)

        def forward(self, x):
            return self.last(self.norm(self.hidden(x)))

    def few(seed=0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(48, 1, 4, 4, generator=g)
        return Data(x[:32], (torch.arange(32) % 3), x[32:], (torch.arange(16) % 3))

    class Steps(torch.optim.SGD):
        def step(self, closure=None):
            self.taken = getattr(self, "taken", 0) + 1
            if self.param_groups[0]["lr"] > 1 and self.taken > 3:
                raise ArithmeticError("too long a step")
            return super().step(closure)

    def absolute(logits, labels):
        return (logits - nn.functional.one_hot(labels, logits.shape[-1])).abs().sum(-1)

    def spread(weight, statistics, features):
        return features.std()
"""
GRID = """
    name = "own"
    model = "mine.py:Net"
    data = "mine.py:few"
    epochs = 2
    eval_every = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file of the user's and a grid."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write("mine.py", MINE)
    write("grid.toml", GRID)
    return tmp_path


def write(name: str, text: str) -> None:
    Path(name).write_text(textwrap.dedent(text))


def swept(*options: str) -> pd.DataFrame:
    cli.main(["sweep", "grid.toml", "--out", "out", "--device", "cpu", "--workers", "1", *options])
    return load_runs("out")


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a sweep that must end with an exit code; return the one line that it says on stderr."""

    def run(code: int, *options: str) -> str:
        with pytest.raises(SystemExit) as end:
            swept(*options)
        assert end.value.code == code
        return " ".join(capsys.readouterr().err.split())

    return run


def test_the_example_trains_from_the_command_line_and_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are the same: names are the only difference."""
    for file in EXAMPLE.glob("*"):
        if file.is_file():
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main(["sweep", "grid.toml", "--out", "out", "--device", "cpu", "--workers", "1", "--epochs", "2"])
    runs = load_runs("out")
    assert set(runs.status) == {"done"}
    assert len(runs) == 12
    assert runs.smallest_distance.notna().all()
    page = Path("out/report.html").read_text()
    for name in ("WideNet", "NormalizedSGD", "hinge", "smallest_distance"):
        assert name in page
    mine = Plugins(tmp_path)
    found = sweep(
        {"model": "wide", "data": "few", "optimizer": ["sgd", "normalized"], "lr": [0.05], "epochs": np.int64(2)},
        "python", models={"wide": mine.find("model", "mine.py:WideNet")},
        data={"few": mine.find("data", "mine.py:few_digits")},
        optimizers={"normalized": mine.find("optimizer", "mine.py:NormalizedSGD")},
        metrics={"smallest_distance": mine.find("metric", "mine.py:smallest_distance")},
        device="cpu", workers=1, progress=False,
    )  # fmt: skip
    same = runs[(runs.model_options == '{"depth": 2}') & (runs.loss == "cross_entropy") & (runs.optimizer != "adamw")]
    for column in ("nc0", "nc3", "val_loss", "smallest_distance"):
        assert found[column].tolist() == same[column].tolist()


def test_one_run_from_python(folder: Path) -> None:
    mine = Plugins(folder)
    data = mine.find("data", "mine.py:few")()
    net = mine.find("model", "mine.py:Net")(1, 4, 3)
    before = [p.clone() for p in net.parameters()]
    result = train(
        net, data, optimizer=torch.optim.NAdam, lr=0.01, epochs=3, eval_every=2, batch_size=8, progress=False,
        loss=mine.find("loss", "mine.py:absolute"), metrics={"spread": mine.find("metric", "mine.py:spread")},
    )  # fmt: skip
    assert result.history.epoch.tolist() == [0, 2, 3]
    assert result.status == "done"
    assert result.model is net
    assert all(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    with torch.no_grad():
        hits = net.eval()(data.x).argmax(-1) == data.y
    assert result.history.train_accuracy.iloc[-1] == pytest.approx(float(hits.double().mean()))
    assert result.history.spread.notna().all()
    again = train(type(net), data, optimizer="sgd", seed=3, epochs=1, progress=False)
    assert isinstance(again.model, type(net))
    assert (again.run.model, again.run.seed) == ("Net", 3)


def test_arrays_and_a_lambda_train_from_python() -> None:
    x, y = np.random.default_rng(0).normal(size=(40, 6)).astype("float32"), np.arange(40) % 4
    result = train(lambda num_classes: nn.Sequential(nn.Linear(6, num_classes)), (x, y, x, y), epochs=1, progress=False)
    assert result.history.nc0.notna().all()


def test_ctrl_c_keeps_what_a_training_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 40:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    calls: list[int] = []
    result = train("mlp", "digits", loss=loss, epochs=50, eval_every=1, progress=False)
    assert result.status == "interrupted"
    assert 1 <= len(result.history) < 50


def evaluations(out: str) -> int:
    try:
        return len(load_metrics(out))
    except NoResultsError:
        return 0


def test_a_killed_sweep_goes_on_with_the_same_numbers(folder: Path) -> None:
    write("grid.toml", GRID + '    optimizer = ["mine.py:Steps", "adamw"]\n    seed = [0, 1, 2]\n')
    options = ["--device", "cpu", "--workers", "1", "--epochs", "40", "--metrics", "mine.py:spread"]
    command = [sys.executable, "-m", "ncollapse.train", "sweep", "grid.toml", *options, "--checkpoint-minutes", "0"]
    with subprocess.Popen([*command, "--out", "killed"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and evaluations("killed") < 30:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    for out in ("killed", "whole"):
        cli.main(["sweep", "grid.toml", *options, "--out", out])
    killed, whole = (load_metrics(out).set_index(["run", "epoch"]).sort_index() for out in ("killed", "whole"))
    pd.testing.assert_frame_equal(killed, whole, check_exact=True)
    assert whole.spread.notna().all()


def test_a_changed_file_is_refused_and_can_be_accepted(folder: Path, fails: Fails) -> None:
    ids = set(swept("--lr", "0.1").id)
    write("mine.py", MINE.replace("nn.Linear(8, num_classes)", "nn.Linear(8, num_classes, bias=False)"))
    text = fails(1, "--lr", "0.1", "0.2")
    assert "mine.py" in text
    assert "bias=False" in text
    assert "--accept-changes" in text
    assert set(load_runs("out").id) == ids
    runs = swept("--lr", "0.1", "0.2", "--accept-changes")
    assert set(runs.status) == {"done"}
    assert len(runs) == 2
    assert ids < set(runs.id)
    swept("--lr", "0.1", "0.2", "0.3")  # it is known from then on


def test_a_run_whose_code_fails_is_recorded_and_the_others_go_on(folder: Path, fails: Fails) -> None:
    write("grid.toml", GRID + '    optimizer = ["mine.py:Steps", "sgd"]\n    lr = [0.1, 2.0]\n    lr_drops = 0\n')
    text = fails(4, "--epochs", "5")
    assert "1 failed (their own code raised an error; tracebacks are in out/failures)" in text
    runs = load_runs("out").set_index("id")
    (failed,) = runs.index[runs.status == "failed"]
    assert (runs.optimizer[failed], runs.lr[failed]) == ("mine.py:Steps", 2.0)
    assert (runs.status == "done").sum() == 3
    log = Path(f"out/failures/{failed}.txt").read_text()
    assert "mine.py, line 25: ArithmeticError: too long a step" in log
    assert "Traceback" in log
    assert load_metrics("out").run.nunique() == 4
    write("mine.py", MINE.replace("> 1 and", "> 5 and"))
    cli.main(["rerun", "out", "--where", "status=failed", "--accept-changes", "--device", "cpu", "--workers", "1"])
    assert set(load_runs("out").status) == {"done"}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (("def __init__(self, channels,", "def __init__(self, deepness, channels,"), [], "mine.py:Net .*'?deepness"),
        (("super().__init__()\n", "raise OSError('no')\n"), [], r"mine\.py, line 8: OSError: no"),
        (("return self.last(self.norm(self.hidden(x)))", "return self.hidden(x)"), [], r"mine\.py:Net"),
        (("return self.last(self", "return self.last.weight.sum() * self.last(self"), [], r"mine\.py:Net"),
        (("self.last = nn", "self.unused = nn.Linear(3, 4); self.last = nn"), [], r"unused"),
        (("return Data(x", "return print(x"), [], r"mine\.py:few"),
        (("(torch.arange(32) % 3)", "(torch.arange(32) - 1)"), [], r"mine\.py:few.*label"),
        (("", ""), ["--optimizer", "mine.py:few"], "optimizer mine.py:few: mine.py, line 17: RuntimeError"),
        (("", ""), ["--optimizer", "torch.optim:LBFGS"], "LBFGS"),
        (("", ""), ["--optimizer", "torch.optim:Adagrad", "--momentum", "0.1", "0.9"], "Adagrad.*momentum"),
        (("", ""), ["--optimizer", "torch.optim:NAdam", "--optimizer-options", '{"typo": 1}'], "typo"),
        ((".sum(-1)", ".sum()"), ["--loss", "mine.py:absolute"], r"mine\.py:absolute"),
        (("return features.std()", "return features"), ["--metrics", "mine.py:spread"], r"spread.*number"),
        (("return features.std()", "return features.std() * float('nan')"), ["--metrics", "mine.py:spread"], "nan"),
        (("def spread(weight, statistics, features)", "def spread(weight, other, statistics)"),
         ["--metrics", "mine.py:spread"], "spread"),
        (("", ""), ["--model", "mine.py:Nett"], "mine.py has no 'Nett'"),
        (("", ""), ["--model-options", '{"deepth": 2}'], "deepth"),
        (("", ""), ["--head", "first"], "first"),
        (("import torch\n", "import torch\nx = \n"), [], r"mine\.py, line 3: invalid syntax"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_trains(
    folder: Path, fails: Fails, change: tuple[str, str], options: list[str], message: str
) -> None:
    assert change[0] in MINE
    write("mine.py", textwrap.dedent(MINE).replace(*change, 1))
    text = fails(1, *options)
    assert re.search(message, text), text
    assert text.count("ncollapse:") <= 2  # a sentence
    assert not Path("out").exists() or load_metrics("out").empty


def test_options_from_python_are_checked() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'workerz'"):
        sweep("demo", "out", workerz=3)
    with pytest.raises(UserError, match="unknown key 'lrate'"):
        train("mlp", lrate=3)
    with pytest.raises(UserError, match="unknown key 'lrs'"):
        sweep({"lrs": [1]}, "out")
    with pytest.raises(UserError, match="unknown optimizer 'adam2'"):
        sweep({"optimizer": "adam2"}, "out")


def test_data_of_every_kind_train(folder: Path) -> None:
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    np.savez("small.npz", x_train=x.numpy(), y_train=y.numpy(), x_test=x.numpy(), y_test=y.numpy())
    write("grid.toml", 'model = "mlp"\ndata = "small.npz"\nepochs = 1\n')
    of_file = swept()
    result = train("mlp", Data(x, y, x, y), epochs=1, progress=False)
    assert of_file.nc1.tolist() == result.history.nc1.tolist()[-1:]


def test_a_mistake_that_the_trial_finds_leaves_nothing_behind(folder: Path, fails: Fails) -> None:
    """Neither the code nor the data of the attempt are in the way of the mended ones."""
    write("mine.py", MINE.replace("self.last(self", "self.hidden(self"))
    fails(1)
    write("mine.py", MINE.replace("torch.randn(48", "torch.rand(48"))
    assert set(swept().status) == {"done"}


def test_rerun_measures_what_the_folder_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = swept("--metrics", "mine.py:spread")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    again = ["rerun", str(folder / "out"), "--where", "status=done", "--device", "cpu", "--workers", "1"]
    with pytest.raises(SystemExit):
        cli.main(again)
    cli.main([*again, "--code-dir", ".."])
    assert load_runs(folder / "out").spread.tolist() == before.spread.tolist()


def test_two_metrics_of_one_name_are_refused(folder: Path, fails: Fails) -> None:
    write("other.py", "def spread(weight, statistics):\n    return 1.0\n")
    assert "both are called spread" in fails(1, "--metrics", "mine.py:spread", "other.py:spread")
    swept("--metrics", "mine.py:spread")
    assert "have mine.py:spread in the column spread" in fails(1, "--seed", "0", "1", "--metrics", "other.py:spread")


def test_a_dotted_name_of_a_metric_has_its_last_part(folder: Path) -> None:
    write("mine.py", MINE + "\n    class Held:\n        margin = staticmethod(spread)\n")
    assert swept("--metrics", "mine.py:Held.margin").margin.notna().all()


def test_many_failures_in_a_row_end_a_sweep(folder: Path, fails: Fails) -> None:
    write(
        "grid.toml",
        GRID + f'    optimizer = "mine.py:Steps"\n    lr = {[0.5] + [2.0 + i for i in range(40)]}\n    lr_drops = 0\n',
    )
    text = fails(1, "--epochs", "5")
    assert "20 runs in a row have failed: optimizer mine.py:Steps: mine.py, line 25: ArithmeticError" in text
    assert 20 <= (load_runs("out").status == "failed").sum() < 40  # one of them ends well


def test_a_script_that_exits_is_an_error_of_its_own(folder: Path, fails: Fails) -> None:
    write("mine.py", MINE + "\n    raise SystemExit(0)\n")
    assert "SystemExit" in fails(1)


def test_a_preset_takes_options_of_its_optimizer(folder: Path) -> None:
    text = """
        optimizer = ["torch.optim:NAdam", "adam"]
        epochs = 1
        [optimizer_options."torch.optim:NAdam"]
        momentum_decay = [0.004, 0.008]
        [run]
        optimizer = "torch.optim:NAdam"
        [run.optimizer_options]
        betas = [0.8, 0.9]
    """
    write("one.toml", text)
    cli.main(["run", "--preset", "one.toml", "--out", "one", "--device", "cpu"])
    assert load_runs("one").optimizer_options.tolist() == ['{"betas": [0.8, 0.9]}']
    cli.main(["run", "--preset", "one.toml", "--optimizer", "adam", "--optimizer-options", "", "--out", "two"])


def test_what_was_given_can_be_forgotten() -> None:
    """A notebook that trains again and again does not keep all its data."""
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    data = Data(x, y, x, y)
    gone = weakref.ref(data)
    train(lambda num_classes: nn.Sequential(nn.Linear(3, num_classes)), data, epochs=1, progress=False)
    del data
    gc.collect()
    assert gone() is None


def test_numbers_of_numpy_and_lists_of_metrics_are_taken(folder: Path) -> None:
    spread = Plugins(folder).find("metric", "mine.py:spread")
    result = train("mlp", metrics=[spread], epochs=np.int64(1), lr=np.float64(0.1), progress=False)
    assert result.history.spread.notna().all()


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (("super().__init__()\n", "raise SystemExit(0)\n"), []),
        (("return features.std()", "raise SystemExit(0)"), ["--metrics", "mine.py:spread"]),
        (("return (logits", "raise SystemExit(0)\n    return (logits"), ["--loss", "mine.py:absolute"]),
    ],
)
def test_code_that_ends_the_process_is_an_error_of_its_own(
    folder: Path, fails: Fails, change: tuple[str, str], options: list[str]
) -> None:
    write("mine.py", textwrap.dedent(MINE).replace(*change, 1))
    assert "SystemExit" in fails(1, *options)


def test_an_optimizer_that_ends_the_process_is_a_failed_run(folder: Path, fails: Fails) -> None:
    write("mine.py", MINE.replace('raise ArithmeticError("too long a step")', "raise SystemExit(0)"))
    write("grid.toml", GRID + '    optimizer = "mine.py:Steps"\n    lr = [0.1, 2.0]\n    lr_drops = 0\n')
    assert "1 failed" in fails(4, "--epochs", "5")
