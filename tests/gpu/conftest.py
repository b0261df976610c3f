"""What only a GPU can show. Without one these tests are skipped; `make gpu` runs them, then the benchmarks."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; the same kernel is tested in Triton's interpreter by tests/kernels")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)
