"""Fixtures of the tests of kernels: the backends that a test runs on."""

import pytest
import torch

from devices import Backend, backend_fixture

# Triton's kernels, unless a module or a test says otherwise.
backend = backend_fixture("interpreter", "cuda")


@pytest.fixture
def device(backend: Backend) -> torch.device:
    """Where the backend's tensors are."""
    return backend.device
