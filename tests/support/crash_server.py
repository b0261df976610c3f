"""Run by the server of `fork_server` before it forks: a sweep, so that the forks have everything loaded."""

import tempfile
from pathlib import Path

import crashes

with tempfile.TemporaryDirectory() as folder:
    crashes.sweep_into(Path(folder), None)
