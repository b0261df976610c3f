"""How `measure` looks into a model: hooks, batches of any kind, and everything put back as it was."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Loader = Iterable[Any] | tuple[Tensor, Tensor]
Pool = Callable[[Any], Tensor]


class Taps:
    """Hooks that catch what goes into the head and what comes out of it and of other layers, while in a `with`."""

    def __init__(self, head: nn.Linear, layers: Mapping[str, nn.Module], pool: Pool | None) -> None:
        self._head, self._layers, self._pool = head, layers, pool or _pooled
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._outputs: dict[str, list[Tensor]] = {}
        self.features: dict[str, Tensor] = {}

    def __enter__(self) -> "Taps":
        with ExitStack() as stack:

            def catch(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
                self._seen.append((args[0] if args else kwargs["input"], output))

            stack.callback(self._head.register_forward_hook(catch, with_kwargs=True).remove)
            for name, layer in self._layers.items():
                outputs = self._outputs[name] = []
                stack.callback(layer.register_forward_hook(partial(self._keep, outputs)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _keep(self, outputs: list[Tensor], _: nn.Module, __: Any, output: Any) -> None:
        pooled = self._pool(output)
        # What comes next in the model may work in place, as many a ReLU does.
        outputs.append(pooled.clone() if isinstance(pooled, Tensor) else pooled)

    def forward(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """Run the model; the head's features `[B, d]` and logits `[B, K]`."""
        self._seen.clear()
        for outputs in self._outputs.values():
            outputs.clear()
        device = next(model.parameters()).device
        if isinstance(inputs, Mapping):
            model(**{name: _to(value, device) for name, value in inputs.items()})
        else:
            model(*(_to(value, device) for value in (inputs if isinstance(inputs, tuple | list) else (inputs,))))
        runs: dict[str, list[Any]] = {"the head": self._seen, **self._outputs}
        for name, calls in runs.items():
            if len(calls) != 1:
                raise ValueError(f"measure: {name} ran {len(calls)} times in one forward pass; it must run once")
        features, logits = self._seen[0]
        self.features = {name: outputs[0] for name, outputs in self._outputs.items()}
        for name, h in {"the head's input": features, **self.features}.items():
            if not isinstance(h, Tensor) or h.dim() != 2:
                shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise ValueError(f"measure: features must be [B, d]; of {name} they are {shape}: give `pool`")
        return features, logits


def find(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
        linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"measure: the model has no module {name!r}; near matches: {', '.join(near) or 'none'}; "
            f"linear layers: {', '.join(linear) or 'none'}"
        )
    return modules[name]


def _pooled(output: Any) -> Tensor:
    output = output[0] if isinstance(output, tuple) else output
    is_map = isinstance(output, Tensor) and output.dim() in (4, 5)
    return output.mean(tuple(range(2, output.dim()))) if is_map else output


def batches(loader: Loader, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and labels of each batch."""
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[0], Tensor):
        if len(loader[0]) != len(loader[1]):
            raise ValueError(f"measure: {len(loader[0])} inputs and {len(loader[1])} labels")
        loader = zip(loader[0].split(size), loader[1].split(size), strict=True)
    for batch in loader:
        if isinstance(batch, Mapping) and "labels" in batch:
            yield {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
        elif isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
            yield batch[0], batch[1]
        else:
            raise ValueError(
                "measure: a batch must be a pair (inputs, labels) or a mapping with 'labels'; "
                f"the loader gave a {type(batch).__name__}"
            )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
