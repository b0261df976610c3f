"""Newton–Schulz: matrices with the same singular vectors and all singular values near 1, for Muon.

- `reference`: the iteration, and what comes before and after it in a step, in plain PyTorch, the specification;
- `gpu`, `gpu_kernels`: matrices of several shapes in bfloat16, all in one launch for each product.
"""
