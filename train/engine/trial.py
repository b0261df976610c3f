"""Code of the user's is tried before the first run trains: a mistake shows in seconds, not in epoch 90 of run 1,000."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
from ncollapse.train.engine.grouping import group
from ncollapse.train.errors import OwnCodeError
from ncollapse.train.losses import try_loss
from ncollapse.train.networks.architecture import Architecture
from ncollapse.train.networks.model_trial import try_model
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.foreign import check_optimizers
from ncollapse.train.training.metric_functions import try_metric

#: Samples with which a model is tried.
_BATCH = 8


def try_own(
    runs: Iterable[RunConfig], loaded: Mapping[str, Dataset], plugins: Plugins, metrics: Iterable[str] = ()
) -> None:
    """Try the models, optimizers and losses of some runs, and metrics, where they are not ncollapse's.

    Args:
        loaded: the data sets of the runs, by `RunConfig.data_key`.
        metrics: names of the user's metrics.

    Raises:
        UserError: what is wrong, with file and line where that is known.
    """
    try:
        _try(list(runs), loaded, plugins, metrics)
    except SystemExit as error:
        raise OwnCodeError.of("your code", error) from None


def _try(runs: list[RunConfig], loaded: Mapping[str, Dataset], plugins: Plugins, metrics: Iterable[str]) -> None:
    check_optimizers(runs, plugins)
    for data_key, alike in group(runs, lambda run: run.data_key).items():
        data = loaded[data_key]
        for first, *_ in group(alike, lambda run: (run.loss, run.loss_options, run.label_smoothing)).values():
            try_loss(first, plugins, data.num_classes)
        for architecture in dict.fromkeys(Architecture.of(run, data) for run in alike if "model" in run.own):
            try_model(architecture, plugins, *_first_batch(data))
    for name in metrics:
        try_metric(name, plugins)


def _first_batch(data: Dataset) -> tuple[Tensor, Tensor]:
    if isinstance(data, Streamed):
        return next(data.evaluation_batches("train", _BATCH, torch.device("cpu")))
    return data.train_x[:_BATCH], data.train_y[:_BATCH]
