"""What a model keeps from step to step: a checkpoint holds its parameters and buffers, and nothing else."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ncollapse.heads import logits_in
from ncollapse.train.training.randomness import seeded_as_by_hand


def attributes(model: nn.Module) -> dict[str, object]:
    """Return the attributes of all modules that are numbers, texts or tensors, such as a counter of steps: copies."""
    return {
        f"{name}.{key}".lstrip("."): value.detach().clone() if isinstance(value, Tensor) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | Tensor) and key != "training"
    }


def changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return the names of attributes that have another value after than before, or are new."""
    return [name for name, value in after.items() if name not in before or not _same(before[name], value)]


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and (a == b or (a != a and b != b))


def copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, whose stored activations have no history, with which torch copies no tensor."""
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[key] = value.detach()
    return copy.deepcopy(model)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, without gradients."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def lost_on_resume(model: nn.Module, fresh: nn.Module, samples: Tensor, classes: int) -> list[str] | None:
    """Find what a model keeps from step to step that is no parameter or buffer.

    A model that stores what it has seen last, and reads it no more, keeps nothing.

    Args:
        model, fresh: two of one seed, in training mode.
        samples: `[B, …]`.
        classes: K.

    Returns:
        Names of attributes, of which a list is empty where what is kept has no name; None: nothing is lost.
    """
    first, initial = attributes(model), {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    _run(model, samples, classes)
    after_one = attributes(model)
    _set(model, initial)
    _run(model, samples, classes)
    if again := changed(after_one, attributes(model)):
        return again
    _set(fresh, tensors_of(model))
    # Other samples, of which a model that prepares itself in its first step would compute other numbers.
    part = samples[: (len(samples) + 1) // 2]
    for train in (False, True):
        ours, theirs = (_run(one.train(train), part, classes) for one in (model, fresh))
        if not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(ours, theirs, strict=True)):
            return changed(first, attributes(model))
    return None


def _set(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors_of(model).items():
        tensor.copy_(values[name])


def _run(model: nn.Module, samples: Tensor, classes: int) -> list[Tensor]:
    with seeded_as_by_hand(0), torch.set_grad_enabled(model.training):
        return logits_in(model(samples.clone()), len(samples), classes)
