"""Worker processes of this machine, which train stacks side by side, each with a device and a share of the cores."""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ncollapse.train.data.sets import Dataset
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.sweep.grouping import StackKey
from ncollapse.train.sweep.messages import Failed, Finished, Message, WorkerSettings, train_stack
from ncollapse.train.sweep.throughput import DataFacts, measure_rate

#: How workers start: a fork of this process would copy torch's threads and the state of the GPU.
_CONTEXT = multiprocessing.get_context("spawn")


class Trainer:
    """Trains stacks in the process that it is made in, and keeps the data sets that they need on its device.

    Args:
        loaded: data sets by name that were read already; taken out when they are needed.
    """

    def __init__(
        self, device: torch.device, settings: WorkerSettings, loaded: dict[str, Dataset] | None = None
    ) -> None:
        self.device, self._settings, self._loaded = device, settings, loaded or {}
        self._data: dict[str, Dataset] = {}  # all of them, since stacks of different data sets alternate
        keep_memory()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def _data_set(self, name: str) -> Dataset:
        if name not in self._data:
            read = self._loaded.pop(name, None)
            self._data[name] = self._settings.load_data(name, self.device) if read is None else read.to(self.device)
        return self._data[name]

    def train(self, stack: PlannedStack) -> Iterator[Message]:
        """Train a stack; see `ncollapse.train.sweep.messages.train_stack`."""
        data = self._data_set(stack.runs[0].data)
        checkpoint = None if stack.checkpoint is None else stack.checkpoint.read_bytes()
        return train_stack(stack.runs, data, self.device, self._settings, checkpoint)


@dataclasses.dataclass(frozen=True)
class _Measure:
    key: StackKey
    facts: DataFacts
    size: int
    quick: bool


@dataclasses.dataclass(frozen=True)
class _Crashed:
    text: str


class _Worker:
    """A process that trains the stacks it is sent, and this end of the pipe to it."""

    def __init__(self, device: str, threads: int, settings: WorkerSettings) -> None:
        self.connection, child_end = _CONTEXT.Pipe()
        arguments = (child_end, device, threads, settings)
        self.process: BaseProcess = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        child_end.close()

    def receive(self) -> Any:
        """Wait for the next message; Failed where the process has ended.

        Raises:
            RuntimeError: an exception in the process, with its traceback.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # it may have been killed in the middle of a message
            self.process.join(5)
            return Failed("lost", f"its process ended with exit code {self.process.exitcode}")
        if isinstance(message, _Crashed):
            raise RuntimeError(f"a training process failed:\n{message.text}")
        return message

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessPool:
    """Processes that train stacks side by side.

    Args:
        devices: the names of the devices on which the processes train, in turn.
        threads: CPU threads of each process.
        settings: must be picklable.
    """

    def __init__(self, devices: Sequence[str], threads: int, settings: WorkerSettings) -> None:
        self.threads, self._devices, self._settings = threads, devices, settings
        self._workers: list[_Worker] = []

    def resize(self, count: int) -> None:
        """Start workers, or terminate all but the first `count`."""
        for worker in self._workers[count:]:
            worker.kill()
        self._workers = self._workers[:count]
        while len(self._workers) < count:
            self._workers.append(self._start(len(self._workers)))

    def _start(self, i: int) -> _Worker:
        return _Worker(self._devices[i % len(self._devices)], self.threads, self._settings)

    def _replace(self, i: int) -> None:
        self._workers[i].kill()
        self._workers[i] = self._start(i)

    def measure_rate(self, key: StackKey, facts: DataFacts, size: int, quick: bool) -> float | None:
        """See `ncollapse.train.sweep.messages.Engine`."""
        for worker in self._workers:
            with contextlib.suppress(OSError):  # it has ended: `receive` says so
                worker.connection.send(_Measure(key, facts, size, quick))
        answers = [worker.receive() for worker in self._workers]
        lost = [i for i, answer in enumerate(answers) if isinstance(answer, Failed)]
        for i in lost:
            self._replace(i)
        return None if lost or None in answers else sum(answers)

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        """See `ncollapse.train.sweep.messages.Engine`."""
        busy: dict[int, PlannedStack] = {}  # index of the worker -> what it trains
        while True:
            for i, worker in enumerate(self._workers):
                if i not in busy and (stack := next_stack()) is not None:
                    busy[i] = stack
                    with contextlib.suppress(OSError):  # it ended while it was idle: `receive` says so
                        worker.connection.send(stack)
            if not busy:
                return
            indices = {self._workers[i].connection: i for i in busy}
            for connection in wait(list(indices)):
                assert isinstance(connection, Connection)
                i = indices[connection]
                message = self._workers[i].receive()
                stack = busy[i]
                if isinstance(message, Failed) and message.kind == "lost":
                    self._replace(i)
                if isinstance(message, (Finished, Failed)):
                    del busy[i]
                yield stack, message


def _serve(connection: Connection, device: str, threads: int, settings: WorkerSettings) -> None:
    """Answer requests in a worker process until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which terminates its workers
    _end_with_parent()
    torch.set_num_threads(threads)
    try:
        trainer = Trainer(torch.device(device), settings)
        while True:
            request = connection.recv()
            if isinstance(request, _Measure):
                rate = measure_rate(request.key, request.facts, request.size, trainer.device, quick=request.quick)
                connection.send(rate)
                continue
            for message in trainer.train(request):
                connection.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has ended
    except Exception:
        connection.send(_Crashed(traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process when its parent ends, also in the middle of a long epoch: a killed parent cannot do it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step.

    By default glibc returns large blocks to the system at once, and a step of a stack then causes a thousand page
    faults to get the same memory again: a quarter of the time of a small CNN's step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)
