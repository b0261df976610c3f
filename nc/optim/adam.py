"""Adam and AdamW."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nc.kernels.update import Hyper, adam_reference
from nc.optim.base import Coupled, column, zero_state


class Adam(Coupled):
    r"""Adam with weight decay coupled into the gradient (Kingma & Ba, arXiv 1412.6980).

    .. math:: g = ∇L + cλW,\quad m ← β_1 m + (1 − β_1) g,\quad v ← β_2 v + (1 − β_2) g^2,\qquad
              W ← (1 − η(1 − c)λ)W − η·\hat m/(\sqrt{\hat v} + ε)

    With the defaults the same as `torch.optim.Adam`; with coupling 0 as `torch.optim.AdamW`; between the two, the
    interpolation of arXiv 2602.16642.

    Args:
        params: parameters or param groups, as in `torch.optim`.
        lr: η ≥ 0.
        betas: β₁ and β₂, each in [0, 1).
        eps: ε ≥ 0, added to the root of the second moment.
        weight_decay: λ ≥ 0.
        coupling: c in [0, 1], the share of the decay that is added to the gradient. Default 1 here, 0 in `AdamW`.
        maximize: ascend instead of descend.

    Every hyperparameter but `maximize` may be a vector `[R]` for stacked runs; errors as in `nc.optim.SGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Hyper = 1e-3,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        weight_decay: Hyper = 0.0,
        *,
        coupling: Hyper | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, coupling)

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        # The step count stays on the CPU, where reading it costs no synchronisation.
        return {
            "step": torch.tensor(0.0),
            "exp_avg": zero_state(param),
            "exp_avg_sq": zero_state(param),
        }

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Any]) -> None:
        adam_reference(
            params,
            grads,
            column(states, "exp_avg"),
            column(states, "exp_avg_sq"),
            column(states, "step"),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            coupling=group["coupling"],
            maximize=group["maximize"],
        )


class AdamW(Adam):
    r"""Adam with decoupled weight decay: `Adam` with coupling 0 (Loshchilov & Hutter, arXiv 1711.05101).

    .. math:: W ← (1 − ηλ)W − η·\hat m/(\sqrt{\hat v} + ε)

    The same as `torch.optim.AdamW`, its default weight decay of 0.01 included. Arguments as `Adam`.
    """

    default_coupling = 0.0

    def __init__(
        self,
        params: ParamsT,
        lr: Hyper = 1e-3,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        weight_decay: Hyper = 1e-2,
        *,
        coupling: Hyper | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, coupling=coupling, maximize=maximize)
