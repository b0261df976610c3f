"""Loaded by the server of `crashes` before it forks: a sweep, so that the forks find everything loaded."""

import tempfile
from pathlib import Path

import crashes

with tempfile.TemporaryDirectory() as folder:
    crashes.sweep_into(Path(folder), None)
