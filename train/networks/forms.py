"""How the runs of a model are computed: layer by layer, under vmap, or one by one; decided by trying."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ncollapse.train.errors import OwnCodeError, first_line, out_of_memory
from ncollapse.train.networks.architecture import Architecture, build, parts_of
from ncollapse.train.networks.kept_state import attributes, changed, copy_of
from ncollapse.train.networks.layer_graph import LayerGraph, NoLayerGraphError
from ncollapse.train.networks.model_parts import Parts
from ncollapse.train.networks.models import Classifier
from ncollapse.train.networks.stacked_layers import ForwardContext
from ncollapse.train.networks.whole_module import WholeModule
from ncollapse.train.plugins import Plugins, kept_with_plugins
from ncollapse.train.training.randomness import random_bytes, seeded_as_by_hand

_CPU = torch.device("cpu")
#: Two results are equal where they differ by the first share of their norm and the second of the norm of all results
#: together, since rounding may be all that a gradient consists of; in float64, and in float32.
_BOUNDS, _BOUNDS_OF_FLOAT32 = (1e-6, 1e-9), (1e-3, 1e-5)
#: A model with more parameters than this keeps any processor busy by itself.
_MOST_PARAMETERS = 50_000_000


@dataclasses.dataclass(frozen=True)
class Form:
    """How several runs of a model are computed.

    Attributes:
        kind: "layers": on layers for stacked runs; "vmap": the model itself under `torch.func.vmap`; "alone": one run
            after the other, which a stack gains nothing from.
        reason: why not layer by layer, or why alone.
    """

    kind: Literal["layers", "vmap", "alone"]
    reason: str = ""


class Program(Protocol):
    """The forward pass of a model for R runs.

    Attributes:
        module: gives the layers; its own weights are not used.
        channels_last: whether it wants convolution weights in channels-last memory.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def parts(self) -> Parts: ...
    @property
    def channels_last(self) -> bool: ...
    def __call__(self, samples: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Compute features `[R, B, d]` and logits `[R, B, K]` of samples `[B, …]` for all runs or `[R, B, …]`."""

    def copied(self, name: str, value: Tensor) -> bool:
        """Return whether a parameter `[R, …]` may be replaced by a bfloat16 copy in the forward pass."""


def make_program(module: nn.Module, architecture: Architecture, precision: str, plugins: Plugins) -> Program:
    """Make the forward pass of a model in the form that suits it; the module gives the layers, not the weights.

    Raises:
        UserError: as `parts_of`.
    """
    return _program(
        module, architecture, parts_of(architecture, plugins), form_of(architecture, precision, plugins).kind
    )


def built_in_program(model: Classifier) -> Program:
    """Make the forward pass of a model that comes with ncollapse, or of layers like theirs.

    Raises:
        NoLayerGraphError: a layer has no form for stacked runs.
    """
    parts = Parts.of(model)
    return LayerGraph(model, parts) if model.layered else WholeModule(model, parts, 3, vmapped=True, ours=True)


def _program(module: nn.Module, architecture: Architecture, parts: Parts, kind: str) -> Program:
    if kind == "layers":
        return LayerGraph(module, parts)
    dims = len(architecture.input_shape)
    return WholeModule(module, parts, dims, vmapped=kind == "vmap", ours=not architecture.own)


@kept_with_plugins
def form_of(architecture: Architecture, precision: str, plugins: Plugins) -> Form:
    """Decide how several runs of a model are computed, by a step of two models of different seeds.

    The first form of "layers" and "vmap" is taken in which features, logits, gradients, buffers and blocks are those
    that the two models have alone, up to rounding. Of models that draw random numbers, or count in a plain attribute,
    each run needs its own: alone.

    Raises:
        UserError: as `parts_of`.
        OwnCodeError: the model raises an error when it runs alone.
    """
    first = build(architecture, 0, plugins)
    if isinstance(first, Classifier) and not architecture.own and first.layered:
        return Form("layers")  # the tests hold them to their modules
    if (count := sum(p.numel() for p in first.parameters())) > _MOST_PARAMETERS:
        return Form("alone", f"its {count:,} parameters keep a processor busy")
    models = [first, build(architecture, 1, plugins)]
    parts = parts_of(architecture, plugins)
    names = [[(n, p.shape) for n, p in (*m.named_parameters(), *m.named_buffers())] for m in models]
    if names[0] != names[1]:
        return Form("alone", "its tensors depend on the seed")
    generator = torch.Generator().manual_seed(0)
    samples = architecture.example(architecture.example_samples(), generator)
    before_steps = attributes(first)

    def alone(of: Sequence[nn.Module], samples: Tensor) -> list[_Results]:
        return [_results([model], _program(model, architecture, parts, "alone"), samples) for model in of]

    if hooked := [name for name, m in first.named_modules() if m._backward_hooks or m._backward_pre_hooks]:
        return Form("alone", f"{hooked[0] or architecture.model} has backward hooks")
    with seeded_as_by_hand(0):
        before = random_bytes(_CPU)
        try:
            with _HooksSeen() as hooks:
                alone([first], samples)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise OwnCodeError.of(f"model {architecture.model}", error) from error
        if hooks.any:
            return Form("alone", "it registers hooks on tensors")
        if random_bytes(_CPU) != before:
            return Form("alone", "it draws random numbers in training")
        after_one = attributes(first)
        kept = changed(before_steps, {name: v for name, v in after_one.items() if not isinstance(v, Tensor)})
        if not kept and any(isinstance(value, Tensor) for value in after_one.values()):
            alone([first], samples)  # a tensor that is only stored is the same again
            kept = changed(after_one, attributes(first))
        if kept:
            return Form("alone", f"it changes {kept[0]}, which is no parameter or buffer")
        try:
            # In float64 a deep network has no rounding that could be taken for a difference.
            compared, inputs = [copy_of(model).double() for model in models], _doubled(samples)
            expected, bounds = alone(compared, inputs), _BOUNDS
        except Exception as error:  # it makes float32 tensors of its own
            if out_of_memory(error):
                raise
            compared, inputs = models, samples
            expected, bounds = alone(models, samples), _BOUNDS_OF_FLOAT32
    reasons = []
    kinds: tuple[Literal["layers", "vmap"], ...] = ("layers", "vmap")
    for kind in kinds:
        if kind == "layers" and not architecture.own:
            continue  # one run of a vit or densenet has the numbers of its module
        try:
            with seeded_as_by_hand(0):
                program = _program(compared[0], architecture, parts, kind)
                different = _first_difference(_results(compared, program, inputs), expected, bounds)
                if not different:  # it must also run in the precision of the runs
                    _results(models, program, samples, half=precision == "bf16")
        except Exception as error:  # whatever torch.fx and vmap make of a model
            if out_of_memory(error):
                raise
            said = first_line(error).partition(". ")[0]
            reasons.append(said if isinstance(error, NoLayerGraphError) else f"{type(error).__name__}: {said}")
            continue
        if not different:
            return Form(kind, "; ".join(reasons))
        reasons.append(f"two runs at once have other {different} than alone")
    return Form("alone", "; ".join(reasons))


#: Kind of result -> its tensors, `[R, …]`.
_Results = dict[str, dict[str, Tensor]]


def _results(models: Sequence[nn.Module], program: Program, samples: Tensor, *, half: bool = False) -> _Results:
    """Return what a step in training mode and a pass in evaluation mode compute."""
    tensors = stacked_tensors(models)
    trained = {name: tensors[name].requires_grad_() for name, p in models[0].named_parameters() if p.requires_grad}
    context = ForwardContext(len(models), tensors, train=True, half=half)
    features, logits = program(samples, context)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape[1:], generator=generator, dtype=logits.dtype, device="cpu").expand_as(logits)
    grads = torch.autograd.grad(logits, list(trained.values()), weights, allow_unused=True, materialize_grads=True)
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        evaluated = program(samples, dataclasses.replace(context, train=False, outputs=outputs))
    return {
        "logits": {"training": logits.detach(), "evaluation": evaluated[1]},
        "features": {"training": features.detach(), "evaluation": evaluated[0]},
        "gradients": dict(zip(trained, grads, strict=True)),
        "buffers": {name: value for name, value in tensors.items() if name not in trained},
        "blocks": outputs,
    }  # fmt: skip


def stacked_tensors(models: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers of models by name, `[R, …]`."""
    of_each = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in models]
    return {name: torch.stack([of_one[name].detach() for of_one in of_each]) for name in of_each[0]}


def _doubled(samples: Tensor) -> Tensor:
    return samples.double() if samples.is_floating_point() else samples


def _first_difference(found: _Results, expected: Sequence[_Results], bounds: tuple[float, float]) -> str:
    """Name the first result, of all runs `[R, …]`, that is not that of each run alone; "" if all are."""
    for kind, of_names in found.items():
        for r, one in enumerate(expected):
            whole = sum(float(value.double().norm() ** 2) for value in one[kind].values()) ** 0.5
            for name, value in of_names.items():
                ours, theirs = value[r].double(), one[kind][name][0].double()
                bound = bounds[0] * theirs.norm() + bounds[1] * whole
                if ours.shape != theirs.shape or not bool((ours - theirs).norm() <= bound):
                    return f"{kind} ({name})"
    return ""


class _HooksSeen(TorchFunctionMode):
    """Notes whether hooks are registered on tensors: under vmap no gradient is seen, and a model may leave them out."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any |= func is Tensor.register_hook
        return func(*args, **(kwargs or {}))
