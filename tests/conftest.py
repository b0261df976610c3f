"""Shared by all tests: threads, Triton's interpreter, markers and seeds."""

import importlib.util
import os
import re
from pathlib import Path

# Tests run in parallel, one process per core: more threads than that would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads the variable when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ncollapse.kernels import operators
from ncollapse.kernels.update.launch import why_no_kernel

NO_CPU_KERNEL = why_no_kernel(torch.device("cpu"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs a C++ compiler and the CPU kernel that it made")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    if NO_CPU_KERNEL:  # then all else must work on the reference, which says so
        config.addinivalue_line("filterwarnings", f"ignore:plain PyTorch.*{re.escape(NO_CPU_KERNEL)}")


#: An import of Triton's kernels at the head of a module of tests.
_OF_TRITON = re.compile(r"^from ncollapse\.kernels\S*(\.gpu\S* import | import (.*\W)?gpu\b)", re.MULTILINE)
_NO_TRITON = importlib.util.find_spec("triton") is None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the tests of Triton's kernels where there is no Triton: macOS, Windows."""
    if _NO_TRITON and collection_path.suffix == ".py" and _OF_TRITON.search(collection_path.read_text("utf-8")):
        return True
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if NO_CPU_KERNEL and item.get_closest_marker("compiled"):
        pytest.skip(NO_CPU_KERNEL)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; tests/kernels runs the same kernels in Triton's interpreter")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_warning_given_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give warnings again that were given before: each is given once per process."""
    monkeypatch.setattr(operators, "_warned", set())
