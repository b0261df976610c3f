"""SGD and SGDW."""

from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.core.rule import Rule


class SGD(Optimizer):
    r"""Stochastic gradient descent with heavy-ball momentum and weight decay coupled into the gradient.

    .. math:: V ← βV + ∇L + cλW,\qquad W ← (1 − η(1 − c)λ)W − ηV

    With the defaults the same as `torch.optim.SGD`. Weight decay of this kind drives NC0 to zero exponentially
    (arXiv 2602.16642, Theorem 3.1).

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0.
        momentum: β in [0, 1).
        dampening: τ in [0, 1]; the gradient enters V as (1 − τ)(∇L + cλW) after the first step.
        weight_decay: λ ≥ 0.
        nesterov: use ∇L + cλW + βV in place of V; needs momentum > 0 and no dampening.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 1 here, 0 in `SGDW`.
        maximize: ascend instead of descend.
        foreach, fused, capturable: accepted for compatibility and without effect: the only implementation is fused and
            capturable.
        differentiable: must be False.

    lr, momentum, weight_decay and coupling may each be a float, a 0-d tensor, or, for R stacked runs with parameters
    `[R, …]`, a tensor `[R]`.

    Raises:
        ValueError: a hyperparameter is out of range or NaN, a vector does not fit the parameters, or `differentiable`;
            also from `add_param_group`, `load_state_dict` and a write into a param group.
        TypeError: a parameter is complex.
        RuntimeError: (from `step`) a gradient is sparse, or a parameter was moved to another device than its state.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = SGD([w], lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> w.sum().backward(); opt.step()
    """

    rule = Rule("sgd", law="linear", law_if_coupled=True)

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, momentum: Hyper = 0.0, dampening: float = 0.0,
        weight_decay: Hyper = 0.0, nesterov: bool = False, *, coupling: Hyper | None = None, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(
            params, defaults | {"nesterov": nesterov}, coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip


class SGDW(SGD):
    r"""SGD with decoupled weight decay: `SGD` with coupling 0 (Loshchilov & Hutter, arXiv 1711.05101).

    .. math:: V ← βV + ∇L,\qquad W ← (1 − ηλ)W − ηV

    The decay is scaled by the learning rate, as in `torch.optim.AdamW`. The row sum of the last layer then shrinks by
    exactly 1 − ηλ a step, whatever the network (arXiv 2602.16642, Theorem 3.2). Arguments as `SGD`.
    """

    default_coupling = 0.0

    def __init__(
        self, params: ParamsT, lr: Hyper = 1e-3, momentum: Hyper = 0.0, dampening: float = 0.0,
        weight_decay: Hyper = 0.0, nesterov: bool = False, *, coupling: Hyper | None = None, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, coupling=coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
