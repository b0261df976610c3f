"""Stacks trained here: in this process, or in several side by side, each with a device and a share of the cores."""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ncollapse.train.data.sets import Dataset
from ncollapse.train.results.provenance import device_name
from ncollapse.train.sweep.grouping import Shape
from ncollapse.train.sweep.messages import Failed, Finished, How, Job, Message, Take, train
from ncollapse.train.sweep.throughput import Facts, measure


class Trainer:
    """What a process trains with: a device, and the data sets that it has loaded."""

    def __init__(self, device: torch.device, how: How) -> None:
        self.device, self._how = device, how
        self._data: dict[str, Dataset] = {}  # all are kept: stacks of different data sets take turns
        keep_memory()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def data(self, name: str) -> Dataset:
        """A data set on the device."""
        if name not in self._data:
            read = self._how.loaded.pop(name, None)
            self._data[name] = self._how.load_data(name, self.device) if read is None else read.to(self.device)
        return self._data[name]

    def train(self, job: Job) -> Iterator[Message]:
        """Train a stack; see `ncollapse.train.sweep.messages.train`."""
        return train(job, self.data(job.runs[0].data), self.device, self._how)


class InProcess:
    """Trains one stack after the other in this process, with so many threads until it is closed."""

    def __init__(self, device: torch.device, how: How, threads: int) -> None:
        self.trainer = Trainer(device, how)
        self.device = device_name(str(device))
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def run(self, take: Take) -> Iterator[tuple[Job, Message]]:
        """See `ncollapse.train.sweep.messages.Engine`."""
        while (job := take()) is not None:
            for message in self.trainer.train(job):
                yield job, message

    def close(self) -> None:
        """See `ncollapse.train.sweep.messages.Engine`."""
        torch.set_num_threads(self._before)


@dataclasses.dataclass(frozen=True)
class _Measure:
    shape: Shape
    facts: Facts
    size: int


@dataclasses.dataclass(frozen=True)
class _Crashed:
    text: str


class _Worker:
    """A process that trains what it is sent, and this end of the pipe to it."""

    def __init__(self, device: str, threads: int, how: How) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take torch's threads and the GPU's state along
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, device, threads, how), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """The next message; Failed where the process is gone."""
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


class Processes:
    """Trains stacks side by side in processes of this machine.

    Args:
        devices: for each process the device that it trains on.
        threads: of each process.
        how: must be picklable.
    """

    def __init__(self, devices: Sequence[str], threads: int, how: How) -> None:
        self._threads, self._how = threads, how
        self._devices = list(devices)
        how.loaded.clear()  # each has its own
        self._workers = [_Worker(device, threads, how) for device in devices]

    @property
    def device(self) -> str:
        """See `ncollapse.train.sweep.messages.Engine`."""
        counts = Counter(device_name(device) for device in dict.fromkeys(self._devices))
        return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items())

    def measure(self, shape: Shape, facts: Facts, size: int) -> float | None:
        """Training steps a second of all runs, each process with a stack of `size` at once; None: no room for it."""
        for worker in self._workers:
            worker.connection.send(_Measure(shape, facts, size))
        answers = [worker.receive() for worker in self._workers]
        lost = [i for i, answer in enumerate(answers) if isinstance(answer, Failed)]
        for i in lost:
            self._replace(i)
        return None if lost or None in answers else sum(answers)

    def keep(self, count: int) -> None:
        """Let all but so many processes go."""
        for worker in self._workers[count:]:
            worker.kill()
        self._workers, self._devices = self._workers[:count], self._devices[:count]

    def run(self, take: Take) -> Iterator[tuple[Job, Message]]:
        """See `ncollapse.train.sweep.messages.Engine`."""
        busy: dict[int, Job] = {}  # index of the worker -> what it trains
        while True:
            for i, worker in enumerate(self._workers):
                if i not in busy and (job := take()) is not None:
                    busy[i] = job
                    with contextlib.suppress(OSError):  # gone while it was idle: `receive` says so
                        worker.connection.send(job)
            if not busy:
                return
            indices = {self._workers[i].connection: i for i in busy}
            for connection in wait(list(indices)):
                assert isinstance(connection, Connection)
                i = indices[connection]
                message = self._workers[i].receive()
                job = busy[i]
                if isinstance(message, Failed) and message.kind == "lost":
                    self._replace(i)
                if isinstance(message, (Finished, Failed)):
                    del busy[i]
                yield job, message

    def _replace(self, i: int) -> None:
        self._workers[i].kill()
        self._workers[i] = _Worker(self._devices[i], self._threads, self._how)

    def close(self) -> None:
        """See `ncollapse.train.sweep.messages.Engine`."""
        for worker in self._workers:
            worker.kill()


def _serve(connection: Connection, device: str, threads: int, how: How) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    _end_with_parent()
    torch.set_num_threads(threads)
    try:
        trainer = Trainer(torch.device(device), how)
        while True:
            request = connection.recv()
            if isinstance(request, _Measure):
                connection.send(measure(request.shape, request.facts, request.size, trainer.device))
                continue
            for message in trainer.train(request):
                connection.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except Exception:
        connection.send(_Crashed(traceback.format_exc()))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers: they look out for it, also in the middle of a long epoch."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step.

    By default glibc gives large blocks back to the system at once, and a step of a stack then takes a thousand page
    faults to get the same memory again: a quarter of a small CNN's step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)
