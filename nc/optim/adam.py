"""Adam and AdamW."""

from typing import Any

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
        foreach, fused, capturable: accepted for compatibility and ignored: the only implementation is fused and
            capturable.

    Every hyperparameter but `maximize` may be a vector `[R]` for stacked runs; errors as in `ncollapse.optim.SGD`, and
    ValueError for `amsgrad` or `differentiable`.
    """

    rule = Rule("adam", states=("exp_avg", "exp_avg_sq"), counts_steps=True, takes_betas=True)

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8,
        weight_decay: Hyper = 0.0, amsgrad: bool = False, *, coupling: Hyper | None = None, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, coupling, amsgrad=amsgrad, differentiable=differentiable)


class AdamW(Adam):
    r"""Adam with decoupled weight decay: `Adam` with coupling 0 (Loshchilov & Hutter, arXiv 1711.05101).

    .. math:: W ← (1 − ηλ)W − η·\hat m/(\sqrt{\hat v} + ε)

    The same as `torch.optim.AdamW`, including its default weight decay of 0.01. Arguments as in `Adam`.
    """

    default_coupling = 0.0

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8,
        weight_decay: Hyper = 1e-2, amsgrad: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)
