"""Kernels and their plain-PyTorch references. Knows tensors only.

Each file holds one operation. The reference in it is the specification: a fused kernel that replaces it has the same
signature and is tested against it, and machines without Triton run it.
"""
