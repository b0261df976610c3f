"""Run any model over the batches of any loader, and capture the features of its head and of other layers."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: An iterable of batches, or one pair of tensors (inputs, labels).
Loader = Iterable[Any] | tuple[Tensor, Tensor]
#: Makes features `[B, d]` of a layer's output.
Pool = Callable[[Any], Tensor]


def labelled_batches(loader: Loader, batch_size: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield the inputs and labels of each batch; a pair of tensors is cut into batches of `batch_size`.

    Raises:
        ValueError: a pair of tensors of different lengths, a batch that is neither a pair nor a mapping with "labels".
    """
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[0], Tensor):
        inputs, labels = loader
        if len(inputs) != len(labels):
            raise ValueError(f"measure: {len(inputs)} inputs and {len(labels)} labels")
        loader = zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
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


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name; if there is none, raise ValueError with near matches and the linear layers."""
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.4)
        linear = [n for n, module in modules.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"measure: the model has no module {name!r}; near matches: {', '.join(near) or 'none'}; "
            f"linear layers: {', '.join(linear) or 'none'}"
        )
    return modules[name]


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
