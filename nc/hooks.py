"""Watch the heads and other layers of a model while it runs in evaluation mode, uncompiled."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from ncollapse.batches import arguments_of
from ncollapse.heads import (
    Head,
    HeadCall,
    LinearHead,
    Source,
    find_module,
    full,
    linear_layers,
    logits_in,
    name_of,
    predict_alike,
    tensors_in,
)
from ncollapse.kernels.tensors import tensor_of
from ncollapse.samples import Pool, pooled

#: A head, or what is or holds it: a layer, by name or itself; None: the whole model.
HeadLike = str | nn.Module | Head | None
_FUNCTIONS = "an exported, scripted or traced model has functions for layers: measure the one that it was made of"


class Forward(NamedTuple):
    """What was seen in one forward pass.

    Attributes:
        output: what the model returned.
        heads: name and call of each head.
        layers: name -> output of each further layer, a copy; pooled if `pool` is a function.
    """

    output: Any
    heads: list[tuple[str, HeadCall]]
    layers: dict[str, Any]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without `torch.compile`, DataParallel and DistributedDataParallel, which only run it."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


@contextmanager
def watch(
    model: nn.Module, heads: Sequence[HeadLike], layers: Mapping[str, nn.Module], pool: Pool | None
) -> Iterator[Callable[[Any], Forward]]:
    """Put the model into evaluation mode within the block; afterwards restore each module's mode, without hooks.

    Yields:
        A function that runs the model on inputs, on a first batch twice if the head was not the layer that was
        registered last. It raises ValueError if a head or a layer did not run exactly once, TypeError for a head that
        is not linear.
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        try:
            model.eval()
        except NotImplementedError as error:
            raise ValueError(f"measure: the model has no evaluation mode; {_FUNCTIONS}") from error
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes seconds
            # Hooks are no part of compiled code.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        watched = [_Given(model, head, pool) if isinstance(head, Head) else _Found(model, head) for head in heads]
        captured = {name: _Captured(name, module, pool) for name, module in layers.items()}
        for each in (*watched, *captured.values()):
            stack.callback(each.remove)

        def run(inputs: Any) -> Forward:
            while True:
                for each in (*watched, *captured.values()):
                    each.clear()
                output = _call(model, inputs)
                settled = [each.settle(output) for each in watched]
                if all(settled):
                    break
            calls = [(each.name, each.call(output)) for each in watched]
            return Forward(output, calls, {name: each.once() for name, each in captured.items()})

        yield run


class _Captured:
    """The output of one layer."""

    def __init__(self, name: str, module: nn.Module, pool: Pool | None) -> None:
        self.name, self._pool, self._outputs = name, pool, list[Any]()
        self.remove = module.register_forward_hook(self._hook, prepend=True).remove

    def clear(self) -> None:
        self._outputs.clear()

    def once(self) -> Any:
        """Return the output; raise ValueError unless the layer ran once."""
        if len(self._outputs) != 1:
            raise _not_once(self.name, len(self._outputs))
        return self._outputs[0]

    def _hook(self, _: nn.Module, __: Any, output: Any) -> None:
        h = self._pool(output) if callable(self._pool) else pooled(output)
        # The next layer may work in place, as many a ReLU does.
        self._outputs.append(full(h).detach().clone() if isinstance(h, Tensor) else h)


class _Given:
    """A head that the user describes."""

    def __init__(self, model: nn.Module, head: Head, pool: Pool | None) -> None:
        self.name, self._head = head.name, head
        self._weight = (head.weight() if callable(head.weight) else head.weight).detach().clone()
        if self._weight.dim() != 2:
            raise ValueError(f"measure: the weight of a Head must be [K, d]; it is {tuple(self._weight.shape)}")
        self._layers = {
            role: _Captured(f"{role} of {head.name}", _module_of(model, source), pool)
            for role, source in (("features", head.features), ("logits", head.logits))
            if isinstance(source, str | nn.Module)
        }

    def remove(self) -> None:
        for layer in self._layers.values():
            layer.remove()

    def clear(self) -> None:
        for layer in self._layers.values():
            layer.clear()

    def settle(self, _: Any) -> bool:
        return True

    def call(self, output: Any) -> HeadCall:
        features = self._of("features", self._head.features, output)
        if self._head.logits is not None:
            logits = self._of("logits", self._head.logits, output)
        else:
            returned = logits_in(output, len(features), len(self._weight))
            if len(returned) != 1:
                raise ValueError(
                    f"measure: {len(returned)} tensors [B, K] = {(len(features), len(self._weight))} are in what the "
                    "model returns; give Head(logits=…)"
                )
            logits = returned[0]
        if features.shape[-1] != self._weight.shape[1] or logits.shape != (*features.shape[:-1], len(self._weight)):
            raise ValueError(
                f"measure: the Head has features {tuple(features.shape)}, logits {tuple(logits.shape)} and a weight "
                f"{tuple(self._weight.shape)}; they must be [B, d], [B, K] and [K, d]"
            )
        return HeadCall(features, logits, self._weight.to(features.device))

    def _of(self, role: str, source: Source, output: Any) -> Tensor:
        value = self._layers[role].once() if role in self._layers else source(output)  # type: ignore[operator]
        if not isinstance(value, Tensor):
            raise ValueError(f"measure: Head({role}=…) gives a {type(value).__name__}, not a tensor")
        return full(value).detach()


class _Found:
    """The last linear layer that runs within a part of the model."""

    def __init__(self, model: nn.Module, part: str | nn.Module | None) -> None:
        root = model if part is None else _module_of(model, part)
        self._whole = root is model and part is None
        self._within = [module for _, module in linear_layers(root)]
        if not self._within and self._whole:
            raise ValueError("measure: the model has no linear layer; say what its head is: head=Head(…)")
        self._names = {module: name_of(model, module) for module in [root, *self._within]}
        self._root, self._order = root, list[nn.Module]()
        self._choose(self._within[-1] if self._within else root)
        # Which of several ran last shows in the first pass.
        others = {*self._within, root} if len(self._within) > 1 or root is not self._module else set()
        self._settled = not others
        self._seen = [m.register_forward_hook(self._note, prepend=True) for m in others if m is not model]

    def _choose(self, module: nn.Module) -> None:
        self._module, self.name, self._calls = module, self._names[module], list[HeadCall | TypeError]()
        self._linear = LinearHead(module, self.name)
        self._hook = module.register_forward_hook(self._capture, with_kwargs=True, prepend=True)

    def _note(self, module: nn.Module, *_: Any) -> None:
        self._order.append(module)

    def _capture(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            self._calls.append(self._linear(args, kwargs, output))
        except TypeError as error:  # matters only if it is the head
            self._calls.append(error)

    def remove(self) -> None:
        for hook in (self._hook, *self._seen):
            hook.remove()

    def clear(self) -> None:
        self._calls.clear()
        self._order.clear()

    def settle(self, output: Any) -> bool:
        """Return whether the layer that was watched is the head; else the pass must be repeated."""
        if self._settled:
            return True
        ran = Counter(module for module in self._order if module is not self._root) or Counter(self._order)
        last = next(reversed(ran), None)  # in the order in which each ran first
        if last is not None and last is not self._module:
            self._hook.remove()
            self._choose(last)
            return False
        for hook in self._seen:
            hook.remove()
        self._settled = True
        if self._whole and len(self._calls) == 1 and isinstance(call := self._calls[0], HeadCall):
            self._must_be_returned(call, output)
        return True

    def call(self, _: Any) -> HeadCall:
        """Return the call; raise ValueError unless there was one, TypeError if it was not linear."""
        if len(self._calls) != 1:
            raise _not_once(f"the head {self.name!r}", len(self._calls))
        call = self._calls[0]
        if isinstance(call, TypeError):
            raise call
        return call

    def _must_be_returned(self, call: HeadCall, output: Any) -> None:
        """Raise ValueError, or warn, if what the model returns is not made of the logits of its last linear layer."""
        classes = call.logits.shape[-1]
        shapes = [tuple(t.shape) for t in tensors_in(output) if t.dim() > 1]
        if shapes and not any(classes in shape[1:] for shape in shapes):
            raise ValueError(
                f"measure: the last linear layer that ran is {self.name!r}, with {classes} outputs, but the model "
                f"returns {', '.join(map(str, shapes))}; name the head, or say what it is: head=Head(…)"
            )
        returned = logits_in(output, *call.logits.shape) if call.logits.dim() == 2 else []
        if returned and not any(predict_alike(t, call.logits) for t in returned):
            warnings.warn(
                f"measure: the predictions of the model are not those of its last linear layer {self.name!r}, which is "
                "measured; if it has several heads, name one or more",
                stacklevel=2,
            )


def _module_of(model: nn.Module, part: str | nn.Module) -> nn.Module:
    return unwrapped(part if isinstance(part, nn.Module) else find_module(model, part))


def _not_once(what: str, times: int) -> ValueError:
    hint = "; an exported, scripted or traced model has functions for layers: measure the one that it was made of"
    return ValueError(f"measure: {what} ran {times} times in one forward pass; it must run once{'' if times else hint}")


def _call(model: nn.Module, inputs: Any) -> Any:
    """Call the model on inputs that are moved to its device."""
    state = next(chain(model.parameters(), model.buffers()), None)

    def moved(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = tensor_of(value)
            # NumPy's floats are float64 unless asked otherwise; those of a model hardly ever.
            if state is not None and value.is_floating_point() and state.is_floating_point():
                value = value.to(state.dtype)
        if isinstance(value, Tensor):
            return value if state is None else value.to(state.device, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: moved(each) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(moved(each) for each in value)
        return value

    args, kwargs = arguments_of(model, inputs)
    return model(*moved(args), **moved(kwargs))
