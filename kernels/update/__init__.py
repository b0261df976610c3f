"""Optimizer updates of a whole model in one launch, with coupled and decoupled weight decay.

- `reference`: the rules in plain PyTorch, the specification;
- `table`: addresses and hyperparameters as the kernels read them;
- `gpu`: the Triton kernel; `cpu` and `_cpu.cpp`: the same for the CPU;
- `launch`: which of them a step goes to; `op`: the same as a torch operator.
"""
