"""Kernels and their plain-PyTorch references. Knows tensors only.

Each folder holds one operation. Its reference is the specification: the kernels are tested against it, and it runs,
with a warning, where there is no kernel. `operators` has what all operations share.
"""
