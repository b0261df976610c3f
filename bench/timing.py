"""Timing that stands noise: candidates take turns, a turn is many steps and one synchronisation; medians count."""

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]
Clock = Callable[[Step, int], float]
_Round = tuple[dict[str, float], float]  # microseconds a step of each; processors too many that others kept busy

TURN = 0.02  # seconds that a turn should last at least: far above the clock's and the synchronisation's cost
MOST_STEPS = 1000
ROUNDS = (5, 101)
LONG = 10 * TURN  # seconds of a step from which two are enough before it is timed
PATIENCE = 30.0  # seconds that rounds on a CPU which others disturbed are taken again
QUIET = 0.15  # processors that others may take from us: the system's clock for that ticks a hundred times a second


@dataclass(frozen=True)
class Timing:
    """Microseconds a step, over all rounds."""

    median: float
    quartile_1: float
    quartile_3: float
    best: float
    rounds: int
    steps_a_round: int

    def record(self) -> dict[str, Any]:
        return {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()}


def wall_cpu(step: Step, steps: int) -> float:
    """Seconds of wall time for so many steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def wall_cuda(step: Step, steps: int) -> float:
    """Seconds of wall time for so many steps, all launched, then waited for once."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu(step: Step, steps: int) -> float:
    """Seconds of the GPU's time for so many steps, by its own clock."""
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(steps):
        step()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def interleaved(
    steps: dict[str, Step], clock: Clock, seconds: float, inner: int = 1, patience: float = 0.0,
    so_far: Callable[[dict[str, Timing]], None] | None = None,
) -> tuple[dict[str, Timing], float]:  # fmt: skip
    """Time the candidates in turns for so many seconds, five rounds at the least.

    Args:
        inner: optimizer steps in a step.
        patience: for how many more seconds to wait for rounds in which we had the processors that our threads need. If
            enough come, only they count.
        so_far: called after each round but the first, with what has been timed by then: for steps of seconds, in which
            time may run out.

    Returns:
        What was timed, and how many processors too many everybody else kept busy in the rounds that count.
    """
    spare = max(0, (os.cpu_count() or 1) - torch.get_num_threads())
    counts = {}
    for name, step in steps.items():
        clock(step, 1)
        one = clock(step, 1)
        if one < LONG:
            one = clock(step, 3) / 3
        counts[name] = min(MOST_STEPS, max(1, math.ceil(TURN / one)))
    quiet: list[_Round] = []
    disturbed: list[_Round] = []
    names, shuffle, end = list(steps), random.Random(0).shuffle, time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for _ in range(ROUNDS[1]):
            taken, others, start = {}, others_seconds(), time.perf_counter()
            shuffle(names)  # nobody always follows the one that leaves the caches full of other things
            for name in names:
                taken[name] = clock(steps[name], counts[name]) / counts[name] / inner * 1e6
            now = time.perf_counter()
            busy = max(0.0, (others_seconds() - others) / (now - start) - spare)
            (disturbed if patience and busy > QUIET else quiet).append((taken, busy))
            if so_far is not None and len(quiet) + len(disturbed) > 1:
                so_far(_timings(quiet + disturbed, counts))
            enough = now > end if len(quiet) >= ROUNDS[0] else now > end + patience
            if enough and len(quiet) + len(disturbed) >= ROUNDS[0]:
                break
            if patience and busy > QUIET:
                time.sleep(0.5)
    finally:
        gc.enable()
    rounds = quiet if len(quiet) >= ROUNDS[0] else quiet + disturbed
    return _timings(rounds, counts), statistics.fmean(busy for _, busy in rounds)


def compared(
    steps: dict[str, Step], clock: Clock, seconds: float, baseline: str | None, inner: int = 1
) -> tuple[dict[str, Any], bool]:
    """A group of timings as it is recorded, with each one's speed against the baseline's; whether others disturbed it.

    Nothing is said of speed then, nor of the yardstick's.
    """
    on_cpu = clock is wall_cpu
    timings, others = interleaved(steps, clock, seconds, inner, min(PATIENCE, 10 * seconds) if on_cpu else 0.0)
    disturbed = on_cpu and others > QUIET
    group: dict[str, Any] = {"others": round(others, 2)} if on_cpu and not math.isnan(others) else {}
    for name, timing in timings.items():
        group[name] = timing.record()
        if baseline in timings and name != "yardstick" and not disturbed:
            group[name]["speed"] = round(timings[baseline].median / timing.median, 3)
    return group, disturbed


def _timings(rounds: list[_Round], counts: dict[str, int]) -> dict[str, Timing]:
    return {name: _timing([taken[name] for taken, _ in rounds], count) for name, count in counts.items()}


def _timing(each: list[float], count: int) -> Timing:
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Timing(median, low, high, min(each), len(each), count)


def captured(step: Step, repeats: int = 1) -> Step:
    """A function that replays a CUDA graph of so many steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            step()

    # The optimizer must live as long as the graph, which knows addresses only.
    def replay(_kept: Step = step) -> None:
        graph.replay()

    return replay


def others_seconds() -> float:
    """Seconds of processor time that everybody but this process has had since the start, where Linux tells."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return math.nan
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


class Yardstick:
    """A step that does nothing but move memory, timed among the candidates.

    On a GPU a device copy. That is none on a CPU, where it may write past the caches, which an update in place cannot:
    there a compiled loop that reads four float32 tensors and writes three of them in place, as Adam does.
    """

    def __init__(self, device: str, elements: int) -> None:
        if device == "cuda":
            source = torch.ones(2**28, device=device)
            target = torch.empty_like(source)
            self.bytes: int = 2 * source.nbytes
            self.step: Step = lambda: target.copy_(source)
            return

        def touch(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
            a.add_(d)
            b.add_(d)
            c.add_(d)

        tensors = [torch.ones(elements) for _ in range(4)]
        compiled = torch.compile(touch, dynamic=False)
        self.bytes, self.step = 7 * 4 * elements, lambda: compiled(*tensors)
