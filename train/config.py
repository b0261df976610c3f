"""The settings of one run, checked, and their hash, which is the id of the run everywhere.

Model, data, optimizer and loss are names: of what comes with ncollapse, or of code of the user's (`plugins.py`). The
options that such code takes are JSON, so that a run is one row of the results and one hash.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ncollapse.optimizer_table import OPTIMIZERS, row_of
from ncollapse.train.errors import UserError

MODELS = ("mlp", "cnn", "resnet9", "vgg9", "vit", "densenet")
DATA_SETS = ("digits", "mnist", "fashion-mnist", "cifar10", "imagefolder")
LOSSES = ("cross_entropy", "mse", "mse_rescaled", "focal")
#: Those whose gradient by the logits sums to zero over the classes.
_SUM_TO_ZERO = ("cross_entropy", "focal")
#: Settings that are names, with the names of what comes with ncollapse.
NAMED: dict[str, tuple[str, ...]] = {"model": MODELS, "data": DATA_SETS, "optimizer": OPTIMIZERS, "loss": LOSSES}

Precision = Literal["fp32", "tf32", "bf16"]
Augment = Literal["none", "flip", "crop", "flip-crop"]
Layers = Literal["head", "all"]
#: Bounds far beyond any use: what a file says must not become a number that PyTorch or SQLite cannot hold.
MOST = 2**31 - 1
_MOST_DROPS, _MOST_EPOCHS, _MOST_WIDTH, _MOST_PAD = 1_000, 1_000_000, 16_384, 1_024

_LONGEST_NAME, _LONGEST_OPTIONS = 300, 2_000
#: Names of the user's code: a file or module and a name within it, an .npz file, or a name given in Python.
_OF_CODE = re.compile(r"([A-Za-z]:[/\\])?[^:\s{}]([^:{}]*[^:\s{}])?:[^\W\d][\w.]*")
_OF_FILE = re.compile(r"[^\s{}][^{}]*\.npz")
_GIVEN = re.compile(r"[^\W\d][\w.-]*")


def sums_to_zero(name: str) -> bool:
    """Return whether the gradient of a loss by the logits sums to zero over the classes, whatever its options."""
    return name in _SUM_TO_ZERO


def is_own(setting: str, name: str) -> bool:
    """Return whether the value of a setting in `NAMED` names code or data of the user's."""
    return name not in NAMED[setting]


def is_given(setting: str, name: str) -> bool:
    """Return whether the value of a setting in `NAMED` is a name that was given in Python."""
    of_file = setting == "data" and _OF_FILE.fullmatch(name)
    return is_own(setting, name) and not of_file and _GIVEN.fullmatch(name) is not None


def given_key(kind: str, name: str) -> str:
    """Return what a name that was given in Python is called in `RunConfig.code`."""
    return f"{kind} {name}"


def takes_options(setting: str, name: str) -> bool:
    """Return whether the value of a setting in `NAMED` takes options."""
    return is_own(setting, name) or name in ("focal", "mse_rescaled")


def _check_name(setting: str, name: str) -> str:
    kinds = (_OF_CODE, _GIVEN, _OF_FILE) if setting == "data" else (_OF_CODE, _GIVEN)
    fits = len(name) <= _LONGEST_NAME and name.isprintable() and any(kind.fullmatch(name) for kind in kinds)
    if is_own(setting, name) and not fits:
        raise ValueError(_no_name(setting, name))
    return name


def _no_name(setting: str, name: str) -> str:
    own = "FILE.py:NAME, package.module:NAME" + (", FILE.npz" if setting == "data" else "")
    what = {"data": "data set", "loss": "loss function"}.get(setting, setting)
    return f"{unknown(what, name, NAMED[setting])}; of your own: {own}"


def _named(setting: str) -> Any:
    return Annotated[str, AfterValidator(lambda name: _check_name(setting, name))]


def canonical_options(value: Any) -> Any:
    """Return options, a mapping or its JSON, as JSON with sorted keys; "" for none.

    Raises:
        ValueError: no mapping of names to JSON values.
    """
    if isinstance(value, str):
        if not value:
            return ""
        if len(value) > _LONGEST_OPTIONS:
            raise ValueError(f"options of more than {_LONGEST_OPTIONS:,} characters")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'options are JSON, as in {{"depth": 3}}; {error}') from None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        raise ValueError('options are names with values, as in {"depth": 3}')
    try:
        text = json.dumps(dict(value), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"options are numbers, texts, true or false, and lists of them; {error}") from None
    if len(text) > _LONGEST_OPTIONS:
        raise ValueError(f"options of more than {_LONGEST_OPTIONS:,} characters")
    return text if value else ""


OptionsText = Annotated[str, BeforeValidator(canonical_options)]

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True))
class RunConfig:
    """Settings of one training run."""

    model: _named("model") = "mlp"  # type: ignore[valid-type]
    """The network, or one of your own as FILE.py:NAME or package.module:NAME."""
    model_options: OptionsText = ""
    """Arguments of a model of your own as JSON: {"depth": 3}."""
    head: Annotated[str, Field(max_length=_LONGEST_NAME)] = ""
    """Name of the last, linear layer of a model of your own; by default it is found."""
    width: Annotated[int, Field(ge=1, le=_MOST_WIDTH)] | None = None
    """Width of the network: channels of the first convolution (resnet9, vgg9: 64 by default, cnn: 16), hidden units of
    an mlp (64), length of a vit's tokens (192), growth rate of a densenet (12)."""
    data: _named("data") = "digits"  # type: ignore[valid-type]
    """The data set (imagefolder reads train/CLASS/* and test/CLASS/* under the data folder), or one of your own as
    FILE.py:NAME or FILE.npz."""
    data_options: OptionsText = ""
    """Arguments of a data set of your own, as JSON."""
    optimizer: _named("optimizer") = "sgd"  # type: ignore[valid-type]
    """The update rule (the names ending in w decouple the weight decay), or any torch.optim.Optimizer as FILE.py:NAME
    or package.module:NAME."""
    optimizer_options: OptionsText = ""
    """Further arguments of an optimizer that is not ncollapse's, as JSON."""
    loss: _named("loss") = "cross_entropy"  # type: ignore[valid-type]
    """The loss (mse is that of one-hot targets, mse_rescaled for many classes), or one of your own as FILE.py:NAME."""
    loss_options: OptionsText = ""
    """Arguments of the loss, as JSON: {"gamma": 2} of focal, {"k": 15, "M": 30} of mse_rescaled."""
    label_smoothing: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Share of the target that cross_entropy spreads evenly over the classes."""
    lr: Positive = 0.1
    """Learning rate η before its drops."""
    momentum: BelowOne = 0.9
    """Momentum β; β₁ of optimizers with two betas."""
    weight_decay: NonNegative = 5e-4
    """Weight decay λ."""
    coupling: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the decay added to the gradient; by default 1, and 0 for the names ending in w. None for optimizers that
    are not ncollapse's."""
    beta2: BelowOne = 0.999
    """β₂ of optimizers with two betas, also of the Adam that updates the vectors beside an optimizer of matrices."""
    eps: NonNegative = 1e-8
    """ε of Adam."""
    epochs: Annotated[int, Field(ge=1, le=_MOST_EPOCHS)] = 200
    """Passes over the training data."""
    batch_size: Count = 128
    """Samples per step; the last, smaller batch of an epoch is used too."""
    lr_drops: Annotated[int, Field(ge=0, le=_MOST_DROPS)] = 2
    """Number n of learning-rate drops, after ⌊i·epochs/(n + 1)⌋ epochs, i = 1 … n; none before the first epoch."""
    lr_drop_factor: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.1
    """Factor by which each drop multiplies the learning rate."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the initial weights and of the order of the samples."""
    limit: Count | None = None
    """Train on the first LIMIT samples only."""
    pad: Annotated[int, Field(ge=0, le=_MOST_PAD)] = 0
    """Pixels of black border added on every side of the images before they are standardised, by the mean and standard
    deviation of the padded images: 2 makes 28 × 28 to 32 × 32."""
    precision: Precision = "fp32"
    """fp32; tf32: matrix products round their factors, on GPUs that have TF32; bf16: activations and matrix products in
    bfloat16; weights, their updates and the last layer in float32."""
    augment: Augment = "none"
    """Flip half of the images, crop them after padding by 4 pixels; drawn again for each epoch."""
    layers: Layers = "head"
    """Layers to measure NC1 and NC2 at: the input of the last layer (head), or also the output of every block (all)."""
    eval_every: Count = 5
    """Epochs between evaluations; the start and the last epoch are always evaluated."""
    code: Annotated[str, Field(max_length=_LONGEST_OPTIONS)] = ""
    """Versions of the code of your own that the run uses, filled in: NAME=VERSION; …"""

    def __post_init__(self) -> None:
        row = row_of(self.optimizer)
        if self.coupling is None:
            object.__setattr__(self, "coupling", row.coupling)
        elif row.foreign:
            raise ValueError(f"coupling goes with ncollapse's optimizers; {self.optimizer} has its own decay")
        for name in ("momentum", "weight_decay", "coupling", "beta2", "eps", "label_smoothing"):
            if getattr(self, name) == 0:  # -0.0 would have another id
                object.__setattr__(self, name, 0.0)
        for setting in NAMED:
            name = getattr(self, setting)
            if is_given(setting, name) and given_key(setting, name) not in self.versions:
                raise ValueError(_no_name(setting, name))
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing goes with the loss cross_entropy, not {self.loss}")
        for setting in NAMED:
            name = getattr(self, setting)
            if getattr(self, f"{setting}_options") and not takes_options(setting, name):
                raise ValueError(f"{setting}_options do not go with the {setting} {name}, which takes none")
        if self.head and not is_own("model", self.model):
            raise ValueError(f"head goes with a model of your own; that of {self.model} is known")

    @property
    def family(self) -> str:
        """The update rule without its coupling: a name of `ncollapse.optim` in lower case."""
        return row_of(self.optimizer).family

    @property
    def data_key(self) -> str:
        """The data set with options and border: what loads it, and what runs must share to train together."""
        return f"{self.data} {self.data_options}".rstrip() + (f" padded by {self.pad}" if self.pad else "")

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """The versions of the user's code in `code`: file, package or given name -> version."""
        pairs = (one.rpartition("=") for one in self.code.split("; ") if one)
        return {name: version for name, _, version in pairs}

    @property
    def own(self) -> dict[str, str]:
        """The settings that name code of the user's, with their values."""
        return {setting: name for setting in NAMED if is_own(setting, name := getattr(self, setting))}

    def options(self, setting: Literal["model", "data", "optimizer", "loss"]) -> dict[str, Any]:
        """Return the options of a setting, such as `model_options`, by name."""
        found: dict[str, Any] = json.loads(getattr(self, f"{setting}_options") or "{}")
        return found

    @property
    def decay_coupling(self) -> float:
        """The coupling in [0, 1]; it is set in every run."""
        assert self.coupling is not None
        return self.coupling

    @functools.cached_property  # a sweep asks for the ids of all its runs many times
    def id(self) -> str:
        """12 hexadecimal digits, the same for the same settings on every machine.

        Settings at their default are left out, so that a setting added later does not change the ids of older runs.
        """
        settings = {f.name: v for f in FIELDS if (v := getattr(self, f.name)) != f.default}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return {f.name: getattr(self, f.name) for f in FIELDS}

    def describe(self) -> str:
        """Describe the run in one line, by the settings that differ in most grids."""
        row = row_of(self.optimizer)
        more = "" if self.coupling in (None, row.coupling) else f", c={self.coupling:g}"
        more += "" if self.loss == "cross_entropy" else f", {self.loss}"
        more += f" {self.optimizer_options}" if self.optimizer_options else ""
        return f"{self.optimizer} lr={self.lr:g} β={self.momentum:g} λ={self.weight_decay:g}{more}"

    def steps_per_epoch(self, samples: int) -> int:
        """Return the number of steps in an epoch over `samples` training samples; the last, smaller batch counts."""
        return -(-samples // self.batch_size)

    def lr_factor(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch, counted from 0."""
        drops = (self.epochs * i // (self.lr_drops + 1) for i in range(1, self.lr_drops + 1))
        return self.lr_drop_factor ** sum(epoch >= drop > 0 for drop in drops)


FIELDS = dataclasses.fields(RunConfig)
#: The settings that users give; `code` follows from them.
GIVEN = tuple(field for field in FIELDS if field.name != "code")
#: Setting -> description on one line, for the help of the command line.
DESCRIPTIONS = {
    name: " ".join(
        f"{', '.join(NAMED[name])}. {info.description}".split() if name in NAMED else str(info.description).split()
    )
    for name, info in RunConfig.__pydantic_fields__.items()  # type: ignore[attr-defined]
}


def make_run(settings: dict[str, Any], where: str) -> RunConfig:
    """Make a run from settings by name, and check them.

    Raises:
        UserError: unknown keys or values that are not allowed; the message names `where`, these, and what is allowed.
    """
    try:
        return RunConfig(**settings)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:  # of several settings together
        return message
    key = str(error["loc"][0])
    if error["type"] == "unexpected_keyword_argument":
        return unknown_key(key)
    if isinstance(error["input"], list):
        return f"{key} = {short(error['input'])}: one value is meant here, not a list"
    return f"{key} = {short(error['input'])}: {message[0].lower()}{message[1:]}"


def split_data_key(key: str) -> tuple[str, str, int]:
    """Return the data set, its options and its `pad` of a `RunConfig.data_key`."""
    raw = unpadded(key)
    name, brace, rest = raw.partition(" {")
    return name, brace.strip() + rest, int(key[len(raw) :].rpartition(" ")[2] or 0)


def unpadded(key: str) -> str:
    """Return a `RunConfig.data_key` without its border: what is read, which is the same with each."""
    return re.sub(r" padded by [0-9]+\Z", "", key)  # neither names nor options end so


def short(value: object) -> str:
    """Return the representation of a value from outside, cut where it is long or deep."""
    return reprlib.repr(value)


def unknown_key(key: str, also: tuple[str, ...] = ()) -> str:
    """Return the message for a key that is no setting and none of `also`, which are allowed there too."""
    return unknown("key", key, [f.name for f in GIVEN] + list(also))


def unknown(what: str, name: str, names: Sequence[str]) -> str:
    """Return the message for a name that is none of `names`, with the one that was meant where that is likely."""
    near = _nearest(name[:60].lower(), names)
    return f"unknown {what} {short(name)}" + (
        f", did you mean {near!r}?" if near else f"; the {what}s are {', '.join(names)}"
    )


def _nearest(name: str, names: Sequence[str]) -> str | None:
    # Another number is no slip: resnet18 is not resnet9, beta1 not beta2.
    def number(text: str) -> str:
        return "".join(c for c in text if c.isdigit())

    likely = [other for other in names if not number(name) or number(other) in ("", number(name))]
    swapped = [other for other in likely if sorted(other) == sorted(name)]
    return next(iter([*swapped, *difflib.get_close_matches(name, likely, n=1, cutoff=0.7)]), None)
