"""Fixtures of the tests of kernels: the backends that a test runs on."""

import pytest
import torch

from devices import Backend, backend_named
from devices import backend as parameter


@pytest.fixture(params=[parameter("interpreter"), parameter("cuda")])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Triton's kernels, unless a module or a test says otherwise."""
    return backend_named(request.param)


@pytest.fixture
def device(backend: Backend) -> torch.device:
    """Where the backend's tensors are."""
    return backend.device
