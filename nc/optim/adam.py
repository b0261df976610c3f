"""Adam and AdamW."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.rule import Rule


class Adam(Optimizer):
    r"""Adam with weight decay coupled into the gradient (Kingma & Ba, arXiv 1412.6980).

    .. math:: g = ∇L + cλW,\quad m ← β_1 m + (1 − β_1) g,\quad v ← β_2 v + (1 − β_2) g^2,\qquad
              W ← (1 − η(1 − c)λ)W − η·\hat m/(\sqrt{\hat v} + ε)

    The defaults give `torch.optim.Adam`, coupling 0 gives `torch.optim.AdamW`; values between the two interpolate
    (arXiv 2602.16642).

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 1 here, 0 in `AdamW`.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for compatibility and without effect: the only implementation is fused and
            capturable.
        differentiable: must be False.
        amsgrad: must be False.
        decoupled_weight_decay: torch.optim.Adam's name for coupling 0. In a group, as there, it may be written to, and
            is True where the coupling is 0.

    Every number may be a vector `[R]` for stacked runs; errors as in `ncollapse.optim.SGD`, and ValueError for
    `amsgrad`, or for a coupling that contradicts `decoupled_weight_decay`.
    """

    rule = Rule("adam", states=("exp_avg", "exp_avg_sq"), counts_steps=True, takes_betas=True)
    refuses = (*Optimizer.refuses, "amsgrad")

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8,
        weight_decay: Hyper = 0.0, amsgrad: bool = False, *, coupling: Hyper | None = None, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        if coupling is None:
            coupling = 0.0 if decoupled_weight_decay else self.default_coupling
        # Without the argument nothing is said: coupling 0 is decoupled too.
        given = {"coupling": coupling} | ({"decoupled_weight_decay": True} if decoupled_weight_decay else {})
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | self._implied(given)
        super().__init__(
            params, defaults, coupling, amsgrad=amsgrad,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip

    def _implied(self, given: Mapping[str, Any]) -> dict[str, Any]:
        coupling, decoupled = given.get("coupling"), given.get("decoupled_weight_decay")
        if coupling is None:
            return {} if decoupled is None else {"coupling": 0.0 if decoupled else 1.0}
        # A tensor may change.
        zero = not isinstance(coupling, Tensor) and coupling == 0
        if decoupled is not None and bool(decoupled) != zero:
            raise ValueError(
                f"{type(self).__name__}: decoupled_weight_decay={decoupled} means coupling {0 if decoupled else 1}; "
                f"got coupling {coupling!r}; give only one of them"
            )
        return {"decoupled_weight_decay": zero}

    def _completed(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        # As in torch.optim, AdamW stays decoupled whatever it loads; but a coupling of ours says more than the flag.
        if "coupling" in saved or self.default_coupling == 0:
            saved = {name: value for name, value in saved.items() if name != "decoupled_weight_decay"}
        return super()._completed(saved, now)


class AdamW(Adam):
    r"""Adam with decoupled weight decay: `Adam` with coupling 0 (Loshchilov & Hutter, arXiv 1711.05101).

    .. math:: W ← (1 − ηλ)W − η·\hat m/(\sqrt{\hat v} + ε)

    The same as `torch.optim.AdamW`, including its default weight decay of 0.01. Arguments as in `Adam`.
    """

    default_coupling = 0.0

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8,
        weight_decay: Hyper = 1e-2, amsgrad: bool = False, *, coupling: Hyper | None = None, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, coupling=coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
