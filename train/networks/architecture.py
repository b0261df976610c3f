"""What a model is built for, and the building: of models that come with ncollapse and of the user's."""

import dataclasses
import inspect
import json
import re
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ncollapse.train.config import is_own
from ncollapse.train.errors import OwnCodeError, UserError, out_of_memory
from ncollapse.train.networks import models
from ncollapse.train.networks.model_parts import Parts, find_parts
from ncollapse.train.plugins import Plugins, kept_with_plugins
from ncollapse.train.training.randomness import seeded_as_by_hand

#: Arguments that a model of the user's gets where it takes them.
_FACTS = ("channels", "size", "num_classes", "input_shape")


class _Settings(Protocol):
    @property
    def model(self) -> str: ...
    @property
    def model_options(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def width(self) -> int | None: ...


class _Facts(Protocol):
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def input_dtype(self) -> torch.dtype: ...
    @property
    def num_classes(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model by its name, with all that decides on its layers.

    Attributes:
        input_shape, input_dtype: of one sample; `[C, H, W]` for images.
        options: arguments of a model of the user's, as JSON.
        head: name of the last, linear layer of a model of the user's; "": it is found.
    """

    model: str
    num_classes: int
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype = torch.float32
    width: int | None = None
    options: str = ""
    head: str = ""

    @staticmethod
    def of(run: _Settings, data: _Facts) -> "Architecture":
        """Return the architecture that the settings of a run or of a stack have on a data set."""
        shape, dtype = tuple(data.input_shape), data.input_dtype
        return Architecture(run.model, data.num_classes, shape, dtype, run.width, run.model_options, run.head)

    @property
    def own(self) -> bool:
        """Whether the model is the user's."""
        return is_own("model", self.model)

    @property
    def channels(self) -> int:
        """C of images; of vectors their length."""
        return self.input_shape[0] if self.input_shape else 1

    @property
    def size(self) -> int:
        """Height and width of images; 1 of vectors."""
        return self.input_shape[-1] if len(self.input_shape) > 1 else 1

    def example(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples `[samples, …]`: normal numbers, of integers 0 and 1."""
        shape = (samples, *self.input_shape)
        if self.input_dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=self.input_dtype, device="cpu")
        return torch.randint(0, 2, shape, generator=generator, device="cpu").to(self.input_dtype)

    def example_samples(self) -> int:
        """Return a small number of samples that no other dimension of theirs has."""
        return next(n for n in range(6, 100) if n not in self.input_shape)


def build(architecture: Architecture, seed: int, plugins: Plugins) -> nn.Module:
    """Build a model on the CPU, in training mode, with weights that depend on the seed alone.

    One of the user's is called with those of `channels`, `size`, `num_classes`, `input_shape` and `width` that its
    signature has, and its options; what takes any argument gets `num_classes`. The global random states stay as they
    were.

    Raises:
        UserError: a model of the user's takes an argument that it was not given, lacks one that it was given, is no
            `nn.Module` in the processor's memory, or has hooks on parameters.
        OwnCodeError: it raises an error.
    """
    a = architecture
    if not a.own:
        return models.build(a.model, a.channels, a.size, a.num_classes, seed, a.width)
    what = f"model {a.model}"
    factory = plugins.find("model", a.model)
    arguments = _arguments(a, factory, f"{what} ({plugins.where('model', a.model)})")
    with seeded_as_by_hand(seed), torch.device("cpu"):
        try:
            model = factory(**arguments)
            if isinstance(model, nn.Module) and any(map(is_lazy, (*model.parameters(), *model.buffers()))):
                model.eval()
                with torch.no_grad():
                    model(a.example(a.example_samples()))
        except Exception as error:
            if out_of_memory(error) or isinstance(error, UserError):
                raise
            raise OwnCodeError.of(what, error) from error
    if not isinstance(model, nn.Module):
        place = plugins.where("model", a.model)
        raise UserError(f"{what} ({place}) must return a torch.nn.Module; it returned a {type(model).__name__}")
    what = f"{what} ({plugins.where('model', a.model)})"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise UserError(
                f"{what} puts {name} on {tensor.device}: leave all tensors where they are made; ncollapse moves them"
            )
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise UserError(
                f"{what} has a hook on {name}, which would not run: compute in forward what it does to the gradient, "
                "as with weight * mask, or freeze with requires_grad_(False)"
            )
    return model.train()


@kept_with_plugins
def parts_of(architecture: Architecture, plugins: Plugins) -> Parts:
    """Return the head and the blocks of a model.

    Raises:
        UserError: a model of the user's without a head as `find_parts` asks for; or as `build`.
    """
    model = build(architecture, 0, plugins)
    if isinstance(model, models.Classifier) and not architecture.own:
        return Parts.of(model)
    samples = architecture.example(architecture.example_samples(), torch.Generator().manual_seed(0))
    return parts_in(model, architecture, plugins, samples)


def parts_in(model: nn.Module, architecture: Architecture, plugins: Plugins, samples: Tensor) -> Parts:
    """Return the head and the blocks of a model that was built, found with these samples; errors as `parts_of`."""
    a = architecture
    try:
        with seeded_as_by_hand(0):
            return find_parts(model, samples.clone(), a.num_classes, a.head)
    except Exception as error:
        if out_of_memory(error):
            raise
        if not _is_of_package(error):
            raise OwnCodeError.of(f"model {a.model}", error) from error
        # What `measure` advises is for a model that is measured, not trained.
        text = re.sub(r"; (say|name the head).*", "", str(error).removeprefix("measure: "), flags=re.DOTALL)
        raise UserError(
            f"model {a.model} ({plugins.where('model', a.model)}): {text}; the last layer must be a plain nn.Linear "
            "whose weight is a parameter of the model: name it with `head` where it is not found"
        ) from error


def _is_of_package(error: BaseException) -> bool:
    """Return whether code of ncollapse raised an error itself."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("ncollapse.")


def _arguments(architecture: Architecture, factory: Any, what: str) -> dict[str, Any]:
    a = architecture
    options: dict[str, Any] = json.loads(a.options or "{}")
    facts: Mapping[str, Any] = {name: getattr(a, name) for name in _FACTS}
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some are written in C
        return {"num_classes": a.num_classes} | options
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    given = {name: value for name, value in facts.items() if name in named or (takes_any and name == "num_classes")}
    if a.width is not None:
        options = {"width": a.width} | options
    unknown = [name for name in options if name not in named]
    if unknown and not takes_any:
        raise UserError(f"{what} takes no argument {unknown[0]!r}; it takes {', '.join(named) or 'none'}")
    given |= options
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in given
    ]
    if required:
        raise UserError(
            f"{what} needs {', '.join(required)}: give it in model_options, or a default; a model gets those of "
            f"{', '.join(_FACTS)} that it takes"
        )
    return given
