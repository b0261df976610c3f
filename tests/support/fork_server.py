"""Processes that start in a fraction of a second: forks of a server that has torch and a sweep loaded."""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest


def fork_context() -> ForkServerContext:
    """Return the context that makes them; the first call starts the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_server"])
    with pytest.MonkeyPatch.context() as patch:
        # The server reads it when it starts: it does not search the folders of the tests' modules.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context
