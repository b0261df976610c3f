"""Signum and SignumW."""

from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.rule import Rule


class Signum(Optimizer):
    r"""SignSGD with momentum and weight decay coupled into the gradient (Bernstein et al., arXiv 1802.04434).

    .. math:: V ← βV + ∇L + cλW,\qquad W ← (1 − η(1 − c)λ)W − η·\mathrm{sign}(V)

    Coupled, the decay passes through the sign and NC0 → 0 as the learning rate decays (arXiv 2602.16642, Theorem 3.4).

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0.
        momentum: β in [0, 1); 0 is SignGD.
        weight_decay: λ ≥ 0.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 1 here, 0 in `SignumW`.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for compatibility and without effect: the only implementation is fused and
            capturable.
        differentiable: must be False.

    lr, momentum, weight_decay and coupling may be vectors `[R]` for stacked runs; errors as in `ncollapse.optim.SGD`.
    """

    rule = Rule("signum", law="sign", law_if_coupled=True)

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, momentum: Hyper = 0.9, weight_decay: Hyper = 0.0, *,
        coupling: Hyper | None = None, maximize: bool = False, foreach: bool | None = None, fused: bool | None = None,
        capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip


class SignumW(Signum):
    r"""Signum with decoupled weight decay: `Signum` with coupling 0.

    .. math:: V ← βV + ∇L,\qquad W ← (1 − ηλ)W − η·\mathrm{sign}(V)

    In the unconstrained features model ‖Wᵀ1‖² rises to K(K − 2)²/λ² (arXiv 2602.16642, Theorem 3.3). Arguments as
    `Signum`.
    """

    default_coupling = 0.0

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, momentum: Hyper = 0.9, weight_decay: Hyper = 0.0, *,
        coupling: Hyper | None = None, maximize: bool = False, foreach: bool | None = None, fused: bool | None = None,
        capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, momentum, weight_decay, coupling=coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
