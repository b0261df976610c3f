"""The columns of the results, as DataFrames and exported files have them: name, meaning and type of each."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ncollapse.train.config import DESCRIPTIONS, RunConfig

#: Metric -> meaning. Measured at every evaluated epoch, on the training data in evaluation mode unless stated
#: otherwise; NaN where undefined. Definitions and sources: `ncollapse.metrics`.
METRICS: dict[str, str] = {
    "nc0": "NC0 = ‖Wᵀ1‖² of the last layer's weights W",
    "nc1": "NC1 = tr(Σ_W Σ_B⁺)/K",
    "nc1_trace_ratio": "tr Σ_W / tr Σ_B",
    "nc1_cdnv": "class-distance normalised variance, mean over pairs of classes",
    "nc2": "NC2: distance of the class means from a simplex ETF",
    "nc2_equinorm": "spread of the norms of the centred class means",
    "nc2_equiangularity": "spread of the angles between the centred class means",
    "nc2_weight": "NC2 of the rows of W",
    "nc2_weight_equinorm": "spread of the norms of the rows of W",
    "nc2_weight_equiangularity": "spread of the angles between the rows of W",
    "nc3": "NC3: distance of W Mᵀ from a simplex ETF, M the centred class means",
    "nc3_difference": "‖W/‖W‖ − M/‖M‖‖",
    "nc4": "NC4: share of samples not classified as their nearest class mean",
    "train_loss": "mean of the run's loss over the training data",
    "train_accuracy": "share of the training data classified correctly",
    "val_loss": "mean of the run's loss over the validation data",
    "val_accuracy": "share of the validation data classified correctly",
    "weight_norm": "Frobenius norm of W",
    "feature_norm": "mean norm of the centred class means",
    "degenerate": "1 where features or W have vanished, so that NC1–NC3 are undefined",
}

#: The metrics of every block's output; maps and tokens are averaged over space.
LAYER_METRICS = ("nc1", "nc1_trace_ratio", "nc1_cdnv", "nc2", "nc2_equinorm", "nc2_equiangularity")


class ResultColumn(NamedTuple):
    """A column of results: its name, what it holds, and its dtype in pandas, the same whatever is missing."""

    name: str
    meaning: str
    dtype: str = "float64"


def dtypes(columns: Iterable[ResultColumn]) -> dict[str, str]:
    """Return the dtype of each column in pandas, by its name."""
    return {name: dtype for name, _, dtype in columns}


#: Type of a setting's default -> dtype in pandas; None is the default of integers that may be missing.
_DTYPES = {str: "string", int: "int64", float: "float64", type(None): "Int64"}
_RUN = "12 hexadecimal digits: the hash of the settings"
_EVALUATION = (
    ResultColumn("run", _RUN, "string"),
    ResultColumn("epoch", "epochs trained so far; 0 is before the first step", "int64"),
)

#: Metrics of the user's, as a folder names them: name -> meaning.
OwnMetrics = Mapping[str, str]


def run_columns(own: OwnMetrics) -> tuple[ResultColumn, ...]:
    """Return the columns of runs, one row each, in a folder with these metrics of the user's."""
    measured = {**METRICS, **own}
    return (
        ResultColumn("id", _RUN, "string"),
        ResultColumn("position", "place in the grid, from 0", "Int64"),
        ResultColumn(
            "status", "pending, running, done, diverged (NaN or inf), degenerate (features or weights have vanished), "
            "hopeless (ended early: the training loss had not left chance level) or failed (code of the user's raised "
            "an error)", "string",
        ),
        *(ResultColumn(name, DESCRIPTIONS[name], _DTYPES[type(v)]) for name, v in RunConfig().as_dict().items()),
        ResultColumn("stack", "number of the stack that it trained in", "Int64"),
        ResultColumn("session", "number of the start of the sweep that trained it", "Int64"),
        ResultColumn("train_samples", "training samples", "Int64"),
        ResultColumn("seconds", "its share of its stack's training and evaluation time"),
        ResultColumn("diverged_epoch", "first evaluated epoch at which its loss was not finite", "Int64"),
        *(ResultColumn(name, f"{meaning}; at the run's last evaluation") for name, meaning in measured.items()),
        *(ResultColumn(f"{name}_start", f"{meaning}; before the first step") for name, meaning in measured.items()),
    )  # fmt: skip


def epoch_columns(own: OwnMetrics) -> tuple[ResultColumn, ...]:
    """Return the columns of evaluated epochs, one row per run and epoch, with these metrics of the user's."""
    return (*_EVALUATION, *(ResultColumn(*metric) for metric in {**METRICS, **own}.items()))


#: The columns of a folder without metrics of the user's: of runs, and of evaluated epochs.
RUN_COLUMNS, EPOCH_COLUMNS = run_columns({}), epoch_columns({})

#: One row per run, evaluated epoch and block, of the runs with `layers` = "all".
LAYER_COLUMNS: tuple[ResultColumn, ...] = (
    *_EVALUATION,
    ResultColumn("position", "place of the block in the network, from 0 at the images", "int64"),
    ResultColumn("layer", "name of the block, as the model's modules are named", "string"),
    *(
        ResultColumn(name, f"{METRICS[name]}; of the block's output, maps and tokens averaged over space")
        for name in LAYER_METRICS
    ),
)
