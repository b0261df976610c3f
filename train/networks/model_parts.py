"""The head and the blocks of a model: where NC0–NC4 are measured."""

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from ncollapse.heads import find_module, logits_in
from ncollapse.hooks import watch
from ncollapse.train.networks.models import Classifier


@dataclasses.dataclass(frozen=True)
class Parts:
    """Names of the parts of a model.

    Attributes:
        head: the last, linear layer; its input are the features `[B, d]`, its output the logits `[B, K]`.
        weight, bias: the head's parameters; bias "" for none.
        blocks: the modules whose outputs can be measured too, in the order in which they run.
    """

    head: str
    weight: str
    bias: str
    blocks: tuple[str, ...]

    @staticmethod
    def of(model: Classifier) -> "Parts":
        """Return those of a model that comes with ncollapse."""
        return Parts("fc", "fc.weight", "fc.bias", model.blocks)


def find_parts(model: nn.Module, samples: Tensor, classes: int, head: str = "") -> Parts:
    """Find the head, as `ncollapse.measure` does, or that of the name `head`, and the blocks of a model.

    The blocks are those that the model's attribute `blocks` names, else its children with weights; of those that are
    only lists of modules, theirs.

    Args:
        samples: a batch on which the model is run once, in evaluation mode.
        classes: K.

    Raises:
        ValueError, TypeError, UserWarning: no such head, one that is not a plain linear layer with K outputs, runs more
            than once or over tokens, or whose output is not what the model returns; a block that does not run once for
            each batch.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", "measure:")
        with watch(model, [head or None], {}, None) as run:
            seen = run(samples)
    name, call = seen.heads[0]
    module = find_module(model, name)
    if type(module) is not nn.Linear:
        raise ValueError(f"the head {name} must be a plain nn.Linear; it is a {type(module).__name__}")
    names = {id(parameter): of for of, parameter in model.named_parameters()}
    weight = names.get(id(module.weight))
    if weight is None:
        raise ValueError(f"the weight of the head {name} must be a parameter of the model; it is computed")
    if call.logits.shape != (len(samples), classes):
        raise ValueError(
            f"the head {name} must make logits [B, K] = {(len(samples), classes)} of features [B, d], once for each "
            f"batch; it makes {tuple(call.logits.shape)}"
        )
    returned = logits_in(seen.output, *call.logits.shape)
    if not any(torch.allclose(tensor, call.logits, equal_nan=True) for tensor in returned):
        raise ValueError(f"the model must return the logits of its head {name}, without a softmax or a scale")
    bias = names[id(module.bias)] if module.bias is not None else ""
    return Parts(name, weight, bias, _blocks(model, samples, module))


def _blocks(model: nn.Module, samples: Tensor, head: nn.Module) -> tuple[str, ...]:
    named = getattr(model, "blocks", None)
    modules = dict(model.named_modules())
    given = isinstance(named, tuple | list) and len(named) > 0 and all(isinstance(name, str) for name in named)
    children = [name for name, child in _children(model) if head not in set(child.modules())]
    candidates = [str(name) for name in named] if given and isinstance(named, tuple | list) else children
    if unknown := [name for name in candidates if name not in modules]:
        raise ValueError(f"the model has no module {unknown[0]!r}, which its attribute `blocks` names")
    outputs: dict[str, list[object]] = {name: [] for name in candidates}
    hooks = [
        modules[name].register_forward_hook(lambda *args, name=name: outputs[name].append(args[-1]))
        for name in candidates
    ]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(samples)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in training:
            part.training = mode
    right = [n for n, seen in outputs.items() if len(seen) == 1 and _is_activation(seen[0], len(samples))]
    if given and (wrong := [name for name in candidates if name not in right]):
        raise ValueError(f"the block {wrong[0]!r} must run once for each batch and return a tensor [B, …]")
    return tuple(right)


def _children(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _children(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            found.append((f"{prefix}{name}", child))
    return found


def _is_activation(output: object, samples: int) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and len(output) == samples
