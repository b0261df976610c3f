"""Counts, sums and second moments of features by class, gathered batch by batch.

- `reference`: how a batch changes the statistics, in plain PyTorch, the specification;
- `gpu`, `gpu_kernels`: the Triton kernels, and cuBLAS for the second moment; `cpu`, `_cpu.cpp`: the C++ kernels;
- `op`: the torch operators, which choose kernel or reference.
"""
