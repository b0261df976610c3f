"""Batch norm, ReLU, and 2 × 2 max pooling or a residual as one operation, forward and backward.

- `reference`: by torch's own operations, the specification;
- `gpu`: the launchers of the Triton kernels; `gpu_kernels`: the kernels;
- `op`: the torch operators, and the function that chooses between kernels and reference.
"""

from ncollapse.kernels.batch_norm.op import batch_norm_relu

__all__ = ["batch_norm_relu"]
