"""The devices on which kernels are tested: the CPU, with Triton's interpreter for Triton's kernels, and a GPU.

`pytest -m gpu` selects what needs a GPU. Without one it is skipped; with one, the interpreter is.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch

#: PyTorch and its compilers may warn on a GPU. A kernel that is missing there is an error; on the CPU it is not, since
#: a machine without a C++ compiler has none. One tuple, so that the order is the same in every version of pytest.
GPU_WARNINGS = ("ignore", "error:plain PyTorch", r"ignore:plain PyTorch.*without a C\+\+ compiler")
GPU_MARKS = (pytest.mark.gpu, pytest.mark.filterwarnings(*GPU_WARNINGS))
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


class Backend(NamedTuple):
    """An implementation of a kernel, and the device of its tensors."""

    name: str
    """"cpu" for C++; "interpreter" and "cuda" for Triton."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.name == "cuda" else torch.device("cpu")


def backend_named(name: str) -> Backend:
    """The backend, or skip the test where a GPU replaces Triton's interpreter."""
    if name == "interpreter" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton's kernels run on it")
    return Backend(name)


def backend_fixture(*names: str) -> Any:
    """The fixture `backend`, for a module whose tests run on these backends."""

    @pytest.fixture(params=[parameter(name) for name in names], name="backend")
    def fixture(request: pytest.FixtureRequest) -> Backend:
        return backend_named(request.param)

    return fixture


def parameter(name: str, *values: Any) -> Any:
    """A backend, and values that a test gets with it, as a parameter."""
    marks = {"cpu": [pytest.mark.compiled], "interpreter": [NEEDS_TRITON], "cuda": GPU_MARKS}[name]
    return pytest.param(name, *values, marks=marks)


def cases(
    names: str, small: Sequence[Any], large: Sequence[Any] = (), *, backends: Sequence[str] = ("interpreter", "cuda")
) -> pytest.MarkDecorator:
    """Parametrise a test by backend and by `names`: small cases everywhere, large ones on a GPU alone."""
    single = "," not in names
    rows = []
    for name in backends:
        for value in [*small, *large] if name == "cuda" else small:
            rows.append(parameter(name, *([value] if single else value)))
    return pytest.mark.parametrize(
        ("backend", *(n.strip() for n in names.split(","))), rows, indirect=["backend"], ids=str
    )


def only(*names: str) -> pytest.MarkDecorator:
    """Run a test on these backends alone."""
    return pytest.mark.parametrize("backend", [parameter(name) for name in names], indirect=True)
