"""The last layer of a classifier: what the user says of it (`Head`), or what it is seen to compute."""

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

#: A layer, by name or itself, whose output is meant; or a function of the model's output.
Source = str | nn.Module | Callable[[Any], Tensor]
# Modules with a matrix that is no classifier.
_NO_HEADS = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)
# Parts of module names that wrappers add: of compiled, sharded and checkpointed modules.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclasses.dataclass(frozen=True)
class Head:
    """Say what features, weight and logits of a classifier are, where `measure` cannot see it.

    Args:
        features: where h `[B, d]` comes from: a layer (its name or itself) whose output it is, pooled as other layers
            are; or a function of the model's output.
        weight: W `[K, d]`, as it acts on h: the normalised or scaled one if the model normalises or scales it; or a
            function that returns it, called at every measurement.
        logits: where the logits `[B, K]` come from, in the same two ways. None: the model's output is, or holds, them.
        name: of the head, for the result.

    Example:
        >>> Head("backbone", lambda: F.normalize(model.prototypes), lambda output: output["logits"])
    """

    features: Source
    weight: Tensor | Callable[[], Tensor]
    logits: Source | None = None
    name: str = "head"


class HeadCall(NamedTuple):
    """What a head computed in one forward pass; `*P` are the tokens or places that it ran over, often none.

    Attributes:
        features: `[B, *P, d]`.
        logits: `[B, *P, K]`.
        weight, bias: W `[K, d]` and b `[K]`, with logits = features · Wᵀ + b; b is None if the user described the head.
        is_map: whether the model has them as `[B, d, *P]` and `[B, K, *P]`.
    """

    features: Tensor
    logits: Tensor
    weight: Tensor
    bias: Tensor | None = None
    is_map: bool = False


class LinearHead:
    """Read features, weight and logits off the calls of one module.

    Of an ordinary linear layer or 1 × 1 convolution the features are the input. Whether it is one shows in its first
    output. Of others, such as a layer that normalises its features or its weight, the matrix product within is found:
    its factors are the features and the weight, and a scale that is applied to it afterwards is the weight's.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._weight: Tensor | None = None  # from the first call: while it runs, even a sharded model has all of it
        self._bias: Tensor | None = None
        self._product: int | None = None  # which of the products within; None: the input and the weight themselves

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> HeadCall:
        """Return what one call computed.

        Raises:
            TypeError: the output is not linear in any features that were found.
        """
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise TypeError(f"measure: the head {self.name!r} must take a tensor and return one; {self._advice()}")
        # The copy: what follows may work in place, as SqueezeNet's ReLU does.
        x, logits = full(x).detach(), full(output).detach().clone()
        if self._weight is None:
            self._weight = self._plain_weight(x, logits)
        is_map = isinstance(self.module, _ConvNd)
        if is_map:
            x, logits = x.movedim(1, -1), logits.movedim(1, -1)
        if self._weight is None or self._product is not None:
            x = self._within(args, kwargs, x, logits)
        assert self._weight is not None
        if self._bias is None:
            self._bias = (logits - x.to(logits.dtype) @ self._weight.to(logits.dtype).mT).flatten(0, -2).mean(0)
        return HeadCall(x, logits, self._weight, self._bias, is_map)

    def _plain_weight(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """Return the module's weight `[K, d]` if the logits are x · weightᵀ + bias, else None."""
        weight, bias = getattr(self.module, "weight", None), getattr(self.module, "bias", None)
        if not isinstance(weight, Tensor):
            return None
        weight, bias = full(weight).detach(), full(bias).detach() if isinstance(bias, Tensor) else None
        if is_pointwise(self.module):
            # The same call, and with it the same rounding: on a GPU that of convolutions may be coarser.
            convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
            expected = convolve(x, weight, bias, self.module.stride, self.module.padding)
        elif weight.shape == (logits.shape[-1], x.shape[-1]):
            expected = F.linear(x.to(weight.dtype), weight, bias)
        else:
            return None
        if expected.shape != logits.shape or not _close(expected, logits):
            return None
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
        return weight.flatten(1).clone()

    def _within(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, logits: Tensor) -> Tensor:
        """Run the module again; return the features of the product within whose result the logits are."""
        found = _Products()
        with found:
            self.module.forward(*args, **kwargs)
        pairs = found.pairs
        weight = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == x.shape[-1]:
            # A cosine that is not written as a product of matrices.
            pairs.insert(0, (F.normalize(x, dim=-1).flatten(0, -2), F.normalize(full(weight).detach())))
        if self._product is None:
            for i, (h, w) in reversed(list(enumerate(pairs))):
                if (len(h), len(w)) != (logits[..., 0].numel(), logits.shape[-1]):
                    continue
                if (scale := _scale(h @ w.mT, logits.flatten(0, -2))) is not None:
                    self._product, self._weight = i, w.clone() * scale
                    break
            else:
                raise TypeError(
                    f"measure: the head {self.name!r}, a {type(self.module).__name__}, is not linear: its output is "
                    f"not features · weightᵀ + bias of any features that it was seen to use; {self._advice()}"
                )
        return pairs[self._product][0].view(*logits.shape[:-1], -1)

    @staticmethod
    def _advice() -> str:
        return "say what they are: head=ncollapse.Head(features=…, weight=…, logits=…)"


class _Products(TorchDispatchMode):
    """Record the factors h `[N, d]`, W `[K, d]` of the matrix products that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            a, b = (full(t).detach() for t in args[-2:])
            if a.dim() == 3 and (len(a) == 1 or b.stride(0) == 0):  # the same W for every sample
                a, b = a.flatten(0, 1), b[0]
            if a.dim() == 2:
                self.pairs += [(b.mT, a), (a, b.mT)]  # W may stand on either side
        elif func is aten.convolution.default and args[1][0, 0].numel() == 1:
            self.pairs.append((full(args[0]).detach().movedim(1, -1).flatten(0, -2), full(args[1]).detach().flatten(1)))
        return func(*args, **(kwargs or {}))


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is distributed over processes, any other unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results `[N, …]` agree to rounding, of their variation over N too; what is not finite is left out."""
    if ours.dtype.itemsize < 4 or theirs.dtype.itemsize < 4:
        tolerance = 1e-2
    else:
        tolerance = 1e-4 if theirs.device.type == "cpu" else 2e-3  # GPUs may round the factors of a product
    a, b = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (ours, theirs))
    variation = (b - b.mean(0)).norm() if len(b) > 1 else b.norm()
    return bool((a - b).norm() <= tolerance * (variation + b.norm() / 10))


def _scale(product: Tensor, logits: Tensor) -> float | None:
    """Return s with logits = s · product + bias, or None. Both are `[N, K]`; the bias is the same in each row."""
    p, z = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (product, logits))
    if len(p) > 1:
        p, z = p - p.mean(0), z - z.mean(0)
    scale = float((p * z).sum() / p.square().sum()) if p.any() else 1.0
    if not scale or not _close((scale * p).to(product.dtype), z.to(logits.dtype)):
        return None
    return 1.0 if abs(scale - 1) < 1e-5 else scale


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a 1 × 1 convolution: a linear layer that runs at every place."""
    return isinstance(module, _ConvNd) and module.groups == 1 and set(module.kernel_size) == {1}


def linear_layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of what may be a head: linear layers, 1 × 1 convolutions, leaves with a matrix `weight`."""
    for name, module in root.named_modules():
        if isinstance(module, nn.Linear) or is_pointwise(module):
            yield name, module
        elif not (isinstance(module, _NO_HEADS) or any(True for _ in module.children())):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                yield name, module


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name; if there is none, raise ValueError with near matches and the linear layers.

    Names need not have the parts that `torch.compile`, DataParallel and sharding add to them.
    """
    modules = dict(model.named_modules())
    plain = {plain_name(n): module for n, module in modules.items()}
    for known in (modules, plain):
        for candidate in (name, name.removeprefix("module.")):
            if candidate in known:
                return known[candidate]
    near = difflib.get_close_matches(name, plain, n=5, cutoff=0.4)
    linear = [plain_name(n) for n, module in linear_layers(model) if isinstance(module, nn.Linear)]
    raise ValueError(
        f"measure: the model has no module {name!r}; near matches: {', '.join(near) or 'none'}; "
        f"linear layers: {', '.join(linear) or 'none'}"
    )


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Return the module's name in the model, or its class if it is no part of it."""
    names = (plain_name(name) for name, part in model.named_modules() if part is module)
    return next(names, None) or type(module).__name__


def plain_name(name: str) -> str:
    """Remove from a module's name what wrappers have added."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def logits_in(output: Any, batch: int, classes: int) -> list[Tensor]:
    """Return the tensors `[B, K]` in what a model returned."""
    return [t for t in tensors_in(output) if t.shape == (batch, classes)]


def predict_alike(returned: Tensor, logits: Tensor) -> bool:
    """Whether what a model returned, `[B, K]`, is largest for the classes for which the logits are."""
    chosen = returned.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    return not bool((returned.amax(1) > chosen).any())  # equal values, and NaN, are no difference


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output: in tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield full(output).detach()
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))
