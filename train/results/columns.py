"""What the columns of the results are: of the store, the DataFrames and the exported files."""

from ncollapse.train.config import DESCRIPTIONS, RunConfig

#: Measured at every evaluated epoch on the training data in evaluation mode, unless said otherwise; definitions and
#: sources in `ncollapse.metrics`. NaN where undefined.
METRICS: dict[str, str] = {
    "nc0": "NC0 = ‖Wᵀ1‖² of the last layer's weights W",
    "nc1": "NC1 = tr(Σ_W Σ_B⁺)/K",
    "nc1_trace_ratio": "tr Σ_W / tr Σ_B",
    "nc1_cdnv": "class-distance normalised variance, mean over pairs of classes",
    "nc2": "NC2: distance of the class means from a simplex ETF",
    "nc2_equinorm": "spread of the norms of the centred class means",
    "nc2_equiangularity": "spread of the angles between them",
    "nc2_weight": "NC2 of the rows of W",
    "nc2_weight_equinorm": "spread of the norms of the rows of W",
    "nc2_weight_equiangularity": "spread of the angles between them",
    "nc3": "NC3: distance of W Mᵀ from a simplex ETF, M the centred class means",
    "nc3_difference": "‖W/‖W‖ − M/‖M‖‖",
    "nc4": "NC4: share of samples not classified as their nearest class mean",
    "train_loss": "mean cross-entropy on the training data",
    "train_accuracy": "share of the training data classified rightly",
    "val_loss": "mean cross-entropy on the validation data",
    "val_accuracy": "share of the validation data classified rightly",
    "weight_norm": "Frobenius norm of W",
    "feature_norm": "mean norm of the centred class means",
    "degenerate": "1 where features or W have vanished, so that NC1–NC3 are undefined",
}

#: Those that any layer has, of its output; maps and tokens are averaged over space.
LAYER_METRICS: tuple[str, ...] = (
    "nc1", "nc1_trace_ratio", "nc1_cdnv", "nc2", "nc2_equinorm", "nc2_equiangularity",
)  # fmt: skip

#: Of a run, beside its settings and its metrics.
_RUN = {
    "id": "12 hexadecimal digits: the hash of the settings",
    "position": "place in the grid, from 0",
    "status": "pending, running, done, diverged (NaN or inf) or degenerate (features or weights have vanished)",
    "stack": "number of the stack that it trained in",
    "session": "number of the start of the sweep that trained it",
    "train_samples": "training samples",
    "seconds": "its share of its stack's training and evaluation time",
    "diverged_epoch": "first evaluated epoch at which its loss was not finite",
}


#: What pandas keeps the values of a type in; None: of integers that may be missing.
_DTYPES = {str: "string", int: "int64", float: "float64", type(None): "Int64"}


def run_columns() -> dict[str, str]:
    """Column -> meaning, of one row per run."""
    last = {name: f"{about}; at the run's last evaluation" for name, about in METRICS.items()}
    start = {f"{name}_start": f"{about}; before the first step" for name, about in METRICS.items()}
    first = {name: _RUN[name] for name in ("id", "position", "status")}
    return first | DESCRIPTIONS | {k: v for k, v in _RUN.items() if k not in first} | last | start


def epoch_columns() -> dict[str, str]:
    """Column -> meaning, of one row per run and evaluated epoch."""
    return {"run": _RUN["id"], "epoch": "epochs trained so far; 0 is before the first step"} | METRICS


def layer_columns() -> dict[str, str]:
    """Column -> meaning, of one row per run, evaluated epoch and block, of runs with `layers` = "all"."""
    place = {
        "position": "place of the block in the network, from 0 at the images",
        "layer": "name of the block, as the model's modules are named",
    }
    about = {
        name: f"{METRICS[name]}; of the block's output, maps and tokens averaged over space" for name in LAYER_METRICS
    }
    return {name: epoch_columns()[name] for name in ("run", "epoch")} | place | about


def run_dtypes() -> dict[str, str]:
    """Column -> dtype in pandas, of one row per run; the same whatever is missing."""
    settings = {name: _DTYPES[type(value)] for name, value in RunConfig().as_dict().items()}
    known = settings | {"id": "string", "status": "string", "seconds": "float64"}
    integers = dict.fromkeys(_RUN, "Int64")
    return dict.fromkeys(run_columns(), "float64") | integers | known


def epoch_dtypes() -> dict[str, str]:
    """Column -> dtype in pandas, of one row per run and evaluated epoch."""
    return {"run": "string", "epoch": "int64"} | dict.fromkeys(METRICS, "float64")


def layer_dtypes() -> dict[str, str]:
    """Column -> dtype in pandas, of one row per run, evaluated epoch and block."""
    names = {"run": "string", "epoch": "int64", "position": "int64", "layer": "string"}
    return names | dict.fromkeys(LAYER_METRICS, "float64")
