"""Shared by all tests."""

import os

# Tests run in parallel, one process per core: more threads than that would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
