"""Capture the features of a head and of other layers while a model runs in evaluation mode."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: Makes features `[B, d]` of a layer's output.
Pool = Callable[[Any], Tensor]


@contextmanager
def capture_features(
    model: nn.Module, head: nn.Linear, layers: Mapping[str, nn.Module], pool: Pool | None
) -> Iterator[Callable[[Any], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Put the model into evaluation mode within the block; afterwards restore each module's mode, without hooks.

    Args:
        pool: makes features of the outputs of `layers`; None: see `measure`.

    Yields:
        A function that runs the model on inputs. It returns the head's features `[B, d]` and logits `[B, K]`, and
        name -> features `[B, d]` of each of `layers`. It raises ValueError if the head or a layer did not run exactly
        once, or for features that are not `[B, d]`.
    """
    calls: dict[str, list[Any]] = {name: [] for name in ("the head", *layers)}

    def capture_head(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        calls["the head"].append((args[0] if args else kwargs["input"], output))

    def capture(name: str, _: nn.Module, __: Any, output: Any) -> None:
        pooled = (pool or _pool_maps)(output)
        # The next layer may work in place, as many a ReLU does.
        calls[name].append(pooled.clone() if isinstance(pooled, Tensor) else pooled)

    def run(inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        for captured in calls.values():
            captured.clear()
        device = next(model.parameters()).device
        if isinstance(inputs, Mapping):
            model(**{name: _to(value, device) for name, value in inputs.items()})
        else:
            model(*(_to(value, device) for value in (inputs if isinstance(inputs, tuple | list) else (inputs,))))
        for name, captured in calls.items():
            if len(captured) != 1:
                raise ValueError(f"measure: {name} ran {len(captured)} times in one forward pass; it must run once")
        (features, logits), *outputs = (captured[0] for captured in calls.values())
        of_layers = dict(zip(layers, outputs, strict=True))
        for name, h in {"the head's input": features, **of_layers}.items():
            if not isinstance(h, Tensor) or h.dim() != 2:
                shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise ValueError(f"measure: features must be [B, d]; of {name} they are {shape}: give `pool`")
        return features, logits, of_layers

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        stack.callback(head.register_forward_hook(capture_head, with_kwargs=True).remove)
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(partial(capture, name)).remove)
        yield run


def _pool_maps(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    is_map = isinstance(output, Tensor) and output.dim() in (4, 5)
    return output.mean(tuple(range(2, output.dim()))) if is_map else output


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
