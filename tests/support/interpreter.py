"""Triton's interpreter, which runs kernels without a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def quiet() -> Iterator[None]:
    """Behind it, numpy warns of NaN and of log 0, and of how Triton 3.6's interpreter makes loop bounds."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
