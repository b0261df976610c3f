"""The cross-entropy, and its gradient with respect to the logits of stacked runs, whose row sum is zero.

- `reference`: in plain PyTorch, the specification;
- `gpu`: the Triton kernel and its launcher;
- `op`: the torch operator, and the function that chooses between kernel and reference;
- `loss`: the loss, for autograd.
"""

from ncollapse.kernels.cross_entropy.loss import cross_entropy
from ncollapse.kernels.cross_entropy.op import cross_entropy_grad

__all__ = ["cross_entropy", "cross_entropy_grad"]
