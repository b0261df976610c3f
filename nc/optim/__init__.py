"""Drop-in optimizers for `torch.optim`, with coupled and decoupled weight decay as one setting, the coupling.

With decay λ and coupling c, `c·λ·w` is added to the gradient before the update rule and the weights are multiplied by
`1 − η(1 − c)λ`. SGD, Signum and Adam default to c = 1; SGDW, SignumW, AdamW, Lion and Muon to c = 0.

A new rule is an entry of `ncollapse.kernels.update.reference.RULES` and a class derived from `Optimizer` with a `Rule`.
`by_name` then finds the class, and `Stacked` and `ncollapse.ufm` accept its name.
"""

from ncollapse.optim.adam import Adam, AdamW
from ncollapse.optim.core.optimizer import Optimizer, by_name
from ncollapse.optim.core.rule import Rule
from ncollapse.optim.lion import Lion
from ncollapse.optim.muon import Muon
from ncollapse.optim.sgd import SGD, SGDW
from ncollapse.optim.signum import Signum, SignumW
from ncollapse.optim.stacked import Stacked

__all__ = [
    "SGD", "SGDW", "Adam", "AdamW", "Lion", "Muon", "Optimizer", "Rule", "Signum", "SignumW", "Stacked", "by_name",
]  # fmt: skip
