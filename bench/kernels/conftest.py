"""Microbenchmarks of the kernels with pytest-benchmark: `pytest bench/kernels`, under a minute on two cores.

pytest bench/kernels --all                                                    every case, compiled candidates too
pytest bench/kernels -k "adamw and tiny"
pytest bench/kernels --benchmark-compare=bench/results/kernels-cpu.json       beside the committed record
pytest bench/kernels --benchmark-json=bench/results/kernels-cpu.json          make that record

It ends with a line for each case; with any --benchmark option pytest-benchmark's own tables follow. A case is a
group, whose table compares implementations; they are shown to compute the same before they are timed. They are timed
one after the other: the scripts `bench/*_times.py`, in which they take turns, hold the ratios that are quoted.

On a GPU the clock waits for it: a round launches its steps, then waits once, and its time is divided by the steps.
`extra_info` of a record has GB/s, from the bytes that must be read and written, and the share of what moving memory
alone reaches in this process: a device copy; on a CPU, where a copy may write past the caches, a change in place.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ncollapse.train.results.provenance import device_name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COPIED = {"cpu": 2**25, "cuda": 2**28}  # float32 elements: more than the caches hold
_ROWS = pytest.StashKey[dict[str, dict[str, Any]]]()
#: What `pytest bench/kernels` adds to its command line where that does not say otherwise.
_DEFAULTS = {
    "benchmark_columns": ["median", "iqr", "rounds", "iterations"],
    "benchmark_min_time": "0.002",
    "benchmark_max_time": "0.15",
    "benchmark_min_rounds": 5,
    "benchmark_disable_gc": True,
    "benchmark_timer": f"{__name__}.now",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="bench/kernels: every case, with what is compiled")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}
    given = {a.split("=")[0] for a in config.invocation_params.args}
    config.option.benchmark_quiet = not any(option.startswith("--benchmark") for option in given)
    for name, value in _DEFAULTS.items():
        if "--" + name.replace("_", "-") not in given:
            setattr(config.option, name, value)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A line for each case: what is timed first, and the others' medians over its own."""
    rows = config.stash[_ROWS]
    if not rows:
        return
    machine = device_name(DEVICE) + (f", {torch.get_num_threads()} threads" if DEVICE == "cpu" else "")
    terminalreporter.section(f"median times, {machine}, torch {torch.__version__}")
    width = max(map(len, rows))
    for group, row in rows.items():
        (first, stats), *others = row.items()
        spread = f"±{stats.iqr / 2 / stats.median:.0%}"
        cells = [f"{first} {stats.median * 1e6:,.0f} µs {spread}"]
        cells += [f"{name} {other.median / stats.median:.2f}×" for name, other in others]
        terminalreporter.write_line(f"{group:<{width}}  {', '.join(cells)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each candidate of each case of the module's `cases`."""
    found = metafunc.module.cases(DEVICE, everything=metafunc.config.getoption("--all"))
    each = [
        pytest.param(case, name, id=f"{case}-{name}", marks=metafunc.module.marks(name))
        for case, names in found
        for name in names
    ]
    metafunc.parametrize(("case", "name"), each)


def now() -> float:
    """The time, in seconds, once all that was launched has ended."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """What a case's candidates share, by the case; the last one is kept, since they follow each other."""
    return functools.lru_cache(maxsize=1)(request.module.Prepared)


@pytest.fixture(scope="session")
def bytes_per_second() -> float:
    """What moving memory alone reaches: the median of some rounds."""
    source = torch.ones(_COPIED[DEVICE], device=DEVICE)
    target = torch.empty_like(source) if DEVICE == "cuda" else source
    step: Callable[[], Any] = source.neg_ if DEVICE == "cpu" else lambda: target.copy_(source)
    taken = []
    for _ in range(12):
        start = now()
        step()
        taken.append(now() - start)
    return 2 * source.nbytes / sorted(taken[2:])[5]


@pytest.fixture
def timed(benchmark: Any, bytes_per_second: float, pytestconfig: pytest.Config) -> Callable[..., None]:
    """Time a candidate; its group is the case."""

    def time_it(group: str, name: str, step: Callable[[], Any], moved: int | None = None, **more: Any) -> None:
        benchmark.group, benchmark.name = group, name
        benchmark.extra_info |= more
        benchmark(step)
        if benchmark.stats is None:  # --benchmark-disable
            return
        stats = benchmark.stats.stats
        pytestconfig.stash[_ROWS].setdefault(group, {})[name] = stats
        if moved is not None:
            rate = moved / stats.median
            benchmark.extra_info |= {
                "gb_per_s": round(rate / 1e9, 2), "share_of_copy": round(rate / bytes_per_second, 3)
            }  # fmt: skip

    return time_it
