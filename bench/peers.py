"""Optimizers of other packages, for the rules that they compute as ours do; a package that is absent is left out.

Imported where they are made: most take long to import, and none is a dependency.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_PLAIN = {"kahan_sum": False}
#: Package -> rule of `optim_cases.RULES` -> the class, and what it is given besides the rule's numbers.
PEERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "timm": {"sgdw": ("optim.SGDW", {}), "lion": ("optim.Lion", {})},
    # Its sign descent averages gradients where ours sums them, which has the same sign.
    "pytorch_optimizer": {
        "sgdw": ("SGDW", {}), "lion": ("Lion", {}), "signumw": ("SignSGD", {}),
        "signum": ("SignSGD", {"weight_decouple": False}),
    },
    "apex": {
        "sgd": ("optimizers.FusedSGD", {}), "adam": ("optimizers.FusedAdam", {"adam_w_mode": False}),
        "adamw": ("optimizers.FusedAdam", {}),
    },
    # With torch's numbers, and without the compensated sums that it alone has in bfloat16. The last: it may use the
    # gradients, which all candidates share, as scratch memory.
    "optimi": {
        "sgd": ("SGD", _PLAIN), "lion": ("Lion", _PLAIN), "adam": ("Adam", _PLAIN | _ADAM),
        "adamw": ("AdamW", _PLAIN | _ADAM),
    },
}  # fmt: skip


def peers_of(rule: str) -> list[str]:
    """The packages that have this rule, installed or not."""
    return [package for package, rules in PEERS.items() if rule in rules]


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def make_peer(package: str, rule: str, numbers: dict[str, Any]) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """A function from parameters to the package's optimizer."""
    path, more = PEERS[package][rule]
    module, _, name = f"{package}.{path}".rpartition(".")
    cls = getattr(import_module(module), name)
    return lambda params: cls(params, **numbers, **more)
