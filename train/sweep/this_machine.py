"""The local engine: the cores or GPUs of this machine, used by this process or by several worker processes."""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler

import torch

from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import UserError
from ncollapse.train.results.provenance import device_name
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.sweep.grouping import StackKey
from ncollapse.train.sweep.messages import Message, WorkerSettings
from ncollapse.train.sweep.processes import ProcessPool, Trainer
from ncollapse.train.sweep.throughput import DataFacts, bytes_per_run, measure_rate

#: Share of the free memory that stacks may take by the estimate.
_MEMORY = 0.7


class ThisMachine:
    """Trains one stack at a time in this process, or several in as many processes (`messages.Engine`).

    Args:
        device: "cpu" for all cores, "cuda" for all GPUs, or one GPU.
        loaded: data sets by name, on the CPU, that were read already; emptied as they are used.

    Attributes:
        unpicklable: why `settings` cannot be sent to worker processes; empty if they can.
    """

    in_process = True

    def __init__(
        self, device: torch.device, settings: WorkerSettings, loaded: dict[str, Dataset] | None = None
    ) -> None:
        every = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        self._devices = every if device.type == "cuda" and device.index is None else [device]
        self._settings, self._loaded = settings, {} if loaded is None else loaded
        self._threads_before = torch.get_num_threads()
        self._workers = 1
        self._trainer: Trainer | None = None
        self._pool: ProcessPool | None = None
        self.unpicklable = _why_unpicklable(settings)

    @property
    def device(self) -> str:
        """See `Engine`."""
        used = self._devices[: self._workers]
        counts = Counter(device_name(str(device)) for device in used)
        return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items())

    @property
    def gpus(self) -> int:
        """See `Engine`."""
        return len(self._devices) if self._devices[0].type == "cuda" else 0

    def slots(self, per_gpu: int) -> int:
        """See `Engine`."""
        return self.gpus * per_gpu or _cores()

    def threads(self, workers: int) -> int:
        """See `Engine`."""
        return self._threads_before if workers == 1 else max(1, _cores() // workers)

    def use(self, workers: int, threads: int, per_gpu: int = 1) -> None:
        """See `Engine`; here `per_gpu` follows from the number of workers.

        Raises:
            UserError: several workers, and settings that cannot be pickled.
        """
        self._workers = workers
        if self._pool is not None and (workers == 1 or self._pool.threads != threads):
            self._close_pool()
        if workers == 1:
            torch.set_num_threads(threads)
            self._trainer = self._trainer or Trainer(self._devices[0], self._settings, self._loaded)
            return
        if self.unpicklable:
            raise UserError(
                f"{workers} workers need a load_data that can be sent to other processes ({self.unpicklable}): give a "
                "function that is defined in a module, or workers=1"
            )
        self._loaded.clear()  # each process loads its own
        if self._pool is None:
            self._pool = ProcessPool([str(device) for device in self._devices], threads, self._settings)
        self._pool.resize(workers)

    def room(self, key: StackKey, facts: DataFacts) -> int:
        """See `Engine`; by an estimate."""
        return max(1, room_on(self._devices[0], key, facts) * len(self._devices) // self._workers)

    def measure_rate(self, key: StackKey, facts: DataFacts, size: int, *, quick: bool = False) -> float | None:
        """See `Engine`."""
        if self._pool is not None:
            return self._pool.measure_rate(key, facts, size, quick)
        return measure_rate(key, facts, size, self._devices[0], quick=quick)

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        """See `Engine`."""
        if self._pool is not None:
            yield from self._pool.run(next_stack)
            return
        assert self._trainer is not None, "call `use` first"
        while (stack := next_stack()) is not None:
            for message in self._trainer.train(stack):
                yield stack, message

    def close(self) -> None:
        """See `Engine`."""
        self._close_pool()
        torch.set_num_threads(self._threads_before)

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.resize(0)
            self._pool = None


def _why_unpicklable(settings: WorkerSettings) -> str:
    try:
        ForkingPickler.dumps(settings)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return str(error)
    return ""


def _cores() -> int:
    # The cores that this process may use: a batch system assigns it a part of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def room_on(device: torch.device, key: StackKey, facts: DataFacts) -> int:
    """Estimate how many runs fit into the free memory of a device; at least 1, which training tries in any case."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(1, int(_MEMORY * free / bytes_per_run(key, facts)))
