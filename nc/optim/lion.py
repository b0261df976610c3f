"""Lion."""

from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.rule import Rule


class Lion(Optimizer, aliases=("lionw",)):
    r"""Lion, sign momentum with decoupled weight decay (Chen et al., arXiv 2302.06675, Algorithm 2).

    .. math:: g = ∇L + cλW,\qquad W ← (1 − η(1 − c)λ)W − η·\mathrm{sign}(β_1 m + (1 − β_1) g),\qquad
              m ← β_2 m + (1 − β_2) g

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0; Chen et al. advise a third to a tenth of AdamW's.
        betas: β₁ and β₂, each in [0, 1).
        weight_decay: λ ≥ 0.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 0: decoupled, as published.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for compatibility and without effect: the only implementation is fused and
            capturable.
        differentiable: must be False.

    Every hyperparameter but `maximize` may be a vector `[R]` for stacked runs; errors as in `ncollapse.optim.SGD`.
    """

    rule = Rule("lion", states=("exp_avg",), takes_betas=True, law="sign")
    default_coupling = 0.0

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-4, betas: tuple[Hyper, Hyper] = (0.9, 0.99), weight_decay: Hyper = 0.0,
        *, coupling: Hyper | None = None, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
