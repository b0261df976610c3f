"""A model of the user's is tried with one batch, before anything trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.heads import logits_in, tensors_in
from ncollapse.train.errors import OwnCodeError, UserError, out_of_memory
from ncollapse.train.networks.architecture import Architecture, build, parts_in
from ncollapse.train.networks.kept_state import lost_on_resume, tensors_of
from ncollapse.train.networks.stacked_layers import ForwardContext
from ncollapse.train.networks.whole_module import WholeModule
from ncollapse.train.plugins import Plugins
from ncollapse.train.training.randomness import seeded_as_by_hand


def try_model(architecture: Architecture, plugins: Plugins, batch_x: Tensor, batch_y: Tensor) -> None:
    """Build a model of the user's, and run it forward and backward on one batch.

    Args:
        batch_x: samples `[B, …]` on the CPU.
        batch_y: their labels `[B]`.

    Raises:
        UserError: as `build`; logits that are no `[B, K]` on the samples' device, no head that can be measured, a loss
            or a gradient that is not finite, a parameter that is not float32 or gets no gradient, a tensor that a
            forward pass registers or gives another shape, other outputs than the head's in training, something that is
            kept from step to step and is no parameter or buffer. The message is one sentence with file and line.
        OwnCodeError: the model raises an error.
    """
    a = architecture
    model = build(a, 0, plugins)
    what = f"model {a.model} ({plugins.where('model', a.model)})"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise UserError(f"{what}: its parameter {name} is {parameter.dtype}; ncollapse trains float32")
    if not trained:
        raise UserError(f"{what} has no parameter that is trained")
    registered = _shapes(model)
    with seeded_as_by_hand(0), _blamed(a.model):
        output = model(batch_x.clone())
    shape, found = (len(batch_x), a.num_classes), list(tensors_in(output))
    logits = logits_in(output, *shape)
    if not logits:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found) or f"no tensor, but {type(output).__name__}"
        raise UserError(
            f"{what} must return logits [B, K] = {list(shape)} for samples {list(batch_x.shape)}; it returns {shapes}"
        )
    if logits[0].device != batch_x.device:
        raise UserError(f"{what} moves data to {logits[0].device}: leave it on the device of the samples")
    for name, tensor_shape in _shapes(model).items():
        if registered.get(name) != tensor_shape:
            does = "gives another shape to" if name in registered else "registers"
            raise UserError(f"{what}: its forward pass {does} {name}: register it in __init__, with its final shape")
    parts = parts_in(model, a, plugins, batch_x)
    tensors = {name: value.detach().unsqueeze(0) for name, value in (*model.named_parameters(), *model.named_buffers())}
    leaves = [tensors[name].requires_grad_() for name in trained]
    program = WholeModule(model, parts, len(a.input_shape), vmapped=False)
    with seeded_as_by_hand(0), _blamed(a.model):
        _, of_head = program(batch_x, ForwardContext(1, tensors, train=True))
        loss = F.cross_entropy(of_head[0], batch_y)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    if not loss.isfinite():
        raise UserError(f"{what}: the cross-entropy of its first batch is {loss.item()}")
    for name, grad in zip(trained, grads, strict=True):
        if grad is None:
            raise UserError(
                f"{what}: the logits of its head {parts.head} do not depend on its parameter {name}, which gets no "
                "gradient: use it, remove it or freeze it with requires_grad_(False)"
            )
        if not bool(grad.isfinite().all()):
            raise UserError(f"{what}: the gradient of its parameter {name} is not finite in the first batch")
    with _blamed(a.model):
        _check_training_output(model, parts.head, batch_x, shape, what)
        lost = lost_on_resume(build(a, 0, plugins), build(a, 0, plugins), batch_x, a.num_classes)
    if lost is not None:
        raise UserError(
            f"{what} keeps {', '.join(lost) or 'something'} from step to step, which no checkpoint holds, so that an "
            "interrupted run would be another one: make it a buffer, with register_buffer"
        )


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors_of(model).items()}


def _check_training_output(model: nn.Module, head: str, samples: Tensor, shape: tuple[int, int], what: str) -> None:
    """Raise UserError where a model in training mode returns something else than the logits of its head."""
    seen: list[Tensor] = []
    # What comes after the head may work in place.
    handle = model.get_submodule(head).register_forward_hook(lambda *call: seen.append(call[-1].detach().clone()))
    try:
        with seeded_as_by_hand(0):
            returned = logits_in(model.train()(samples.clone()), *shape)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UserError(f"{what} runs its head {head} {len(seen)} times in training mode; it must run once")
    if not any(torch.allclose(tensor, seen[0], equal_nan=True) for tensor in returned):
        raise UserError(f"{what}: in training mode too it must return the logits of its head {head}, without a scale")


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, UserError):
            raise
        raise OwnCodeError.of(f"model {name}", error) from error
