"""A pytest plugin for a session that may be killed: the most telling tests first, each outcome written at once.

python -m pytest -p bench.gpu_tests --first tests/gpu --reports FILE …
"""

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first", default="", help="folders and files whose tests come first, separated by commas")
    parser.addoption("--reports", type=Path, help="file of the outcomes, a line of JSON each")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--reports")
    if path is not None and "PYTEST_XDIST_WORKER" not in os.environ:  # workers' reports come to the main process
        path.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(_Stream(path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first = [name for name in config.getoption("--first").split(",") if name]

    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(first) if item.nodeid.startswith(name)), len(first))

    items.sort(key=place)


class _Stream:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        one = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            one["why"] = report.longreprtext[-4000:]
        self._file.write(json.dumps(one) + "\n")

    def pytest_unconfigure(self) -> None:
        self._file.close()
