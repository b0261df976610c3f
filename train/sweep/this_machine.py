"""The local engine: the cores or GPUs of this machine, used by this process or by several worker processes."""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler

import torch

from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import UserError
from ncollapse.train.results.provenance import device_name
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.sweep.grouping import StackKey
from ncollapse.train.sweep.messages import Engine, Failed, Finished, Message, WorkerSettings
from ncollapse.train.sweep.processes import Trainer, Worker
from ncollapse.train.sweep.throughput import DataFacts, measure_rate, room_on


class ThisMachine(Engine):
    """Trains one stack at a time in this process, or several in as many worker processes.

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
        self._threads_before = self._threads = torch.get_num_threads()
        self._trainer: Trainer | None = None
        self._workers: list[Worker] = []  # none where this process trains
        self.unpicklable = _why_unpicklable(settings)

    @property
    def device(self) -> str:
        used = self._devices[: max(1, len(self._workers))]
        counts = Counter(device_name(str(device)) for device in used)
        return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items())

    @property
    def gpus(self) -> int:
        return len(self._devices) if self._devices[0].type == "cuda" else 0

    def slots(self, per_gpu: int) -> int:
        return self.gpus * per_gpu or _cores()

    def threads(self, workers: int) -> int:
        return self._threads_before if workers == 1 else max(1, _cores() // workers)

    def use(self, workers: int, threads: int, per_gpu: int = 1) -> None:
        """See `Engine`; here `per_gpu` follows from the number of workers.

        Raises:
            UserError: several workers, and settings that cannot be pickled.
        """
        if workers == 1 or threads != self._threads:
            self._keep_workers(0)
        self._threads = threads
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
        self._keep_workers(workers)
        self._workers += [self._start(i) for i in range(len(self._workers), workers)]

    def _start(self, i: int) -> Worker:
        return Worker(self._devices[i % len(self._devices)], self._threads, self._settings)

    def _restart(self, i: int) -> None:
        self._workers[i].kill()
        self._workers[i] = self._start(i)

    def _keep_workers(self, count: int) -> None:
        """Terminate all workers but the first `count`."""
        for worker in self._workers[count:]:
            worker.kill()
        del self._workers[count:]

    def room(self, key: StackKey, facts: DataFacts) -> int:
        return max(1, room_on(self._devices[0], key, facts) * len(self._devices) // max(1, len(self._workers)))

    def measure_rate(self, key: StackKey, facts: DataFacts, size: int, *, quick: bool = False) -> float | None:
        if not self._workers:
            return measure_rate(key, facts, size, self._devices[0], quick=quick)
        for worker in self._workers:
            worker.send((key, facts, size, quick))
        answers = [worker.receive() for worker in self._workers]
        lost = [i for i, answer in enumerate(answers) if isinstance(answer, Failed)]
        for i in lost:
            self._restart(i)
        return None if lost or None in answers else sum(answers)

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        return self._run_in_workers(next_stack) if self._workers else self._run_here(next_stack)

    def _run_here(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        assert self._trainer is not None, "call `use` first"
        while (stack := next_stack()) is not None:
            for message in self._trainer.train(stack):
                yield stack, message

    def _run_in_workers(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        busy: dict[int, PlannedStack] = {}  # index of the worker -> what it trains
        while True:
            for i, worker in enumerate(self._workers):
                if i not in busy and (stack := next_stack()) is not None:
                    busy[i] = stack
                    worker.send(stack)
            if not busy:
                return
            ready = wait([self._workers[i].connection for i in busy])
            for i in [i for i in busy if self._workers[i].connection in ready]:
                stack, message = busy[i], self._workers[i].receive()
                if isinstance(message, Failed) and message.kind == "lost":
                    self._restart(i)
                if isinstance(message, (Finished, Failed)):
                    del busy[i]
                yield stack, message

    def close(self) -> None:
        self._keep_workers(0)
        torch.set_num_threads(self._threads_before)


def _why_unpicklable(settings: WorkerSettings) -> str:
    try:
        ForkingPickler.dumps(settings)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return str(error)
    return ""


def _cores() -> int:
    # The cores that this process may use: a batch system assigns it a part of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
