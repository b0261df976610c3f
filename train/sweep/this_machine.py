"""The local engine: all cores or GPUs of this machine, used as a measurement says."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import torch

from ncollapse.train.sweep.grouping import Shape
from ncollapse.train.sweep.messages import Engine, How
from ncollapse.train.sweep.processes import InProcess, Processes
from ncollapse.train.sweep.stack_size import Choice, Measure, Work
from ncollapse.train.sweep.throughput import Facts, bytes_per_run, measure

#: With less work than this, in seconds, a measurement costs more than it gains.
WORTH_MEASURING = 5.0
#: With less work than this, in seconds, starting processes does: they take some seconds to load torch.
_WORTH_PROCESSES = 12.0
#: Stacks that share a GPU, each with a process: what is tried.
PER_GPU = (1, 2, 4)
#: Share of the free memory that stacks may take by the estimate.
_MEMORY = 0.7


def start(workers: int, threads: int, device: torch.device, how: How) -> Engine:
    """An engine with so many processes; one trains in this process."""
    if workers == 1:
        return InProcess(_devices(device)[0], how, threads)
    return Processes(_side_by_side(device, workers), threads, how)


def choose(work: Work, workers: int | str, device: torch.device, how: How) -> tuple[Choice, Engine]:
    """Choose by measurement, and start the engine that was chosen.

    Args:
        workers: how many processes if the user says so, else "auto".
        device: "cpu" for all cores, "cuda" for all GPUs, or one GPU.
    """
    first = _devices(device)[0]
    room = {shape: room_for(shape, work.facts[shape.data], first) for shape in work.shapes}
    choice = work.unmeasured(torch.get_num_threads(), room)
    if workers in ("auto", 1):
        here = start(1, choice.threads, device, how)
        if len(work.runs) == 1 or (workers == 1 and work.stack != "auto"):
            return choice, here
        quick = {s: measure(s, work.facts[s.data], size, first, quick=True) for s, size in choice.sizes.items()}
        seconds = work.seconds({shape: rate for shape, rate in quick.items() if rate})
        if seconds < WORTH_MEASURING:
            return choice, here
        # On a CPU with much to do a process for each core is the fastest in any case.
        if workers == 1 or seconds < _WORTH_PROCESSES or device.type != "cpu":
            choice = work.measured(_here(first), 1, choice.threads, room)
        if workers == 1 or (choice.rates and work.seconds(choice.rates) < _WORTH_PROCESSES):
            return choice, here
    counts = _counts(device, len(work.runs)) if workers == "auto" else [int(workers)]
    if counts == [1]:
        here = start(1, choice.threads, device, how)
        return choice if choice.rates else work.measured(_here(first), 1, choice.threads, room), here
    return _choose_processes(work, choice, counts, room, device, how)


def _here(device: torch.device) -> Measure:
    return lambda shape, facts, size: measure(shape, facts, size, device)


def _choose_processes(
    work: Work, alone: Choice, counts: Sequence[int], room: Mapping[Shape, int], device: torch.device, how: How
) -> tuple[Choice, Engine]:
    """The fastest of so many processes, and of one alone if that was measured."""
    most = max(counts)
    threads = max(1, _cores() // most)
    pool = Processes(_side_by_side(device, most), threads, how)
    try:
        choices = [alone] if alone.rates else []
        # The most first: processes that are let go do not come back.
        for count in sorted(counts, reverse=True):
            pool.keep(count)
            shared = {shape: max(1, fit * len(_devices(device)) // count) for shape, fit in room.items()}
            choices.append(work.measured(pool.measure, count, threads, shared))
        best = min(choices, key=lambda choice: work.seconds(choice.rates))
        best = dataclasses.replace(best, measured=tuple(one for choice in choices for one in choice.measured))
        if best.workers == count:
            return best, pool
        pool.close()
        return best, start(best.workers, best.threads, device, how)
    except BaseException:
        pool.close()
        raise


def _counts(device: torch.device, runs: int) -> list[int]:
    """How many processes to try."""
    gpus = len(_devices(device))
    counts = [gpus * n for n in PER_GPU] if device.type == "cuda" else [_cores()]
    return sorted({min(count, runs) for count in counts})


def _cores() -> int:
    # Those that this process may use: a batch system gives it a part of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices(device: torch.device) -> list[torch.device]:
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [device]


def _side_by_side(device: torch.device, workers: int) -> list[str]:
    devices = _devices(device)
    return [str(devices[i % len(devices)]) for i in range(workers)]


def room_for(shape: Shape, facts: Facts, device: torch.device) -> int:
    """How many runs fit into the free memory, by an estimate; at least one, which training tries in any case."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(1, int(_MEMORY * free / bytes_per_run(shape, facts)))
