"""Muon."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper, compute_dtype
from ncollapse.kernels.update.table import HYPERS
from ncollapse.optim.adam import Adam
from ncollapse.optim.core.checks import check_grad, check_group, check_param
from ncollapse.optim.core.groups import Group
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.stepper import Plan, _capturing, _held, is_sharded, placed

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# s of a matrix [A, B], by torch.optim.Muon's names.
_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda a, b: 0.2 * math.sqrt(max(a, b)),
    "original": lambda a, b: math.sqrt(max(1, a / max(b, 1))),
}
_ADAM = ("lr", "betas", "eps", "weight_decay", "coupling", "maximize")  # what the rest takes of a param group


def newton_schulz(x: Tensor, coefficients: tuple[float, float, float] = _COEFFICIENTS, steps: int = 5) -> Tensor:
    """Matrices `[N, A, B]` with the singular vectors of `x` and all singular values near 1 (Jordan et al. 2024).

    X ← X/‖X‖_F, then `steps` times X ← aX + (bXXᵀ + c(XXᵀ)²)X, an odd polynomial of each singular value. The default
    coefficients bring those above 0.002 into [0.68, 1.21]. float32 products are rounded as
    `torch.set_float32_matmul_precision` says. Zero stays zero.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the smaller Gram matrix
    # The least norm is torch.optim.Muon's: a gradient of zero must not become NaN.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    with torch.autocast(x.device.type, enabled=False):
        for _ in range(steps):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _is_matrix(param: Tensor, group: dict[str, Any]) -> bool:
    return param.dim() - group["stacked"] > 1


class _Plan(Plan):
    """Steps of Muon: matrices in plain PyTorch, the rest by an Adam's plan, with the same states."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.rest = Adam([{"params": []}])

    def prepare(self, optimizer: Optimizer, params: list[Tensor], present: list[bool]) -> None:
        super().prepare(optimizer, params, present)
        groups, rest = optimizer.param_groups, self.rest
        for param, row in zip(self._active, self._lists.sets, strict=True):
            state = optimizer.state[param]
            if _is_matrix(param, groups[row]) and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param, dtype=compute_dtype(param)).detach()
        rest.state = optimizer.state
        rest.param_groups = [
            {name: group[name] for name in _ADAM} | {"params": [p for p in group["params"] if not _is_matrix(p, group)]}
            for group in groups
        ]
        others = [p for group in rest.param_groups for p in group["params"]]
        here = {id(p) for p in self._active}
        rest._plan.prepare(rest, others, [id(p) in here for p in others])
        self._held = _held(optimizer)

    def step(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        self.stale |= any(type(group) is not Group for group in groups)
        params = [p for group in groups for p in group["params"]]
        present = [p.grad is not None for p in params]
        if not self._holds(optimizer, params, present):
            self.prepare(optimizer, params, present)
        for param in self._active:
            check_grad(optimizer, param, param.grad)  # type: ignore[arg-type]
        if _capturing(self._active):
            self.live = True
            self._graphs.append((self.numbers.values, self.numbers.read, self._held))
        self.numbers.refresh()
        seen = self.observed
        norms = None if seen is None else seen._norms
        before = [p.clone() for p in self._active] if norms is not None else []
        alike = defaultdict(list)  # matrices of one shape are one batch
        for param, row in zip(self._active, self._lists.sets, strict=True):
            if _is_matrix(param, groups[row]):
                alike[row, param.device, param.dtype, param.shape].append(param)
        for (row, *_), matrices in alike.items():
            self._update_matrices(optimizer, groups[row], matrices)
        self.rest._plan.step(self.rest)
        if norms is not None:
            norms.zero_()
            for param, old in zip(self._active, before, strict=True):
                for column, change in enumerate((param.grad, param.double() - old.double())):
                    norms[:, column] += change.double().square().reshape(len(norms), -1).sum(1)  # type: ignore[union-attr]
        if seen is not None:
            for param, copy in seen.weights.items():
                copy.copy_(param)
            if seen.head is not None and seen.row_sum is not None:
                seen.row_sum.copy_(seen.head.double().sum(-2))

    @_disable_dynamo
    def traced_step(self, optimizer: Optimizer) -> None:
        self.step(optimizer)

    def _update_matrices(self, optimizer: Optimizer, group: dict[str, Any], params: list[Tensor]) -> None:
        """A step of matrices of one shape, dtype and device: `[A, …]`, or `[R, A, …]` of stacked runs."""
        first, lead = params[0], int(group["stacked"])
        dtype, shape = compute_dtype(first), first.shape
        rows, columns = shape[lead], math.prod(shape[lead + 1 :])
        # Where a CUDA graph finds what is written into them later.
        table = next(v for v in self.numbers.values if v.device == first.device)[group.row]  # type: ignore[attr-defined]
        lr, decay, coupling, beta = (
            value.double() if isinstance(value, Tensor) and value.device == first.device else table[HYPERS.index(name)]
            for name, value in optimizer._numbers(group).items()
            if name in ("lr", "weight_decay", "coupling", "beta1")
        )

        def over(value: Tensor) -> Tensor:  # one number, or one of each run
            return value.to(dtype).view(-1, *[1] * (len(shape) - 1)) if value.dim() else value.to(dtype)

        coupled, keep, new = over(coupling * decay), over(beta), over(1 - beta)
        rate = over(lr * _SCALES[group["adjust_lr_fn"] or "original"](rows, columns))
        decoupled = over(lr * (1 - coupling) * decay)
        # In the parameter's float32, where torch.optim.Muon has bfloat16: each iteration makes up to 3.4 times as much
        # of what rounding has left of a row sum.
        x = torch.empty(len(params), *shape, dtype=dtype, device=first.device)
        for param, into in zip(params, x, strict=True):
            assert param.grad is not None
            grad = -param.grad.to(dtype) if group["maximize"] else param.grad.to(dtype)
            grad = torch.addcmul(grad, param.to(dtype), coupled)
            buffer = optimizer.state[param]["momentum_buffer"].lerp_(grad, new)
            into.copy_(torch.lerp(grad, buffer, keep) if group["nesterov"] else buffer)
        batch = x.view(len(params) * math.prod(shape[:lead]), rows, columns)
        directions = newton_schulz(batch, group["ns_coefficients"], group["ns_steps"]).reshape(x.shape)
        for param, direction in zip(params, directions, strict=True):
            # Not param *= 1 − rate, as in the reference of the kernels: that factor's rounding would add up.
            param.sub_(torch.addcmul(direction * rate, param.to(dtype), decoupled))


class Muon(Optimizer):
    r"""Muon (Jordan et al. 2024) with coupled and decoupled weight decay.

    .. math:: g = ∇L + cλW,\quad V ← V + (1 − β)(g − V),\qquad
              W ← (1 − η(1 − c)λ)W − ηs·\mathrm{NewtonSchulz}(g + β(V − g))

    for parameters of two or more dimensions; a convolution `[O, I, kh, kw]` is the matrix `[O, I·kh·kw]`. All others
    (biases, gains) are updated as by `ncollapse.optim.Adam`, with the same η, λ and c.

    The classifier is a matrix as any other, where many leave it to AdamW: NC0 asks what the rule does to the last
    layer. The row sum of the cross-entropy gradient is zero, and 1ᵀX = 0 makes 1ᵀ(XXᵀ)ⁿX zero. So is the direction's,
    and at c = 0 the row sum s = Wᵀ1 obeys s ← (1 − ηλ)s, as under SGDW without momentum and unlike AdamW's
    (`ufm.row_sum_factor`). But Newton–Schulz lifts what rounding leaves of a row sum up to 3.4445⁵ = 485 fold, as a
    share of ‖V‖. In float32, the label's entry of ∇logits must be minus the sum of the others for the law to hold:
    softmax minus one-hot leaves too much once the loss is small.

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0.
        momentum: β in [0, 1), of the matrices.
        betas, eps: of Adam, for the rest. (The `eps` of torch.optim.Muon is here always its default.)
        weight_decay: λ ≥ 0. Default 0.1, as in torch.optim.Muon.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 0, as published.
        nesterov: as above; without it NewtonSchulz(V).
        ns_coefficients, ns_steps: a, b, c and the number of steps of `newton_schulz`.
        adjust_lr_fn: s of a matrix `[A, B]`: "match_rms_adamw", the default, 0.2·√max(A, B), which takes AdamW's
            learning rates, so that one η serves the model (Liu et al., arXiv 2502.16982); "original" or None, the
            default of torch.optim.Muon, √max(1, A/B).
        stacked: parameters are `[R, …]`, R runs that train as by a Muon each; numbers may be tensors `[R]`.
        maximize: ascend instead of descend.

    All but lr are keywords: torch.optim.Muon, which computes the same of 2-D parameters but for its bfloat16, and with
    which state dicts are exchanged, has them in another order. Tensors among the numbers are read at every step.

    Raises:
        ValueError: as in `SGD`; for an unknown `adjust_lr_fn`, and for a stack whose first dimensions differ.
        TypeError: complex parameters; DTensors, since a shard of a matrix does not tell its direction.
        RuntimeError: (from `step`) a sparse gradient, or a parameter that has moved away from its state.

    Example:
        >>> model = torch.nn.Linear(5, 3)
        >>> opt = Muon(model.parameters(), lr=3e-3)
        >>> model(torch.ones(2, 5)).sum().backward(); opt.step()
    """

    rule = "sgd"  # as which the matrices' numbers are tabled
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    counts = True
    default_coupling = 0.0
    _plan: _Plan
    _step_supports_amp_scaling = False  # torch.amp.GradScaler divides the gradients itself

    def __init__(
        self,
        params: ParamsT,
        lr: Hyper = 1e-3,
        *,
        momentum: Hyper = 0.95,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        weight_decay: Hyper = 0.1,
        coupling: Hyper | None = None,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        stacked: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"nesterov": nesterov, "ns_coefficients": ns_coefficients, "ns_steps": ns_steps}
        defaults |= {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"adjust_lr_fn": adjust_lr_fn, "stacked": stacked, "maximize": maximize}
        super().__init__(params, defaults, coupling)
        self._plan = _Plan(self)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Hyper]:
        return {**super()._numbers(group), "beta1": group["momentum"], "beta2": 0.0, "eps": 0.0}

    def _rules(self, group: dict[str, Any]) -> list[str]:
        return [self.rule] * (group["params"][0].shape[0] if group["stacked"] and group["params"] else 1)

    def _has_state(self, group: dict[str, Any]) -> bool:
        return False  # that the base class could make

    def _written(self, group: Group, key: str, before: Any) -> None:
        super()._written(group, key, before)
        if key in _ADAM and not self._plan.stale:  # else the next step brings it there
            self._plan.rest.param_groups[group.row][key] = group[key]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not isinstance(self._plan, _Plan):
            self._plan = _Plan(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in `torch.optim`; raises ValueError or TypeError before anything is changed."""
        group = {**self.defaults, **param_group}
        _check(self, group)
        # The base class would ask of Nesterov's momentum what torch.optim.SGD does: not to be 0.
        super().add_param_group({**param_group, "nesterov": False})
        self.param_groups[-1]["nesterov"] = group["nesterov"]
        try:
            for param in self.param_groups[-1]["params"]:
                if is_sharded(param):
                    raise TypeError("Muon updates whole matrices; got a DTensor; use torch.optim's")
                check_param(self, param, super()._numbers(group))  # with Adam's
            runs = {tuple(p.shape[:1]) for g in self.param_groups for p in g["params"]}
            if group["stacked"] and (len(runs) > 1 or () in runs):
                raise ValueError(
                    f"Muon: stacked parameters are [R, …] of one R; their first dimensions are {sorted(runs)}"
                )
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in `torch.optim`, also of torch.optim.Muon; raises ValueError before anything is changed."""
        loaded: dict[Tensor, dict[str, Any]] = {}
        before = {param: dict(state) for param, state in self.state.items()}

        def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:  # comes after the user's own hooks
            loaded.update(_checked_states(self, state_dict))

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            torch.optim.Optimizer.load_state_dict(self, state_dict)
        finally:
            handle.remove()
        # As in the base class: not cast to the parameters' dtype, and into the tensors that there are.
        for param, state in loaded.items():
            for name, value in state.items():
                new, old = placed(value, name, param), before.get(param, {}).get(name)
                if isinstance(old, Tensor) and (old.device, old.dtype) == (new.device, new.dtype):
                    new = old.copy_(new)
                self.state[param][name] = new
        if self._plan.live:
            self._plan.prepare_again(self)


def _check(optimizer: Muon, group: dict[str, Any]) -> None:
    """Raise ValueError for a setting that is not allowed."""
    check_group(optimizer, {name: value for name, value in group.items() if name != "nesterov"})
    scale, steps, coefficients = group["adjust_lr_fn"], group["ns_steps"], group["ns_coefficients"]
    if scale is not None and scale not in _SCALES:
        raise ValueError(f"Muon: adjust_lr_fn must be one of {', '.join(_SCALES)}; got {scale!r}")
    if len(coefficients) != 3 or not all(map(math.isfinite, coefficients)):
        raise ValueError(f"Muon: ns_coefficients must be three numbers; got {coefficients!r}")
    if not isinstance(steps, int) or not 0 < steps < 100:
        raise ValueError(f"Muon: ns_steps must be an integer in [1, 100); got {steps!r}")
    if group["stacked"] != optimizer.defaults["stacked"]:
        raise ValueError("Muon: stacked must be the same for all param groups")
    for name, value in (Optimizer._numbers(optimizer, group) | {"momentum": group["momentum"]}).items():
        if isinstance(value, Tensor) and value.numel() != 1 and not group["stacked"]:
            raise ValueError(f"Muon: {name} has a value for each of {len(value)} stacked runs; say stacked=True")


def _checked_states(optimizer: Muon, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The state of each parameter; raises ValueError for a state dict of other parameters or of another optimizer."""
    states: dict[Tensor, dict[str, Any]] = {}
    # What differs in length torch.optim has the words for.
    for group, old in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        _check(optimizer, {**group, **{name: value for name, value in old.items() if name != "params"}})
        for param, i in zip(group["params"], old["params"], strict=False):
            states[param] = state = state_dict["state"].get(i, {})
            shape = tuple(param.shape)
            wanted: dict[str, Any] = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
            wanted = {"momentum_buffer": shape} if _is_matrix(param, group) else wanted
            found = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in state.items()}
            if found and found != wanted:
                raise ValueError(f"Muon: a state dict of another optimizer or other parameters: {found}, not {wanted}")
    return states
