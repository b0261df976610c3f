"""R runs as one optimizer, each with a rule of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.optim.adam import Adam, AdamW
from ncollapse.optim.core.optimizer import Optimizer
from ncollapse.optim.lion import Lion
from ncollapse.optim.sgd import SGD, SGDW
from ncollapse.optim.signum import Signum, SignumW

_CLASSES: dict[str, type[Optimizer]] = {c.__name__.lower(): c for c in (SGD, SGDW, Signum, SignumW, Adam, AdamW, Lion)}
_BETAS = ("adam", "lion")


class Stacked(Optimizer):
    """R runs of a model as one: parameters `[R, …]`, one launch a step, for each run its own rule and hyperparameters.

    Run r trains as an optimizer of class `rules[r]` alone would train it.

    Args:
        params: parameters or param groups of shape `[R, …]`.
        rules: for each run "sgd", "sgdw", "signum", "signumw", "adam", "adamw" or "lion".
        lr: η.
        momentum: β of the runs with SGD and Signum.
        betas: β₁ and β₂ of the runs with Adam and Lion.
        eps: ε of Adam.
        weight_decay: λ.
        coupling: c; by default what each rule's class has.

    Each of the numbers is a float for all runs or a tensor `[R]`. Every run has the states of the most demanding one:
    `exp_avg` (V or m), and with an Adam among them `exp_avg_sq` and `step`.

    Raises:
        ValueError: as in `ncollapse.optim.SGD`, and for an unknown rule.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, 3, 5))
        >>> opt = Stacked([w], ["sgd", "adamw"], lr=torch.tensor([0.1, 1e-3]), weight_decay=5e-4)
    """

    _derived = True

    def __init__(
        self,
        params: ParamsT,
        rules: Sequence[str],
        lr: Hyper = 1e-3,
        momentum: Hyper = 0.0,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999),
        eps: Hyper = 1e-8,
        weight_decay: Hyper = 0.0,
        *,
        coupling: Hyper | None = None,
    ) -> None:
        if unknown := sorted({str(r) for r in rules} - _CLASSES.keys()):
            raise ValueError(f"Stacked: unknown rules {', '.join(unknown)}; there are {', '.join(_CLASSES)}")
        classes = [_CLASSES[r] for r in rules]
        if coupling is None:
            coupling = torch.tensor([c.default_coupling for c in classes], dtype=torch.float64)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": False,
            "rules": [c.rule for c in classes],
        }
        super().__init__(params, defaults, coupling)

    # From the defaults, which a copy or a pickle keeps.
    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("exp_avg", "exp_avg_sq") if self.counts else ("exp_avg",)

    @property
    def counts(self) -> bool:  # type: ignore[override]
        return Adam.rule in self.defaults["rules"]

    def _rules(self, group: dict[str, Any]) -> list[str]:
        return list(group["rules"])

    def _has_state(self, group: dict[str, Any]) -> bool:
        return True

    def _numbers(self, group: dict[str, Any]) -> dict[str, Hyper]:
        # A vector for each, on the parameters' device: numbers differ by run where rules do.
        device = next((p.device for p in group["params"]), None)
        rules = group["rules"]

        def each(value: Hyper) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64, device=device).expand(len(rules))

        paired = torch.tensor([rule in _BETAS for rule in rules], device=device)
        beta1 = torch.where(paired, each(group["betas"][0]), each(group["momentum"]))
        beta2 = torch.where(paired, each(group["betas"][1]), 0.0)
        same = {name: each(group[name]) for name in ("lr", "weight_decay", "coupling", "eps")}
        return {**same, "beta1": beta1, "beta2": beta2}
