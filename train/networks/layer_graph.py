"""A model as a graph of layers that have a form for stacked runs (`stacked_layers.py`), found by tracing it."""

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ncollapse.train.errors import first_line
from ncollapse.train.networks import layer_steps as steps
from ncollapse.train.networks import stacked_layers as layers
from ncollapse.train.networks.kept_state import copy_of
from ncollapse.train.networks.layer_steps import LayerStep
from ncollapse.train.networks.model_parts import Parts
from ncollapse.train.networks.stacked_layers import Batch, ForwardContext

#: Modules and functions without weights that act on each value, or within each channel of maps.
_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign,
    nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid,
)  # fmt: skip
_POINTWISE_FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.sigmoid,
    F.tanh, F.hardtanh, F.hardsigmoid, F.hardswish, F.logsigmoid, torch.relu, torch.sigmoid, torch.tanh, torch.square,
    torch.abs, torch.exp, operator.neg,
)  # fmt: skip
_POINTWISE_METHODS = ("relu", "sigmoid", "tanh", "square", "abs", "exp", "neg", "contiguous")
_POOL_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d)
_POOL_FUNCTIONS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_BINARY: dict[Any, Callable[..., Tensor]] = {
    operator.add: torch.add, operator.iadd: torch.add, torch.add: torch.add, "add": torch.add, "add_": torch.add,
    operator.sub: torch.sub, operator.isub: torch.sub, torch.sub: torch.sub, "sub": torch.sub,
    operator.mul: torch.mul, operator.imul: torch.mul, torch.mul: torch.mul, "mul": torch.mul, "mul_": torch.mul,
    operator.truediv: torch.div, operator.itruediv: torch.div, torch.div: torch.div, "div": torch.div,
}  # fmt: skip
_ASSIGNING = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_REDUCTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.mean: torch.mean,
    "mean": torch.mean,
    torch.amax: torch.amax,
    "amax": torch.amax,
}
_NORMS: dict[type[nn.Module], Callable[..., Batch]] = {nn.GroupNorm: layers.group_norm, nn.LayerNorm: layers.layer_norm}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
#: Functions and methods that change nothing: where nothing uses their value, they are left out.
_OF_SHAPES = ("size", "dim", operator.getitem, getattr)
#: Stands for the number of samples, and for the shape, in what a model computes of shapes.
_SIZE, _SHAPE = object(), object()


class NoLayerGraphError(Exception):
    """The model has a part that has no form for stacked runs; the message names it."""


class _Tracer(fx.Tracer):
    """Traces a model, and notes the node of each module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.outputs[self.path_of_module(m)] = out.node
        return out


class _NothingInPlace(TorchDispatchMode):
    """Refuses changes of tensors, which a graph of the samples' way through a model does not hold."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise NoLayerGraphError(f"{func} changes a tensor outside of its layers")
        return func(*args, **(kwargs or {}))


class LayerGraph:
    """The forward pass of a model for R runs, layer by layer.

    Args:
        model: in training mode.

    Raises:
        NoLayerGraphError: it cannot be traced, or has a layer without a form for stacked runs.
    """

    channels_last = True

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.module, self.parts = model, parts
        if hooked := [name for name, module in model.named_modules() if _has_hooks(module)]:
            raise NoLayerGraphError(f"{hooked[0] or type(model).__name__} has hooks")
        tracer, traced = _Tracer(), copy_of(model)
        memory = _addresses(traced)
        try:
            # A copy, since tracing runs what is not computed of the samples.
            with _NothingInPlace():
                graph = tracer.trace(traced, _defaults(model))
        except NoLayerGraphError:
            raise
        except Exception as error:  # whatever a model does with what stands for a tensor
            raise NoLayerGraphError(f"torch.fx cannot trace it: {first_line(error) or type(error).__name__}") from error
        if _addresses(traced) != memory:
            raise NoLayerGraphError("it assigns to its parameters or buffers")
        if missing := [name for name in parts.blocks if name not in tracer.outputs]:
            raise NoLayerGraphError(f"the output of {missing[0]} is not that of a layer")
        for node in reversed(graph.nodes):
            if node.op in ("call_function", "call_method") and not node.users:
                # What no later step uses may check or change a tensor all the same.
                if node.target not in _OF_SHAPES:
                    raise _no_form(node)
                graph.erase_node(node)
        if changed := [n for n in graph.nodes if n.args and _in_place(n, model) and _used_after(n.args[0], n)]:
            raise NoLayerGraphError(f"{changed[0].name} changes what is used once more")
        # A layer whose output is watched does not run as one with the next.
        watched = {tracer.outputs[name]: name for name in parts.blocks}
        self._plan, self._watching = _Plan(model, graph, parts, {}), _Plan(model, graph, parts, watched)

    def __call__(self, samples: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Compute features `[R, B, d]` and logits `[R, B, K]`; samples as `Batch.of` takes them."""
        if context.half:
            samples = samples.to(torch.bfloat16)
        plan = self._plan if context.outputs is None else self._watching
        out = plan.run(Batch.of(samples), context)
        weight = context.tensors[self.parts.weight]
        bias = context.tensors[self.parts.bias] if self.parts.bias else None
        if plan.pools and context.train:
            return layers.pooled_head(out, weight, bias)
        features = layers.unshared(steps.maximum_over_space(context, [out]) if plan.pools else out, context.runs)
        return features, layers.head(features, weight, bias)

    def copied(self, name: str, value: Tensor) -> bool:
        """Return whether a parameter `[R, …]` may be replaced by a bfloat16 copy in the forward pass."""
        return value.dim() > 2 and name != self.parts.weight and name.endswith("weight")


class _Plan:
    """The steps from the samples to the features.

    Args:
        watched: nodes whose outputs are recorded, with the names of their modules.

    Attributes:
        pools: the steps end with maps, whose maxima over space are the features.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, parts: Parts, watched: dict[fx.Node, str]) -> None:
        self._parts, self._watched = parts, watched
        self._modules = dict(model.named_modules())
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._shapes: dict[fx.Node, object] = {}
        #: Node -> the layer that computes it, and the nodes that it needs.
        self._steps: dict[fx.Node, tuple[LayerStep, tuple[fx.Node, ...]]] = {}
        self._counters: list[str] = []
        self._input: fx.Node | None = None
        self._features: fx.Node | None = None
        self.pools = False
        for node in graph.nodes:
            self._add(node)
        if self._features is None:
            raise NoLayerGraphError(f"the head {parts.head} is not called")
        #: Node -> the activations that no later one needs.
        self._last: dict[fx.Node, list[fx.Node]] = {}
        for need, node in {need: node for node, (_, needs) in self._steps.items() for need in needs}.items():
            if need is not self._features:
                self._last.setdefault(node, []).append(need)

    def run(self, samples: Batch, context: ForwardContext) -> Batch:
        """Compute the features; count the batches of batch norms, and fill `context.outputs`."""
        assert self._input is not None
        assert self._features is not None
        if context.train and self._counters:
            torch._foreach_add_([context.tensors[name] for name in self._counters], 1)  # one launch for all
        values = {self._input: samples}
        for node, (layer, needs) in self._steps.items():
            values[node] = out = layer(context, [values[need] for need in needs])
            if context.outputs is not None and node in self._watched:
                pooled = layers.over_space(steps.mean, out, context.runs) if out.is_map else out
                context.outputs[self._watched[node]] = layers.unshared(pooled, context.runs)
            for done in self._last.get(node, ()):
                del values[done]
        return values[self._features]

    def _add(self, node: fx.Node) -> None:
        """Add the step of a node; a step takes over the node before it if the two run as one."""
        if node.op == "placeholder":
            if node.users and self._input is not None:
                raise NoLayerGraphError(f"it takes more than one argument: {node.target}")
            if node.users:
                self._input = node
        elif node.op == "call_module":
            self._add_module(node, str(node.target), self._modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._add_function(node)
        elif node.op != "output":
            raise NoLayerGraphError(f"{node.target} is used directly, not by a layer")

    def _add_module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        kind = type(module)
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            raise NoLayerGraphError(f"{name} is called with other arguments than one tensor")
        x = node.args[0]
        if name == self._parts.head:
            self._features = x
            if any(user.op != "output" for user in node.users):
                raise NoLayerGraphError("the logits of the head are used within the model")
            if self._fuses(x, steps.maximum_over_space, relu=False):
                (self._features,), self.pools = self._steps.pop(x)[1], True
            return
        layer: LayerStep
        if isinstance(module, nn.Linear) and kind is nn.Linear:
            weight, bias = self._named(name, "weight"), self._bias(name, module)
            layer = partial(steps.linear, weight=weight, bias=bias)
        elif isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
            if module.padding_mode != "zeros":
                raise NoLayerGraphError(f"{name} pads by {module.padding_mode}")
            weight, bias = self._named(name, "weight"), self._bias(name, module)
            layer = partial(steps.convolution, module=module, weight=weight, bias=bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and kind in (nn.BatchNorm1d, nn.BatchNorm2d):
            if not module.affine or not module.track_running_stats or module.momentum is None:
                raise NoLayerGraphError(f"{name} has no weights, running numbers or momentum")
            names = [self._named(name, part) for part in ("weight", "bias", "running_mean", "running_var")]
            counter = self._named(name, "num_batches_tracked")
            if counter in self._counters:
                raise NoLayerGraphError(f"{name} is called twice")
            self._counters.append(counter)
            layer = partial(steps.batch_norm, module=module, names=names)
        elif kind in _NORMS and module.weight is not None and module.bias is not None:
            weight, bias = self._named(name, "weight"), self._named(name, "bias")
            layer = partial(steps.norm, form=_NORMS[kind], module=module, weight=weight, bias=bias)
        elif kind is nn.ReLU:
            self._add_relu(node, x)
            return
        elif kind in _POINTWISE_MODULES:
            layer = partial(steps.pointwise, function=_out_of_place(module))
        elif kind is nn.MaxPool2d and self._fuses(x, steps.batch_norm) and _halves(module):
            self._take_over(node, x, pool=True)
            return
        elif kind in _POOL_MODULES and not getattr(module, "return_indices", False):
            layer = partial(steps.pool, function=module)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            layer = steps.flatten
        elif kind is nn.Identity or (isinstance(module, _DROPOUT) and kind in _DROPOUT and module.p == 0):
            layer = steps.same
        else:
            raise NoLayerGraphError(f"{name}, a {kind.__name__}, has no form for stacked runs")
        self._steps[node] = layer, (x,)

    def _add_function(self, node: fx.Node) -> None:
        target: Any = node.target
        args: tuple[Any, ...] = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        x, rest = (args[0], args[1:]) if args else (None, ())
        kwargs.pop("inplace", None)
        if self._add_shape(node, x, rest):
            return
        if target in _BINARY and len(args) == 2 and not kwargs:
            self._add_binary(node, _BINARY[target], list(args))
            return
        if target is torch.cat and isinstance(x, Sequence):
            dim = rest[0] if rest else kwargs.get("dim", 0)
            if dim == 1 and all(isinstance(part, fx.Node) for part in x):
                self._steps[node] = (lambda context, xs: layers.concatenate(xs, context.runs)), tuple(x)
                return
        numbers = not any(isinstance(arg, fx.Node) for arg in (*rest, *kwargs.values()))
        if not isinstance(x, fx.Node) or not (numbers or target in ("view", "reshape")):
            raise _no_form(node)
        layer: LayerStep
        if target in (F.relu, torch.relu, "relu", "relu_"):
            self._add_relu(node, x)
            return
        if target in _POINTWISE_FUNCTIONS or (node.op == "call_method" and target in _POINTWISE_METHODS):
            function = getattr(torch.Tensor, target) if isinstance(target, str) else target
            rest = rest[: -1 if rest and target in (F.leaky_relu, F.elu) and isinstance(rest[-1], bool) else None]
            layer = partial(steps.pointwise, function=lambda value: function(value, *rest, **kwargs))
        elif target is F.max_pool2d and self._fuses(x, steps.batch_norm) and _halves(nn.MaxPool2d(*rest, **kwargs)):
            self._take_over(node, x, pool=True)
            return
        elif target in _POOL_FUNCTIONS:
            layer = partial(steps.pool, function=lambda value: target(value, *rest, **kwargs))
        elif target in (torch.flatten, "flatten") and (rest or (kwargs.get("start_dim"),))[0] == 1 and len(rest) < 2:
            layer = steps.flatten
        elif target in ("view", "reshape", torch.reshape) and (length := self._flat(rest)) is not None:
            layer = partial(steps.flatten, length=length)
        elif target in _REDUCTIONS:
            layer = self._reduction(node, rest, kwargs)
        elif target is F.dropout and (rest or (kwargs.get("p", 0.5),))[0] == 0:
            layer = steps.same
        else:
            raise _no_form(node)
        self._steps[node] = layer, (x,)

    def _add_shape(self, node: fx.Node, x: Any, rest: Sequence[Any]) -> bool:
        """Note what a node computes of shapes; return whether it does."""
        if (node.target is getattr and rest[0] == "shape") or (node.target == "size" and not rest and not node.kwargs):
            self._shapes[node] = _SHAPE
        elif (node.target == "size" and tuple(rest) == (0,)) or (
            node.target is operator.getitem and self._shapes.get(x) is _SHAPE and tuple(rest) == (0,)
        ):
            self._shapes[node] = _SIZE
        return node in self._shapes

    def _flat(self, shape: Sequence[Any]) -> int | None:
        """Return d of a view as `[B, d]`, -1 where it is not given; None for another view."""
        sizes = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else list(shape)
        if len(sizes) == 2 and self._shapes.get(sizes[0]) is _SIZE and isinstance(sizes[1], int):
            return sizes[1]
        return sizes[1] if len(sizes) == 2 and sizes[0] == -1 and isinstance(sizes[1], int) else None

    def _add_binary(self, node: fx.Node, function: Callable[..., Tensor], args: list[Any]) -> None:
        first, second = args
        if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
            x, number = (first, second) if isinstance(first, fx.Node) else (second, first)
            if not isinstance(x, fx.Node) or not isinstance(number, int | float) or x in self._shapes:
                raise _no_form(node)
            swapped = x is second
            layer = partial(
                steps.pointwise,
                function=lambda value: function(number, value) if swapped else function(value, number),
            )
            self._steps[node] = layer, (x,)
            return
        if first in self._shapes or second in self._shapes:
            raise _no_form(node)
        for inner, other in ((second, first), (first, second)):
            if function is torch.add and inner is not other and self._fuses(inner, steps.batch_norm, relu=True):
                self._take_over(node, inner, residual=other)
                return
        self._steps[node] = partial(steps.both, function=function), (first, second)

    def _add_relu(self, node: fx.Node, x: fx.Node) -> None:
        if self._fuses(x, steps.batch_norm, relu=False) or self._fuses(x, steps.linear, relu=False):
            self._take_over(node, x, relu=True)
        else:
            self._steps[node] = partial(steps.pointwise, function=F.relu), (x,)

    def _fuses(self, node: fx.Node, layer: Callable[..., Batch], relu: bool = True) -> bool:
        """Return whether a node is such a layer, whose output only one further node uses."""
        step = self._steps.get(node, (None, ()))[0]
        if not isinstance(step, partial) or step.func is not layer or len(node.users) != 1 or node in self._watched:
            return False
        options = step.keywords
        if layer is steps.batch_norm and not isinstance(options["module"], nn.BatchNorm2d):
            return False
        return options.get("relu", False) == relu and not options.get("pool") and not options.get("residual")

    def _take_over(self, node: fx.Node, before: fx.Node, residual: fx.Node | None = None, **options: bool) -> None:
        """Let one step compute what `before` and `node` do."""
        layer, needs = self._steps.pop(before)
        assert isinstance(layer, partial)
        if residual is not None:
            options, needs = {"residual": True}, (*needs, residual)
        self._steps[node] = partial(layer.func, **{**layer.keywords, **options}), needs

    def _reduction(self, node: fx.Node, rest: Sequence[Any], kwargs: dict[str, Any]) -> LayerStep:
        dims = rest[0] if rest else kwargs.get("dim")
        keep = bool(rest[1] if len(rest) > 1 else kwargs.get("keepdim", False))
        if not isinstance(dims, tuple | list) or {d % 4 for d in dims if isinstance(d, int)} != {2, 3}:
            raise _no_form(node)
        reduce = _REDUCTIONS[node.target]
        if reduce is torch.amax and not keep:
            return partial(steps.maximum_over_space)

        def over(value: Tensor) -> Tensor:
            return reduce(value, (-2, -1), keepdim=keep)

        return partial(steps.pool, function=over) if keep else partial(steps.over_space, function=over)

    def _bias(self, name: str, module: nn.Linear | nn.Conv2d) -> str:
        return "" if module.bias is None else self._named(name, "bias")

    def _named(self, module: str, part: str) -> str:
        """Return the name of a tensor of a module."""
        name = f"{module}.{part}"
        if name not in self._tensors:
            raise NoLayerGraphError(f"{name} is shared with another layer, or computed")
        return name


def _in_place(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a node changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    by_place = node.target in _POINTWISE_FUNCTIONS and any(arg is True for arg in node.args[1:])
    return by_place or node.target in _ASSIGNING or bool(node.kwargs.get("inplace"))


def _used_after(value: Any, node: fx.Node) -> bool:
    return isinstance(value, fx.Node) and any(user > node for user in value.users)


def _has_hooks(module: nn.Module) -> bool:
    of_backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or of_backward)


def _addresses(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, tensor.data_ptr()) for name, tensor in (*model.named_parameters(), *model.named_buffers())]


def _halves(pool: nn.Module) -> bool:
    """Return whether this is 2 × 2 max pooling."""
    assert isinstance(pool, nn.MaxPool2d)
    sizes = [(n, n) if isinstance(n, int) else n for n in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    return sizes == [(2, 2), (2, 2), (0, 0), (1, 1)] and not pool.ceil_mode and not pool.return_indices


def _out_of_place(module: nn.Module) -> nn.Module:
    if not getattr(module, "inplace", False):
        return module
    module = copy.copy(module)
    module.inplace = False  # type: ignore[assignment]
    return module


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the defaults of all arguments after the first."""
    _, *rest = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in rest if p.default is not p.empty}


def _no_form(node: fx.Node) -> NoLayerGraphError:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return NoLayerGraphError(f"{name}{_shown(node.args[1:])} has no form for stacked runs")


def _shown(args: Iterable[Any]) -> str:
    return f"(…, {', '.join(map(str, args))})" if args else ""
