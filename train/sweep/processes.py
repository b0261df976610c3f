"""The workers of this machine: processes that train stacks, each with a device and a share of the cores."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ncollapse.train.data.sets import Dataset
from ncollapse.train.results.writer import PlannedStack
from ncollapse.train.sweep.messages import Failed, Message, WorkerSettings, train_stack
from ncollapse.train.sweep.throughput import measure_rate

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
        self._device, self._settings, self._loaded = device, settings, loaded or {}
        self._data: dict[str, Dataset] = {}  # all of them, since stacks of different data sets alternate
        keep_memory()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def train(self, stack: PlannedStack) -> Iterator[Message]:
        """Train a stack; see `ncollapse.train.sweep.messages.train_stack`."""
        name = stack.runs[0].data
        if name not in self._data:
            data = self._loaded.pop(name, None) or self._settings.load_data(name, self._device)
            self._data[name] = data.to(self._device)
        checkpoint = None if stack.checkpoint is None else stack.checkpoint.read_bytes()
        return train_stack(stack.runs, self._data[name], self._device, self._settings, checkpoint)


class Worker:
    """A process that trains stacks and measures rates, and this end of the pipe to it."""

    def __init__(self, device: torch.device, threads: int, settings: WorkerSettings) -> None:
        self.connection, child_end = _CONTEXT.Pipe()
        arguments = (child_end, device, threads, settings)
        self.process: BaseProcess = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        child_end.close()

    def send(self, request: Any) -> None:
        """Send a `PlannedStack` to train, or (key, facts, size, quick) to measure a rate."""
        with contextlib.suppress(OSError):  # the process has ended: `receive` says so
            self.connection.send(request)

    def receive(self) -> Any:
        """Wait for the next message or rate; Failed where the process has ended.

        Raises:
            RuntimeError: an exception in the process, with its traceback.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # it may have been killed in the middle of a message
            self.process.join(5)
            return Failed("lost", f"its process ended with exit code {self.process.exitcode}")
        if isinstance(answer, str):
            raise RuntimeError(f"a training process failed:\n{answer}")
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, device: torch.device, threads: int, settings: WorkerSettings) -> None:
    """Answer requests in a worker process until the parent ends; after an exception, with the text of its traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which terminates its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        trainer = Trainer(device, settings)
        while True:
            request = connection.recv()
            if isinstance(request, PlannedStack):
                for message in trainer.train(request):
                    connection.send(message)
            else:
                key, facts, size, quick = request
                connection.send(measure_rate(key, facts, size, device, quick=quick))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has ended
    except Exception:
        connection.send(traceback.format_exc())


def _end_with_parent() -> None:
    """End this process when its parent ends, also in the middle of a long epoch: a killed parent cannot do it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


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
