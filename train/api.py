"""Train one run, or sweep a grid, from Python: a notebook or a script of the user's."""

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from ncollapse.train.config import NAMED, RunConfig, make_run
from ncollapse.train.data.own import Data
from ncollapse.train.engine.options import Options
from ncollapse.train.engine.planning import adopted, device_of, load_keyed, loader
from ncollapse.train.engine.trial import try_own
from ncollapse.train.errors import InterruptError, StoppedError
from ncollapse.train.formatting import plain
from ncollapse.train.grid import load_grid, make_grid
from ncollapse.train.plugins import Plugins, metric_names, with_code
from ncollapse.train.results.record import Evaluation
from ncollapse.train.training.loop import Training

if TYPE_CHECKING:
    import pandas as pd

#: What a data set may be given as, besides a name.
AnyData = Data | tuple[Any, ...] | Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        history: a row per evaluated epoch, 0 being before the first step: `epoch`, the columns of `load_metrics`, and
            one for each metric of one's own.
        status: done, diverged (NaN or inf), degenerate (features or weights have vanished), or interrupted by Ctrl-C.
        model: the trained model, on the CPU or where the instance that was given is.
        run: the settings.
    """

    history: "pd.DataFrame"
    status: str
    model: nn.Module
    run: RunConfig


def train(
    model: str | nn.Module | Callable[..., nn.Module],
    data: str | AnyData = "digits",
    *,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "sgd",
    loss: str | Callable[..., torch.Tensor] = "cross_entropy",
    metrics: Mapping[str, Callable[..., Any]] | Sequence[str | Callable[..., Any]] = (),
    device: str | torch.device | None = None,
    data_dir: Path | str | None = None,
    download: bool = False,
    in_memory: bool = True,
    progress: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train one model and measure NC0–NC4 while it trains.

    Args:
        model: a factory or class, which is called with those of `channels`, `size`, `num_classes` and `input_shape`
            that its signature has, and with `model_options`; or an instance, which is trained itself; or a name of a
            network of ncollapse, or FILE.py:NAME.
        data: a `Data`, (x, y, x_test, y_test), a pair of data sets (train, test), or a function that returns one of
            these and is called with `data_options`; or a name.
        optimizer: a `torch.optim.Optimizer` class, or a name.
        loss: a function (logits `[B, K]`, labels `[B]`) → `[B]`, or a name.
        metrics: name → function of (weight, statistics) and, by name, features, logits, labels → a number; or a list
            of such functions, which have their names, and of FILE.py:NAME.
        device: by default the first GPU, else the CPU.
        data_dir, download: of the data sets of ncollapse, as on the command line.
        in_memory: False: data of your own are read while they are used.
        progress: whether to show a progress bar.
        **settings: of `RunConfig`: lr, momentum, weight_decay, epochs, batch_size, seed, eval_every, model_options, ….

    Returns:
        The history, the status and the trained model. Ctrl-C ends the training, and keeps what is there.

    Raises:
        UserError: settings that are not allowed; a model, optimizer, loss, metric or data set with which training
            cannot work, with file and line where they are known.
        OwnCodeError: one of them has raised an error.

    Example:
        >>> result = train(MyNet, Data(x, y, x_test, y_test), optimizer="adamw", lr=1e-3, epochs=50)
        >>> result.history.plot("epoch", ["nc0", "nc1"], logy=True)
    """
    given: dict[str, dict[str, Any]] = {}
    settings = _lists(settings)
    factory = _Copy(model) if isinstance(model, nn.Module) else model
    values = {"model": factory, "data": data, "optimizer": optimizer, "loss": loss}
    for setting, value in values.items():
        settings[setting] = value if isinstance(value, str) else _register(setting, value, given)
    named = _metrics(metrics, given)
    plugins = Plugins(given=given)
    metric_names(named)  # raises where two have one name
    run = make_run(with_code(settings, plugins), "train")
    where = device_of(None if device is None else str(device), "local")
    where = torch.device("cuda", 0) if where.type == "cuda" and where.index is None else where
    load = {"data_dir": None if data_dir is None else Path(data_dir), "download": download}
    loaded = load_keyed(run.data_key, torch.device("cpu"), plugins=plugins, in_memory=in_memory, **load)
    try_own([run], {run.data_key: loaded}, plugins, named)
    training = Training([run], loaded.to(where), where, plugins=plugins, metrics=named)
    rows, status = [], "interrupted"
    try:
        for event in _shown(training, run, progress):
            if isinstance(event, Evaluation):
                rows.append({"epoch": event.epoch, **{name: value[0] for name, value in event.values.items()}})
                status = event.ended[0].status if event.ended else status
    except KeyboardInterrupt:
        if progress:
            Console().print(plain(f"Stopped in epoch {training.epoch + 1}: what was measured until then is kept."))
    import pandas as pd

    trained = model if isinstance(model, nn.Module) else training.stack.model(0)
    trained.load_state_dict(training.stack.state_dict(0))
    return TrainResult(pd.DataFrame(rows), status, trained, run)


def _shown(training: Training, run: RunConfig, progress: bool) -> Any:
    """Iterate over a training, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(run.optimizer.rpartition(":")[2], total=run.epochs)
        for event in training:
            if isinstance(event, Evaluation):
                values = {name: event.values[name][0] for name in ("train_accuracy", "nc1")}
                text = f"accuracy {values['train_accuracy']:.3f}, NC1 {values['nc1']:.3g}"
                bar.update(task, description=f"{run.optimizer.rpartition(':')[2]}: {text}")
            else:
                bar.update(task, completed=event)
            yield event


class _Copy:
    """A factory that returns copies of a model."""

    __slots__ = ("_model",)  # what it holds is not part of its version

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self._model).cpu()


def _register(setting: str, value: Any, given: dict[str, dict[str, Any]]) -> str:
    """Keep what was given in Python under a name that is not one of ncollapse's, and return the name."""
    name = str(getattr(value, "__name__", setting)).strip("<>")
    if not name.isidentifier() or name in NAMED.get(setting, ()):
        name = f"my_{setting}"
    given.setdefault(setting, {})[name] = value
    return name


def _metrics(metrics: Mapping[str, Any] | Sequence[Any], given: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    if isinstance(metrics, Mapping):
        given["metric"] = dict(metrics)
        return tuple(metrics)
    return tuple(one if isinstance(one, str) else _register("metric", one, given) for one in metrics)


def sweep(
    grid: str | Path | Mapping[str, Any],
    out: Path | str,
    *,
    models: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    optimizers: Mapping[str, Any] | None = None,
    losses: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    where: str | None = None,
    device: str | torch.device | None = None,
    data_dir: Path | str | None = None,
    download: bool = False,
    progress: bool = True,
    **options: Any,
) -> "pd.DataFrame":
    """Train every run of a grid that is not finished in a folder; the same call continues, as on the command line.

    Args:
        grid: a TOML file, the name of a preset, or a mapping with what a file would say: {"model": "mine", "lr": [0.1,
            0.01], "epochs": 50}.
        out: the results folder.
        models, data, optimizers, losses, metrics: name → what the grid's values `model`, `data`, … of this name stand
            for, as in `train`. All metrics are measured. Other processes get them by cloudpickle.
        where: train only the runs that are so: "optimizer=adam lr<0.1".
        device, data_dir, download: as in `train`; the default are all GPUs, else all cores.
        progress: whether to show progress and what the sweep says.
        **options: of the command line, with underscores: workers, stack, engine, minutes, save_weights,
            accept_changes, ….

    Returns:
        The runs of the grid, in the columns of `load_runs`. A run that diverged, or whose code raised an error, is a
        row with that status; those that `minutes` or a signal has left are pending.

    Raises:
        UserError: as on the command line.
        KeyboardInterrupt: Ctrl-C; what is finished is kept in the folder.

    Example:
        >>> runs = sweep({"model": "mine", "lr": [0.1, 0.01]}, "results/mine", models={"mine": MyNet})
        >>> runs.groupby("lr").nc1.median()
    """
    from ncollapse.train.engine.part import part_of
    from ncollapse.train.engine.scheduler import sweep as train_all
    from ncollapse.train.results.reader import load_runs

    named = {"model": models, "data": data, "optimizer": optimizers, "loss": losses, "metric": metrics}
    given = {kind: dict(values) for kind, values in named.items() if values}
    unknown = sorted(options.keys() - {field.name for field in dataclasses.fields(Options)})
    if unknown:
        raise TypeError(f"sweep() got an unexpected keyword argument {unknown[0]!r}")
    found = Options(**options)
    if isinstance(grid, Mapping):
        grids = make_grid(_lists(grid), "grid", Path(out).name, None, Plugins(given=given))
    else:
        source = os.fspath(grid)
        grids = load_grid(source, None, Plugins(Path(source).parent, given) if given else None)
    if metrics:
        grids = dataclasses.replace(grids, metrics=tuple(dict.fromkeys([*grids.metrics, *metrics])))
    grids = grids if where is None else part_of(grids, where)
    console = Console(quiet=not progress)
    out = Path(out)
    for note in grids.notes:
        console.print(plain(f"ncollapse: {note}", "yellow"), soft_wrap=True)
    grids = adopted(grids, out, found, console)
    load = loader(grids, None if data_dir is None else Path(data_dir), download)
    on = device_of(None if device is None else str(device), found.engine)
    try:
        train_all(grids, out, load, on, found, console, f"ncollapse.train.sweep(…, {str(out)!r})")
    except StoppedError as error:
        console.print(plain(f"ncollapse: {error}", "yellow"), soft_wrap=True)
    except InterruptError as error:
        raise KeyboardInterrupt(str(error)) from None
    runs = load_runs(out)
    return runs[runs.id.isin([run.id for run in grids.runs])].reset_index(drop=True)


def _lists(value: Any) -> Any:
    """Return what a grid in Python says, with lists and Python's numbers, as a file would have it."""
    if isinstance(value, Mapping):
        return {str(key): _lists(one) for key, one in value.items()}
    if hasattr(value, "tolist"):  # of NumPy and PyTorch
        return _lists(value.tolist())
    return [_lists(one) for one in value] if isinstance(value, list | tuple | range) else value
