"""The end of a convolutional classifier as one operation: the maximum over space and the logits of its linear head.

- `reference`: in plain PyTorch, the specification;
- `gpu`: the Triton kernels and their launchers;
- `op`: the torch operators, and the function that calls them.
"""

from ncollapse.kernels.pooled_head.op import pooled_head, why_no_kernel

__all__ = ["pooled_head", "why_no_kernel"]
