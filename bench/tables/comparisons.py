"""Where another way is as fast as ours, or faster: of every record that has another way."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bench.tables import optimizers
from bench.tables.markdown import NEAR, device, duration, read, table, times


class Pair(NamedTuple):
    """Ours beside the fastest other way, in microseconds."""

    what: str
    where: str
    ours: float
    other: str
    theirs: float


def not_faster() -> str:
    """The pairs in which ours is not the faster one."""
    rows = []
    for pair in (pair for part in PARTS for pair in part() if pair.theirs <= NEAR * pair.ours):
        theirs = f"{duration(pair.theirs)}, {pair.other}"
        rows.append([pair.what, pair.where, duration(pair.ours), theirs, times(pair.theirs / pair.ours)])
    return table(["what", "where", "ours", "the fastest other way", "ours is times as fast"], rows)


def _fastest(timings: dict[str, Any], *names: str) -> tuple[str, float]:
    """Name and median of the fastest of these."""
    best = min(names, key=lambda name: timings[name]["median"])
    return best, timings[best]["median"]


def steps() -> Iterator[Pair]:
    for name in ("optim-cpu.json", "optim-cpu-before-after.json", *optimizers.CUDA, "optim-cuda-h200.json"):
        record = read(name)
        for case in record["cases"]:
            for how, told in (("eager", "called from Python"), ("replay", "replayed")):
                timings = case.get(how, {})
                if timings and optimizers.others(timings):
                    names = {n for each in optimizers.COLUMNS.values() for n in each if n in timings} - {"nc"}
                    found = _fastest(timings, *sorted(names | ({"torch compiled"} & timings.keys())))
                    where = device(record) + (f", {told}" if "replay" in case else "")
                    where += ", after the rewrite" if "before" in timings else ""
                    yield Pair(f"step: {optimizers.case_name(case)}", where, timings["nc"]["median"], *found)


def batch_norms() -> Iterator[Pair]:
    record = read("norm-cuda.json")
    for case in record["cases"]:
        for how, told in (("eager", "called from Python"), ("step", "replayed")):
            found = _fastest(case[how], "torch", "torch compiled")
            yield Pair(f"batch norm: {case['case']}", f"{device(record)}, {told}", case[how]["nc"]["median"], *found)


def training_steps() -> Iterator[Pair]:
    record = read("own-cpu.json")
    for name, case in record["cases"].items():
        us = case["us_per_run_and_step"]
        for way, told in (("built-in, 1", "one run"), ("alone", "one run, by a module of the user's")):
            where = f"{device(record)}, 1 thread"
            yield Pair(f"training step, {told}: {name}", where, us[way], "a plain loop", us["plain loop"])
    for name in ("cnn-cuda.json", "cnn-cuda-h200.json"):
        record = read(name)
        for model, found in record["models"].items():
            yield Pair(
                f"training step: {model}", device(record), found["nc"]["median"], *_fastest(found, "plain", "eager")
            )


def sweeps() -> Iterator[Pair]:
    record = read("sweep-cpu.json")
    for name, case in record["cases"].items():
        found = _fastest(case, "plain", case["best_sequential"])
        for way, told in (("engine", "stacked"), ("engine, alone", "one at a time")):
            yield Pair(f"sweep, {told}: {name}", device(record), case[way]["median"], *found)


def statistics() -> Iterator[Pair]:
    for name in ("stats-cpu.json", "stats-cuda.json", "stats-cuda-h200.json"):
        record = read(name)
        for case in record["cases"]:
            found = _fastest(case["all"], "two passes", "one pass")
            yield Pair(f"NC1: {case['case']}", device(record), case["all"]["nc full"]["median"], *found)


PARTS: tuple[Callable[[], Iterator[Pair]], ...] = (steps, batch_norms, training_steps, sweeps, statistics)
