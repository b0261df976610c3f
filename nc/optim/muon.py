"""Muon: the rule, and the step that orthogonalises matrices before the common update."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.tensors import has_no_memory
from ncollapse.kernels.update.reference import Hyper, compute_dtype
from ncollapse.kernels.update.table import HYPERS, code
from ncollapse.optim.adam import Adam
from ncollapse.optim.core.checks import check_grads
from ncollapse.optim.core.numbers import HyperSet
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.rule import Rule
from ncollapse.optim.core.stepper import Stepped, Stepper, capturing, is_sharded

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The factor s of the update of a matrix [A, B], by torch.optim.Muon's names.
_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda a, b: 0.2 * math.sqrt(max(a, b)),
    "original": lambda a, b: math.sqrt(max(1, a / max(b, 1))),
    "spectral_unclamped": lambda a, b: math.sqrt(a / max(b, 1)),
}


def newton_schulz(x: Tensor, coefficients: tuple[float, float, float] = _COEFFICIENTS, steps: int = 5) -> Tensor:
    """Matrices `[N, A, B]` with the singular vectors of `x` and all singular values near 1 (Jordan et al. 2024).

    X ← X/‖X‖_F, then `steps` times X ← aX + (bXXᵀ + c(XXᵀ)²)X, an odd polynomial of each singular value. The default
    coefficients map singular values above 0.002 into [0.68, 1.21]. float32 products are rounded as
    `torch.set_float32_matmul_precision` says. Zero stays zero.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller Gram matrix
    # The lower limit of the norm is torch.optim.Muon's: a gradient of zero must not become NaN.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class _MatrixStepper(Stepper):
    """Orthogonalises the matrices, then updates all parameters in the common launch.

    The launch takes the orthogonalised matrices as gradients of SGD without momentum, the others as Adam's.
    """

    def _complete(self, optimizer: Stepped) -> list[bool]:
        fresh = super()._complete(optimizer)
        # Indices of active matrices, by the place of their hyperparameters, device, dtype and shape.
        self._batches: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        self._directions: dict[int, Tensor] = {}  # by index
        for i, (param, place) in enumerate(zip(self._active, self._places, strict=True)):
            if place % 2:  # the second set of a group
                continue
            self._batches[place, *_kind(param)].append(i)
            # Allocated once: a new address makes the update rebuild its table, and a CUDA graph reads this one.
            self._directions[i] = torch.empty_like(param, dtype=compute_dtype(param)).detach()
            state = optimizer.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param, dtype=compute_dtype(param)).detach()
        return fresh

    def _has_states(self, optimizer: Stepped, param: Tensor, hypers: HyperSet) -> bool:
        if hypers.counts_steps:
            return super()._has_states(optimizer, param, hypers)
        return param in optimizer.state and "momentum_buffer" in optimizer.state[param]

    def directions(self, optimizer: Stepped, grads: list[Any]) -> list[Any]:
        check_grads(type(optimizer).__name__, self._active, grads, optimizer.state)
        if any(_kind(self._active[i]) != tuple(kind) for (_, *kind), indices in self._batches.items() for i in indices):
            self._complete(optimizer)
        if capturing(self._active):
            self._graphs.append(self._directions)
        for (place, *_), indices in self._batches.items():
            present = [i for i in indices if grads[i] is not None and not has_no_memory(self._active[i])]
            if present:
                self._orthogonalise(optimizer, place, present, grads)
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

    def _orthogonalise(self, optimizer: Stepped, place: int, indices: list[int], grads: list[Tensor]) -> None:
        """Update the momentum buffers of matrices of one shape, and write their `_directions`.

        `indices` are those of the matrices `[A, …]`, or `[R, A, …]`, among the active parameters and `grads`; `place`
        that of their hyperparameters. The kernel adds the coupled decay c·λ·W to a gradient, so it is subtracted here.
        """
        first = self._active[indices[0]]
        group = optimizer.param_groups[place // 2]
        dtype, shape, lead = compute_dtype(first), first.shape, int(group["stacked"])
        rows, columns = shape[lead], math.prod(shape[lead + 1 :])
        values = next(v for v in self.numbers.values if v.device == first.device)[place]

        def number(name: str) -> Tensor:
            """A hyperparameter in memory that a CUDA graph reads again at each replay; float64, 0-d or `[R]`."""
            column = HYPERS.index(name)
            tensor = self.numbers.read.get(len(HYPERS) * place + column)
            return values[column] if tensor is None or tensor.device != first.device else tensor.double()

        def broadcast(value: Tensor) -> Tensor:
            return value.to(dtype).view(-1, *[1] * (len(shape) - 1)) if value.dim() else value.to(dtype)

        coupled, beta = broadcast(number("coupling") * number("weight_decay")), number("beta1")
        keep, new = broadcast(beta), broadcast(1 - beta)
        # In float32, where torch.optim.Muon uses bfloat16: each iteration multiplies the rounding error of a row sum by
        # up to 3.4.
        x = torch.empty(len(indices), *shape, dtype=dtype, device=first.device)
        for i, target in zip(indices, x, strict=True):
            param = self._active[i]
            grad = -grads[i].to(dtype) if group["maximize"] else grads[i].to(dtype)
            grad = torch.addcmul(grad, param.to(dtype), coupled)
            buffer = optimizer.state[param]["momentum_buffer"].lerp_(grad, new)
            target.copy_(torch.lerp(grad, buffer, keep) if group["nesterov"] else buffer)
        batch = x.view(len(indices) * math.prod(shape[:lead]), rows, columns)
        x = newton_schulz(batch, group["ns_coefficients"], group["ns_steps"]).reshape(x.shape)
        x *= _SCALES[group["adjust_lr_fn"] or "original"](rows, columns)
        for i, direction in zip(indices, x, strict=True):
            torch.addcmul(direction, self._active[i].to(dtype), coupled, value=-1, out=self._directions[i])


def _kind(param: Tensor) -> tuple[Any, ...]:
    return param.device, param.dtype, param.shape


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
    the sum of the others: softmax minus one-hot has too large an error once the loss is small.

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
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS, ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw", stacked: bool = False, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        defaults: dict[str, Any] = {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
        defaults |= {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"adjust_lr_fn": adjust_lr_fn, "stacked": stacked}
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
