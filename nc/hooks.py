"""Capture the features of a head and of other layers while a model runs, and run it in evaluation mode."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: Makes features `[B, d]` of a layer's output.
Pool = Callable[[Any], Tensor]


class FeatureHooks:
    """Forward hooks on the head and on other layers; they are installed inside a `with` block.

    Args:
        head: its input and output are captured.
        layers: name -> module; its output is captured and pooled.
        pool: makes features `[B, d]` of a layer's output; None: see `measure`.

    Attributes:
        features: name -> features `[B, d]` of each of `layers`, from the last forward pass.
    """

    def __init__(self, head: nn.Linear, layers: Mapping[str, nn.Module], pool: Pool | None) -> None:
        self._head, self._layers, self._pool = head, layers, pool or _pool_maps
        self._head_calls: list[tuple[Tensor, Tensor]] = []
        self._outputs: dict[str, list[Tensor]] = {}
        self.features: dict[str, Tensor] = {}

    def __enter__(self) -> "FeatureHooks":
        with ExitStack() as stack:

            def capture(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                self._head_calls.append((args[0] if args else kwargs["input"], output))

            stack.callback(self._head.register_forward_hook(capture, with_kwargs=True).remove)
            for name, layer in self._layers.items():
                outputs = self._outputs[name] = []
                stack.callback(layer.register_forward_hook(partial(self._capture_output, outputs)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _capture_output(self, outputs: list[Tensor], _: nn.Module, __: Any, output: Any) -> None:
        pooled = self._pool(output)
        # The next layer may work in place, as many a ReLU does.
        outputs.append(pooled.clone() if isinstance(pooled, Tensor) else pooled)

    def forward(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the model; return the head's features `[B, d]` and logits `[B, K]`.

        Raises:
            ValueError: the head or a layer did not run exactly once, features that are not `[B, d]`.
        """
        self._head_calls.clear()
        for outputs in self._outputs.values():
            outputs.clear()
        device = next(model.parameters()).device
        if isinstance(inputs, Mapping):
            model(**{name: _to(value, device) for name, value in inputs.items()})
        else:
            model(*(_to(value, device) for value in (inputs if isinstance(inputs, tuple | list) else (inputs,))))
        calls_by_name: dict[str, list[Any]] = {"the head": self._head_calls, **self._outputs}
        for name, calls in calls_by_name.items():
            if len(calls) != 1:
                raise ValueError(f"measure: {name} ran {len(calls)} times in one forward pass; it must run once")
        features, logits = self._head_calls[0]
        self.features = {name: outputs[0] for name, outputs in self._outputs.items()}
        for name, h in {"the head's input": features, **self.features}.items():
            if not isinstance(h, Tensor) or h.dim() != 2:
                shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise ValueError(f"measure: features must be [B, d]; of {name} they are {shape}: give `pool`")
        return features, logits


def _pool_maps(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    is_map = isinstance(output, Tensor) and output.dim() in (4, 5)
    return output.mean(tuple(range(2, output.dim()))) if is_map else output


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; restore each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
