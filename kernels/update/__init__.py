"""Optimizer updates of a whole model in one launch, with coupled and decoupled weight decay.

- `reference`: the rules in plain PyTorch, the specification;
- `table`: addresses and hyperparameters as the kernels read them;
- `gpu`, `gpu_rules`: the Triton kernel and its rules; `cpu`, `_cpu.cpp`: the C++ kernel;
- `graph_memory`: what CUDA graphs hold addresses of;
- `launch`: chooses kernel or reference for each parameter; `op`: the update as a torch operator.
"""
