"""Kernels and their plain-PyTorch references. Knows tensors only.

Each folder holds one operation. The reference in it is the specification: the kernels are tested against it, and where
none can go it runs instead, with a warning (`fallback`).
"""
