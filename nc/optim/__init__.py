"""Optimizers with coupled and decoupled weight decay on one dial, drop-in for `torch.optim`.

With decay λ and coupling c, `c·λ·w` is added to the gradient before the update rule and the weights are multiplied by
`1 − η(1 − c)λ`. The classes named without W default to c = 1, those with W to c = 0.
"""

from ncollapse.optim.adam import Adam, AdamW
from ncollapse.optim.lion import Lion
from ncollapse.optim.muon import Muon
from ncollapse.optim.sgd import SGD, SGDW
from ncollapse.optim.signum import Signum, SignumW
from ncollapse.optim.stacked import Stacked

__all__ = ["SGD", "SGDW", "Adam", "AdamW", "Lion", "Muon", "Signum", "SignumW", "Stacked"]
