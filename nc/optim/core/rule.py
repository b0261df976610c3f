"""An update rule as data: what an optimizer, its steps and the theory know of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """What is known of an update rule.

    Attributes:
        name: its name in `ncollapse.kernels.update.reference.RULES`.
        states: names of its state tensors as in torch.optim, each of the parameter's shape; at most two.
        counts_steps: whether a parameter also has the state `step`, the number of its updates.
        takes_betas: whether its hyperparameters are `betas`; else `momentum`, without which it keeps no state.
        elementwise: whether it updates each element by itself, so that runs with different rules share a launch
            (`ncollapse.optim.Stacked`).
        law: what makes the row sum of the last layer predictable (`ncollapse.ufm.predict`). "linear": the row sum of
            the direction is linear in that of the gradient, which is zero. "sign": each element of the direction is
            the sign of a sum of gradients. None: nothing is known.
        law_if_coupled: whether the law also holds with coupled decay; momentum must then be heavy-ball.
    """

    name: str
    states: tuple[str, ...] = ("momentum_buffer",)
    counts_steps: bool = False
    takes_betas: bool = False
    elementwise: bool = True
    law: Literal["linear", "sign"] | None = None
    law_if_coupled: bool = False
