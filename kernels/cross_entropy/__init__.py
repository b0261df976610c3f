"""The gradient of stacked runs' cross-entropies with respect to their logits.

- `reference`: in plain PyTorch, the specification;
- `gpu`: the Triton kernel and its launcher;
- `op`: the torch operator, and the function that chooses between kernel and reference.
"""

from ncollapse.kernels.cross_entropy.op import cross_entropy_grad

__all__ = ["cross_entropy_grad"]
