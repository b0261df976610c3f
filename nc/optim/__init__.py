"""Optimizers with coupled and decoupled weight decay on one dial, drop-in for `torch.optim`.

With decay λ and coupling c, `c·λ·w` is added to the gradient before the update rule and the weights are multiplied by
`1 − η(1 − c)λ`. The classes named without W default to c = 1, those with W to c = 0.
"""

from nc.optim.adam import Adam, AdamW
from nc.optim.lion import Lion
from nc.optim.muon import Muon
from nc.optim.sgd import SGD, SGDW
from nc.optim.signum import Signum, SignumW
from nc.optim.stacked import Stacked

__all__ = ["SGD", "SGDW", "Adam", "AdamW", "Lion", "Muon", "Signum", "SignumW", "Stacked"]
