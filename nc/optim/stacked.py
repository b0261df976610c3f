"""R stacked runs in one optimizer, each with its own rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ncollapse.kernels.update.reference import Hyper
from ncollapse.kernels.update.table import code
from ncollapse.optim.core.numbers import HyperSet
from ncollapse.optim.core.optimizer import Optimizer, by_name


class Stacked(Optimizer):
    """One optimizer for R stacked runs of a model: one launch a step, each run with its own rule and hyperparameters.

    Run r trains as an optimizer of the class `by_name(rules[r])` alone would train it.

    Args:
        params: parameters or param groups of shape `[R, …]`.
        rules: for each run the name of an optimizer, as in `by_name`. Its rule must be elementwise.
        lr, weight_decay: η and λ.
        momentum, betas, eps: β, (β₁, β₂) and ε of the runs whose rule takes them.
        coupling: c; by default each class's own default.
        maximize, foreach, fused, capturable, differentiable: for all runs, as in `ncollapse.optim.SGD`.

    Each of the numbers is a float for all runs or a tensor `[R]`. All runs have as many states as the rule that needs
    most: `exp_avg`, `exp_avg_sq`, and `step` if a rule counts steps.

    Raises:
        ValueError: as in `ncollapse.optim.SGD`, and for a rule that is unknown or not elementwise.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, 3, 5))
        >>> opt = Stacked([w], ["sgd", "adamw"], lr=torch.tensor([0.1, 1e-3]), weight_decay=5e-4)
    """

    _derived = True

    def __init__(
        self, params: ParamsT, rules: Sequence[str], lr: Hyper = 1e-3, momentum: Hyper = 0.0,
        betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.0, *,
        coupling: Hyper | None = None, maximize: bool = False, foreach: bool | None = None, fused: bool | None = None,
        capturable: bool = False, differentiable: bool = False,
    ) -> None:  # fmt: skip
        self._check_setting("rules", rules)
        if coupling is None:
            couplings = [by_name(name).default_coupling for name in rules]
            coupling = torch.tensor(couplings, dtype=torch.float64, device="cpu")
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "rules": tuple(rules)}
        super().__init__(
            params, defaults, coupling,
            maximize=maximize, foreach=foreach, fused=fused, capturable=capturable, differentiable=differentiable,
        )  # fmt: skip

    def _check_setting(self, name: str, value: Any) -> None:
        super()._check_setting(name, value)
        if name == "rules" and (wrong := sorted({r for r in value if not by_name(r).rule.elementwise})):
            classes = ", ".join(by_name(r).__name__ for r in wrong)
            raise ValueError(f"Stacked: {classes} does not update elementwise; use it with stacked=True")

    @property
    def state_names(self) -> tuple[str, ...]:
        # From the defaults, which a copy or a pickle keeps.
        rules = [by_name(name).rule for name in self.defaults["rules"]]
        names = ("exp_avg", "exp_avg_sq")[: max((len(rule.states) for rule in rules), default=0)]
        return names + ("step",) * any(rule.counts_steps for rule in rules)

    def _sets(self, group: Mapping[str, Any]) -> list[HyperSet]:
        codes = [code(by_name(name).rule.name, maximize=group["maximize"]) for name in group["rules"]]
        states = tuple(name for name in self.state_names if name != "step")
        return [HyperSet(self._numbers(group), codes, states, "step" in self.state_names)]

    def _numbers(self, group: Mapping[str, Any]) -> dict[str, Hyper]:
        # All are vectors on the parameters' device, since β₁ and β₂ depend on the rule of each run.
        device = next((p.device for p in group["params"]), None)
        rules = [by_name(name).rule for name in group["rules"]]

        def vector(value: Hyper) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64, device=device).expand(len(rules))

        takes_betas = torch.tensor([rule.takes_betas for rule in rules], device=device)
        beta1 = torch.where(takes_betas, vector(group["betas"][0]), vector(group["momentum"]))
        beta2 = torch.where(takes_betas, vector(group["betas"][1]), 0.0)
        same = {name: vector(group[name]) for name in ("lr", "weight_decay", "coupling", "eps")}
        return {**same, "beta1": beta1, "beta2": beta2}
