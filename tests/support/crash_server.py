"""Runs a sweep in the server of `crashes` before it forks, so that the forks have every module loaded."""

import tempfile
from pathlib import Path

import crashes

with tempfile.TemporaryDirectory() as folder:
    crashes.sweep_into(Path(folder), None)
