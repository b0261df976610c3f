"""Muon: the rule, and the step that orthogonalises matrices before the common update."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.newton_schulz.reference import (
    COEFFICIENTS,
    MOST_ELEMENTS,
    ReferenceMatrices,
    newton_schulz,
    padded_sides,
)
from ncollapse.kernels.operators import why_no_kernel
from ncollapse.kernels.tensors import has_no_memory
from ncollapse.kernels.update.graph_memory import keep_for_graph
from ncollapse.kernels.update.reference import Hyper, compute_dtype
from ncollapse.kernels.update.table import HYPERS, code
from ncollapse.optim.adam import Adam
from ncollapse.optim.core.checks import check_grads
from ncollapse.optim.core.numbers import HyperSet
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.rule import Rule
from ncollapse.optim.core.stepper import Stepped, Stepper, capturing, is_sharded

if TYPE_CHECKING:
    from ncollapse.kernels.newton_schulz.gpu import Matrices

__all__ = ["Muon", "newton_schulz"]

# The factor s of the update of a matrix [A, B], by torch.optim.Muon's names.
_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda a, b: 0.2 * math.sqrt(max(a, b)),
    "original": lambda a, b: math.sqrt(max(1, a / max(b, 1))),
    "spectral_unclamped": lambda a, b: math.sqrt(a / max(b, 1)),
}


_OF_NEWTON_SCHULZ = ("ns_coefficients", "ns_steps", "ns_precision")
_PRECISIONS = ("auto", "full", "bfloat16")
#: The longest smaller side of matrices that our kernels orthogonalise: larger ones fill a GPU by themselves, and cuBLAS
#: multiplies them. 0: cuBLAS multiplies all. Not measured yet.
MOST_SIDE = 1024
#: The Triton that our kernels ask for on Hopper and later: before, it puts no fence between asynchronous copies into
#: shared memory and the matrix products that read it there, which PTX's memory model requires.
FENCES = (3, 7, 1)


class _Members:
    """Matrices that are orthogonalised together.

    Attributes:
        indices: of the active parameters, in the order of `matrices`.
        ns: coefficients and steps of Newton–Schulz.
        aside: on a stream beside that of the others.
    """

    def __init__(
        self, indices: list[int], ns: tuple[Any, int], matrices: "Matrices | ReferenceMatrices", aside: bool
    ) -> None:
        self.indices, self.ns, self.matrices, self.aside = indices, ns, matrices, aside


class _MatrixStepper(Stepper):
    """Orthogonalises the matrices, then updates all parameters in the common launch.

    The launch takes the orthogonalised matrices as gradients of SGD without momentum, the others as Adam's.
    """

    def __init__(self, optimizer: Stepped) -> None:
        super().__init__(optimizer)
        self._kinds: dict[int, tuple[Any, ...]] = {}  # of each active matrix, by index
        self._directions: dict[int, Tensor] = {}
        self._members: list[_Members] = []
        self._made: dict[tuple[Any, ...], Matrices | ReferenceMatrices] = {}
        self._aside: dict[torch.device, torch.cuda.Stream] = {}

    def _complete(self, optimizer: Stepped) -> list[bool]:
        fresh = super()._complete(optimizer)
        self._kinds, self._directions = {}, {}
        together: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        head = self._head(optimizer)
        for i, (param, place) in enumerate(zip(self._active, self._places, strict=True)):
            if place % 2:  # the second set of a group
                continue
            group = optimizer.param_groups[place // 2]
            self._kinds[i] = _kind(param, group)
            # Allocated once: a new address makes the update rebuild its table, and a CUDA graph reads this one.
            self._directions[i] = torch.empty_like(param, dtype=compute_dtype(param)).detach()
            state = optimizer.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param, dtype=compute_dtype(param)).detach()
            if param.numel() and not has_no_memory(param):
                dtype = _precision(param, group["ns_precision"], is_head=param is head)
                by_kernel = _has_kernel(param, dtype, _shape(param, group))
                ns = tuple(group["ns_coefficients"]), group["ns_steps"]
                together[param.device, dtype, by_kernel, ns].append(i)
        self._members = []
        made, self._made = self._made, {}
        for (device, dtype, by_kernel, ns), indices in together.items():
            shapes = [_shape(self._active[i], optimizer.param_groups[self._places[i] // 2]) for i in indices]
            # Made once for the same shapes: a CUDA graph reads their memory, and none can be made during a capture.
            key = device, dtype, by_kernel, tuple(shapes)
            matrices = self._made[key] = made.get(key) or _make_matrices(shapes, device, dtype, by_kernel)
            # The few small products of a head leave a GPU idle, so the others run beside them.
            aside = device.type == "cuda" and dtype != torch.bfloat16 and len(together) > 1
            self._members.append(_Members(indices, ns, matrices, aside))
        self._members.sort(key=lambda members: not members.aside)
        for members in self._members:
            device = self._active[members.indices[0]].device
            if members.aside and device not in self._aside:
                self._aside[device] = torch.cuda.Stream(device)
        return fresh

    def _head(self, optimizer: Stepped) -> Tensor | None:
        """The matrix whose row sum matters: the observed head, else the last that is no convolution."""
        if self.observed is not None and self.observed.head is not None:
            return self.observed.head
        flat = [p for g in optimizer.param_groups for p in g["params"] if p.dim() == 2 + int(g["stacked"])]
        return flat[-1] if flat else None

    def _has_states(self, optimizer: Stepped, param: Tensor, hypers: HyperSet) -> bool:
        if hypers.counts_steps:
            return super()._has_states(optimizer, param, hypers)
        return param in optimizer.state and "momentum_buffer" in optimizer.state[param]

    def directions(self, optimizer: Stepped, grads: list[Any]) -> list[Any]:
        check_grads(type(optimizer).__name__, self._active, grads, optimizer.state)
        groups, places = optimizer.param_groups, self._places
        if any(_kind(self._active[i], groups[places[i] // 2]) != kind for i, kind in self._kinds.items()):
            self.prepare_again(optimizer)
        if capturing(self._active):
            kept = (t for members in self._members for t in members.matrices.memory())
            keep_for_graph([*self._directions.values(), *kept], self._graphs)
        for members in self._members:
            present = [n for n, i in enumerate(members.indices) if grads[i] is not None]
            if not present:
                continue
            if not members.aside:
                self._orthogonalise(optimizer, members, present, grads)
                continue
            main = torch.cuda.current_stream(self._active[members.indices[0]].device)
            aside = self._aside[main.device]
            aside.wait_stream(main)
            with torch.cuda.stream(aside):
                self._orthogonalise(optimizer, members, present, grads)
        for members in self._members:
            if members.aside:
                device = self._active[members.indices[0]].device
                torch.cuda.current_stream(device).wait_stream(self._aside[device])
        return [grad if grad is None else self._directions.get(i, grad) for i, grad in enumerate(grads)]

    def step(self, optimizer: Stepped) -> None:
        super().step(optimizer)
        if self.observed is not None and (norms := self.observed._norms) is not None and self._active:
            # The kernel has summed the squares of the directions.
            grads = [p.grad.double().reshape(len(norms), -1) for p in self._active if p.grad is not None]
            norms[:, 0] = torch.stack([grad.square().sum(1) for grad in grads]).sum(0)

    @_disable_dynamo
    def traced_step(self, optimizer: Stepped) -> None:
        self.step(optimizer)

    def _orthogonalise(self, optimizer: Stepped, members: _Members, present: list[int], grads: list[Tensor]) -> None:
        """Update the momentum buffers of the `present` ones of these matrices, and write their `_directions`.

        The update kernel adds the coupled decay c·λ·W to a gradient, so it is subtracted here.
        """
        matrices, indices = members.matrices, members.indices
        by_place: dict[int, list[Tensor]] = {}  # the same objects for all parameters of a group
        views = {}
        matrices.begin(present)
        for n in present:
            i = indices[n]
            param, place = self._active[i], self._places[i]
            group = optimizer.param_groups[place // 2]
            if place not in by_place:
                by_place[place] = [self._number(i, name) for name in ("beta1", "coupling", "weight_decay")]
            buffer = optimizer.state[param]["momentum_buffer"]
            order, tensors = _order(param, group), (grads[i], param, buffer, self._directions[i])
            grad, w, v, out = (_runs_of(t.detach(), order, group) for t in tensors)
            matrices.momentum(
                n, grad, w, v, *by_place[place], nesterov=group["nesterov"], maximize=group["maximize"]
            )  # fmt: skip
            views[n] = w, out, place
        matrices.orthogonalise(*members.ns)
        for n, (w, out, place) in views.items():
            group = optimizer.param_groups[place // 2]
            scale = _SCALES[group["adjust_lr_fn"] or "original"](*_shape(self._active[indices[n]], group)[1:])
            matrices.direction(n, w, out, *by_place[place], scale=scale)
        matrices.end()

    def _number(self, i: int, name: str) -> Tensor:
        """A hyperparameter of an active parameter, in memory that a CUDA graph reads again; 0-d, `[1]` or `[R]`."""
        device, place, column = self._active[i].device, self._places[i], HYPERS.index(name)
        tensor = self.numbers.read.get(len(HYPERS) * place + column)
        if tensor is not None and tensor.device == device:
            return tensor
        return next(v for v in self.numbers.values if v.device == device)[place, column]


def _kind(param: Tensor, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the preparation of a matrix depends on."""
    return param.device, param.dtype, param.shape, *(group[name] for name in _OF_NEWTON_SCHULZ)


def _shape(param: Tensor, group: Mapping[str, Any]) -> tuple[int, int, int]:
    """Runs, rows and columns of a parameter's matrices."""
    lead = int(group["stacked"])
    return math.prod(param.shape[:lead]), param.shape[lead], math.prod(param.shape[lead + 1 :])


def _precision(param: Tensor, setting: str, *, is_head: bool) -> torch.dtype:
    """The dtype of Newton–Schulz."""
    full = compute_dtype(param)
    if setting == "auto":
        return torch.bfloat16 if full == torch.float32 and not is_head and _is_fast(param) else full
    return torch.bfloat16 if setting == "bfloat16" else full


def _is_fast(param: Tensor) -> bool:
    """Whether the parameter's device multiplies in bfloat16 faster than in float32."""
    return param.is_cuda and (torch.version.hip is not None or torch.cuda.get_device_capability(param.device) >= (8, 0))


def _has_kernel(param: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Whether our kernels orthogonalise matrices of these runs, rows and columns."""
    fits = min(shape[1:]) <= MOST_SIDE and math.prod(padded_sides(*shape[1:])) <= MOST_ELEMENTS
    computed = dtype == torch.bfloat16 and compute_dtype(param) == torch.float32
    # ROCm's multiprocessors have less shared memory than the tiles take.
    runs = _is_fast(param) and torch.version.hip is None and why_no_kernel(param.device) is None
    return fits and computed and runs and _is_fenced(param.device)


def _is_fenced(device: torch.device) -> bool:
    """Whether what Triton compiles for a GPU waits for copies before products; see `FENCES`."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return True
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) >= FENCES


def _make_matrices(
    shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype, by_kernel: bool
) -> "Matrices | ReferenceMatrices":
    if not by_kernel:
        return ReferenceMatrices(shapes, device, dtype)
    from ncollapse.kernels.newton_schulz.gpu import Matrices

    return Matrices(shapes, device)


def _order(param: Tensor, group: Mapping[str, Any]) -> list[int] | None:
    """The dimensions, the columns in the order of the memory: Newton–Schulz leaves columns where they are.

    None: they are in that order.
    """
    if param.is_contiguous():
        return None
    lead, strides = 1 + int(group["stacked"]), param.stride()
    return [*range(lead), *sorted(range(lead, param.dim()), key=lambda d: -strides[d])]


def _runs_of(tensor: Tensor, order: list[int] | None, group: Mapping[str, Any]) -> Tensor:
    """A view `[R, rows, …]`, the dimensions of a parameter in this order."""
    ordered = tensor if order is None else tensor.permute(order)
    return ordered if group["stacked"] else ordered.unsqueeze(0)


class Muon(Optimizer, aliases=("muonw",)):
    r"""Muon (Jordan et al. 2024) with coupled and decoupled weight decay.

    .. math:: g = ∇L + cλW,\quad V ← V + (1 − β)(g − V),\qquad
              W ← (1 − η(1 − c)λ)W − ηs·\mathrm{NewtonSchulz}(g + β(V − g))

    for parameters of two or more dimensions; a convolution `[O, I, kh, kw]` is the matrix `[O, I·kh·kw]`. All others
    (biases, gains) are updated as by `ncollapse.optim.Adam`, with the same η, λ and c.

    The classifier is updated as a matrix too, although many leave it to AdamW: NC0 depends on the rule of the last
    layer. The row sum of the cross-entropy gradient is zero, and 1ᵀX = 0 implies 1ᵀ(XXᵀ)ⁿX = 0. So the row sum of the
    direction is zero, and at c = 0 the row sum s = Wᵀ1 obeys s ← (1 − ηλ)s, as under SGDW without momentum and unlike
    under AdamW (`ufm.row_sum_factor`). But Newton–Schulz amplifies the rounding error of a row sum, relative to ‖V‖, by
    up to 3.4445⁵ = 485. In float32 the law therefore requires that the label's entry of ∇logits is computed as minus
    the sum of the others: softmax minus one-hot has too large an error once the loss is small. In bfloat16 it does not
    hold: so the head's Newton–Schulz is in float32 everywhere, unless `ns_precision` says otherwise. The head is what
    `observe(head=…)` was given, before or after the first step; without that the last matrix, in the order of the param
    groups, that is no convolution.

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0.
        momentum: β in [0, 1), of the matrices.
        betas, eps: of Adam, for the other parameters. (The `eps` of torch.optim.Muon always has its default here.)
        weight_decay: λ ≥ 0. Default 0.1, as in torch.optim.Muon.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 0, as published.
        nesterov: as above; if False, NewtonSchulz(V).
        ns_coefficients, ns_steps: a, b, c and the number of steps of `newton_schulz`.
        adjust_lr_fn: s of a matrix `[A, B]`: "match_rms_adamw", the default, 0.2·√max(A, B), with which AdamW's
            learning rates fit, so that one η serves the whole model (Liu et al., arXiv 2502.16982); "original" or None,
            the default of torch.optim.Muon, √max(1, A/B); "spectral_unclamped", √(A/B).
        ns_precision: of Newton–Schulz, a group's setting. "auto", the default: bfloat16, as in torch.optim.Muon, for
            matrices other than the head on a GPU that is fast in it (NVIDIA's from sm_80 on, ROCm's); else "full", the
            dtype of the states (float32; float64 for float64 parameters). "bfloat16": for all, the head included.
        stacked: parameters are `[R, …]`, R runs that each train as by a Muon; numbers may be tensors `[R]`.
        maximize: ascend instead of descend.
        foreach, fused, capturable, differentiable: as in `SGD`.

    All arguments but lr are keywords, since torch.optim.Muon has them in another order. It computes the same for 2-D
    parameters, in bfloat16; state dicts load in both directions. Hyperparameters that are tensors are read at every
    step.

    Raises:
        ValueError, RuntimeError: as in `SGD`; also for an unknown `adjust_lr_fn`, and for stacks of different R.
        TypeError: a parameter is complex, or a DTensor: a matrix cannot be orthogonalised shard by shard.

    Example:
        >>> model = torch.nn.Linear(5, 3)
        >>> opt = Muon(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 5)).sum().backward(); opt.step()
    """

    # The update kernel sees directions of SGD without momentum.
    rule = Rule("sgd", ("momentum_buffer", "exp_avg", "exp_avg_sq"), counts_steps=True, elementwise=False, law="linear")
    default_coupling = 0.0

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, *, momentum: Hyper = 0.95, betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8, weight_decay: Hyper = 0.1, coupling: Hyper | None = None, nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS, ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw", ns_precision: str = "auto", stacked: bool = False,
        maximize: bool = False, foreach: bool | None = None, fused: bool | None = None, capturable: bool = False,
        differentiable: bool = False,
    ) -> None:  # fmt: skip
        defaults: dict[str, Any] = {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
        defaults |= {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"adjust_lr_fn": adjust_lr_fn, "ns_precision": ns_precision, "stacked": stacked}
        super().__init__(
            params, defaults, coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return False  # torch.amp.GradScaler divides the gradients itself

    def _new_stepper(self) -> Stepper:
        return _MatrixStepper(self)

    def _numbers(self, group: Mapping[str, Any]) -> dict[str, Hyper]:
        beta1, beta2 = self._setting(group, "betas")  # Adam's; `_sets` has those of the matrices
        return {**super()._numbers(group), "beta1": beta1, "beta2": beta2}

    def _sets(self, group: Mapping[str, Any]) -> list[HyperSet]:
        numbers = self._numbers(group)
        first = next(iter(group["params"]), None)
        runs = len(first) if group["stacked"] and first is not None and first.dim() else 1
        codes = [[code(name, maximize=sign)] * runs for name, sign in (("sgd", False), ("adam", group["maximize"]))]
        matrices = {**numbers, "beta1": group["momentum"], "beta2": 0.0, "eps": 0.0}
        return [HyperSet(matrices, codes[0]), HyperSet(numbers, codes[1], Adam.rule.states, Adam.rule.counts_steps)]

    def _set_of(self, param: Tensor, group: Mapping[str, Any]) -> int:
        return 0 if param.dim() - group["stacked"] > 1 else 1  # 0: of matrices

    def _states_of(self, param: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if self._set_of(param, group) == 0 else (*Adam.rule.states, "step")

    def _check_setting(self, name: str, value: Any) -> None:
        super()._check_setting(name, value)
        if name == "adjust_lr_fn" and value is not None and value not in _SCALES:
            raise ValueError(f"Muon: adjust_lr_fn must be one of {', '.join(_SCALES)}; got {value!r}")
        if name == "ns_precision" and value not in _PRECISIONS:
            raise ValueError(f"Muon: ns_precision must be one of {', '.join(_PRECISIONS)}; got {value!r}")
        if name == "ns_coefficients" and (len(value) != 3 or not all(map(math.isfinite, value))):
            raise ValueError(f"Muon: ns_coefficients must be three numbers; got {value!r}")
        if name == "ns_steps" and (not isinstance(value, int) or not 0 < value < 100):
            raise ValueError(f"Muon: ns_steps must be an integer in [1, 100); got {value!r}")
        if name == "stacked" and value != self.defaults["stacked"]:
            raise ValueError("Muon: stacked must be the same for all param groups")

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if any(map(is_sharded, group["params"])):
            raise TypeError("Muon updates whole matrices; got a DTensor; use torch.optim's")
        runs = {tuple(p.shape[:1]) for g in (*self.param_groups, group) for p in g["params"]}
        if group["stacked"] and (len(runs) > 1 or () in runs):
            raise ValueError(
                f"Muon: stacked parameters are [R, …] with one R; their first dimensions are {sorted(runs)}"
            )

    def _check_params(self, group: Mapping[str, Any]) -> None:
        for name, value in (self._numbers(group) | {"momentum": group["momentum"]}).items():
            if isinstance(value, Tensor) and value.numel() != 1 and not group["stacked"]:
                raise ValueError(f"Muon: {name} has a value for each of {len(value)} stacked runs; give stacked=True")
        super()._check_params(group)
