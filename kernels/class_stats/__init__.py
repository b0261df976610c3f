"""Counts, sums and second moments of features by class, gathered batch by batch.

- `reference`: what a batch adds, in plain PyTorch, the specification;
- `gpu`: the Triton kernels, and cuBLAS for the second moment; `cpu` and `_cpu.cpp`: the same for the CPU;
- `op`: the torch operators, which choose among them.
"""
