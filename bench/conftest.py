"""What every recorded benchmark says of where it was run: versions, commit, device; nobody's host name."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ncollapse.train.results.provenance import describe_machine, device_name

# `pytest` alone does not put the checkout on the path, where `bench` is.
sys.path.insert(0, str(Path(__file__).parents[1]))
# At the start: what a benchmark writes must not make its own commit look dirty.
_MACHINE = describe_machine(device_name("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info |= _MACHINE


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, str | None]:
    return {"id": _MACHINE["commit"]}
