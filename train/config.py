"""The settings of one run, checked, and their hash, which is the id of the run everywhere."""

import dataclasses
import difflib
import functools
import hashlib
import json
import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ncollapse.train.errors import UserError
from ncollapse.train.optimizers import OPTIMIZERS, TABLE

if TYPE_CHECKING:
    Optimizer = str
else:
    Optimizer = Literal[OPTIMIZERS]

Model = Literal["mlp", "cnn", "resnet9", "vgg9", "vit", "densenet"]
Data = Literal["digits", "mnist", "fashion-mnist", "cifar10", "imagefolder"]
Precision = Literal["fp32", "tf32", "bf16"]
Augment = Literal["none", "flip", "crop", "flip-crop"]
Layers = Literal["head", "all"]
#: Models whose runs train one by one: `stacked_layers` has no stacked form of their layers.
ALONE = ("vit", "densenet")

#: Bounds far beyond any use: what a file says must not become a number that PyTorch or SQLite cannot hold.
MOST = 2**31 - 1
_MOST_DROPS, _MOST_EPOCHS, _MOST_WIDTH = 1_000, 1_000_000, 16_384

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True))
class RunConfig:
    """Settings of one training run."""

    model: Model = "mlp"
    """The network."""
    width: Annotated[int, Field(ge=1, le=_MOST_WIDTH)] | None = None
    """Width of the network: channels of the first convolution (resnet9, vgg9: 64 by default, cnn: 16), hidden units of
    an mlp (64), length of a vit's tokens (192), growth rate of a densenet (12)."""
    data: Data = "digits"
    """The data set; imagefolder reads train/CLASS/* and test/CLASS/* under the data folder."""
    optimizer: Optimizer = "sgd"
    """The update rule; the names ending in w decouple the weight decay."""
    lr: Positive = 0.1
    """Learning rate η before its drops."""
    momentum: BelowOne = 0.9
    """Momentum β; β₁ of optimizers with two betas."""
    weight_decay: NonNegative = 5e-4
    """Weight decay λ."""
    coupling: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the decay added to the gradient; by default 1, and 0 for the names ending in w."""
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
    """Seed of the initial weights and the order of the samples."""
    limit: Count | None = None
    """Train on the first LIMIT samples only."""
    precision: Precision = "fp32"
    """fp32; tf32: matrix products round their factors, on GPUs that have TF32; bf16: activations and matrix products in
    bfloat16; weights, their updates and the last layer in float32."""
    augment: Augment = "none"
    """Flip half of the images, crop them after padding by 4 pixels; drawn again for each epoch."""
    layers: Layers = "head"
    """Layers to measure NC1 and NC2 at: the input of the last layer (head), or also the output of every block (all)."""
    eval_every: Count = 5
    """Epochs between evaluations; the start and the last epoch are always evaluated."""

    def __post_init__(self) -> None:
        if self.coupling is None:
            object.__setattr__(self, "coupling", TABLE[self.optimizer].coupling)
        for name in ("momentum", "weight_decay", "coupling", "beta2", "eps"):
            if getattr(self, name) == 0:  # -0.0 would have another id
                object.__setattr__(self, name, 0.0)

    @property
    def family(self) -> str:
        """The update rule without its coupling: a name of `ncollapse.optim` in lower case."""
        return TABLE[self.optimizer].family

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
        coupling = "" if self.coupling == TABLE[self.optimizer].coupling else f", c={self.coupling:g}"
        return f"{self.optimizer} lr={self.lr:g} β={self.momentum:g} λ={self.weight_decay:g}{coupling}"

    def steps_per_epoch(self, samples: int) -> int:
        """Return the number of steps in an epoch over `samples` training samples; the last, smaller batch counts."""
        return -(-samples // self.batch_size)

    def lr_factor(self, epoch: int) -> float:
        """Return the factor of the learning rate in an epoch, counted from 0."""
        drops = (self.epochs * i // (self.lr_drops + 1) for i in range(1, self.lr_drops + 1))
        return self.lr_drop_factor ** sum(epoch >= drop > 0 for drop in drops)


FIELDS = dataclasses.fields(RunConfig)
#: Setting -> description, for the help of the command line.
DESCRIPTIONS = {name: str(info.description) for name, info in RunConfig.__pydantic_fields__.items()}  # type: ignore[attr-defined]


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
    key = str(error["loc"][0])
    if error["type"] == "unexpected_keyword_argument":
        return unknown_key(key)
    if isinstance(error["input"], list):
        return f"{key} = {short(error['input'])}: one value is meant here, not a list"
    return f"{key} = {short(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def short(value: object) -> str:
    """Return the representation of a value from outside, cut where it is long or deep."""
    return reprlib.repr(value)


def unknown_key(key: str, also: tuple[str, ...] = ()) -> str:
    """Return the message for a key that is no setting and none of `also`, which are allowed there too."""
    return unknown("key", key, [f.name for f in FIELDS] + list(also))


def unknown(what: str, name: str, names: Sequence[str]) -> str:
    """Return the message for a name that is none of `names`, with the nearest of them."""
    near = difflib.get_close_matches(name[:60], names, n=1, cutoff=0.5)
    return f"unknown {what} {short(name)}" + (
        f", did you mean {near[0]!r}?" if near else f"; the {what}s are {', '.join(names)}"
    )
