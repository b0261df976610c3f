"""Shared by all tests."""

import os

# Tests run in parallel, one process per core: more threads than that would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter. Triton must be told before anyone imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
