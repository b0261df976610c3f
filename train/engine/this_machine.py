"""The local engine: the cores or GPUs of this machine, used by this process or by several worker processes."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.sets import Dataset
from ncollapse.train.engine.grouping import StackKey
from ncollapse.train.engine.messages import (
    Engine,
    Failed,
    Finished,
    Message,
    Stopped,
    WorkerSettings,
    failure,
    train_stack,
)
from ncollapse.train.engine.throughput import DataFacts, Rate, measure_rate, room_on
from ncollapse.train.errors import UserError
from ncollapse.train.limits import available_memory, limit_own_memory, memory_limit, processors
from ncollapse.train.results.checkpoint_file import read_checkpoint
from ncollapse.train.results.provenance import device_name
from ncollapse.train.results.writer import PlannedStack

#: How workers start: a fork of this process would copy torch's threads and the state of the GPU.
_CONTEXT = multiprocessing.get_context("spawn")
#: Memory of a process before its first stack, about: PyTorch, and a small data set.
_PROCESS_BYTES = 400 * 2**20


class ThisMachine(Engine):
    """Trains one stack at a time in this process, or several in as many worker processes.

    Args:
        device: "cpu" for all cores, "cuda" for all GPUs, or one GPU.
        loaded: data sets by name, on the CPU, that were read already; emptied as they are used.
    """

    in_process = True

    def __init__(
        self, device: torch.device, settings: WorkerSettings, loaded: dict[str, Dataset] | None = None
    ) -> None:
        every = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        self._devices = every if device.type == "cuda" and device.index is None else [device]
        self._settings, self._loaded = settings, {} if loaded is None else loaded
        self._threads_before = self._threads = torch.get_num_threads()
        self._memory: int | None = None  # bytes that each worker may take, where a container or job limits them
        self._unlimit: Callable[[], None] = lambda: None
        self._trainer: _Trainer | None = None
        self._workers: list[_Worker] = []  # none where this process trains
        # Without a lock, which a killed worker could keep.
        self._stopping = _CONTEXT.RawValue("b", 0)
        # What worker processes get; code that was given in Python is sent as code.
        self._pickled, self.unpicklable = _pickled(settings)  # why they cannot be sent; empty if they can

    @property
    def device(self) -> str:
        used = self._devices[: max(1, len(self._workers))]
        counts = Counter(device_name(str(device)) for device in used)
        return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in counts.items())

    @property
    def gpus(self) -> int:
        return len(self._devices) if self._devices[0].type == "cuda" else 0

    def slots(self, per_gpu: int) -> int:
        # Without a GPU a process needs a core, and memory for itself and as much for what it trains.
        return self.gpus * per_gpu or max(1, min(processors(), available_memory() // (2 * _PROCESS_BYTES)))

    def threads(self, workers: int) -> int:
        return min(self._threads_before, processors()) if workers == 1 else max(1, processors() // workers)

    def use(self, workers: int, threads: int, per_gpu: int = 1) -> None:
        """See `Engine`; here `per_gpu` follows from the number of workers.

        Raises:
            UserError: several workers, and settings that cannot be pickled.
        """
        if workers == 1 or threads != self._threads:
            self._keep_workers(0)
        self._threads = threads
        self._unlimit()
        if memory_limit() is not None and not self.gpus:
            # What is left is for all of them; each takes its own part of it for itself.
            self._memory = max(0, available_memory() - (workers if workers > 1 else 0) * _PROCESS_BYTES) // workers
        if workers == 1:
            if self._memory is not None:
                self._unlimit = limit_own_memory(self._memory)
            torch.set_num_threads(threads)
            self._trainer = self._trainer or _Trainer(self._devices[0], self._settings, self._loaded, self._stopping)
            return
        if self.unpicklable:
            raise UserError(
                f"{workers} workers need code and data that can be sent to other processes ({self.unpicklable}): "
                "define them in a module, or give workers=1"
            )
        self._loaded.clear()  # each process loads its own
        self._keep_workers(workers)
        while len(self._workers) < workers:
            self._workers.append(self._start(len(self._workers)))

    def _start(self, i: int) -> "_Worker":
        device = self._devices[i % len(self._devices)]
        return _Worker(device, self._threads, self._memory, self._pickled, self._stopping)

    def _restart(self, i: int) -> None:
        self._workers[i].kill()
        self._workers[i] = self._start(i)

    def _keep_workers(self, count: int) -> None:
        """Terminate all workers but the first `count`."""
        for worker in self._workers[count:]:
            worker.kill()
        del self._workers[count:]

    def room(self, key: StackKey, facts: DataFacts) -> int:
        # Processes that have just started have not taken their own memory yet.
        reserved = sum(max(0, _PROCESS_BYTES - worker.bytes) for worker in self._workers)
        room = room_on(self._devices[0], key, facts, reserved, plugins=self._settings.plugins) * len(self._devices)
        return max(1, room // max(1, len(self._workers)))

    def measure_rate(
        self, key: StackKey, facts: DataFacts, size: int, *, branches: bool = False, quick: bool = False,
        runs: Sequence[RunConfig] = (),
    ) -> Rate | None:  # fmt: skip
        how: dict[str, Any] = {"branches": branches, "quick": quick, "runs": runs}
        if not self._workers:
            return measure_rate(key, facts, size, self._devices[0], plugins=self._settings.plugins, **how)
        for worker in self._workers:
            worker.send((key, facts, size, how))
        answers = [worker.receive() for worker in self._workers]
        failed = {i: answer for i, answer in enumerate(answers) if isinstance(answer, Failed)}
        for i, answer in failed.items():
            self._restart(i)
            if answer.kind == "unforeseen":
                raise RuntimeError(f"a training process failed:\n{answer.log}")
        return None if failed or None in answers else Rate.total(answers)

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        if not self._workers:
            assert self._trainer is not None, "call `use` first"
            while (stack := next_stack()) is not None:
                for message in self._trainer.train(stack):
                    yield stack, message
                    if isinstance(message, Failed) and message.kind == "data":
                        return
            return
        busy: dict[int, PlannedStack] = {}  # index of the worker -> what it trains
        blind: set[int] = set()  # workers that could not read the data: the others, which have them, go on
        while True:
            for i, worker in enumerate(self._workers):
                if i not in busy and i not in blind and (stack := next_stack()) is not None:
                    busy[i] = stack
                    worker.send(stack)
            if not busy:
                return
            ready = wait([self._workers[i].connection for i in busy])
            for i in [i for i in busy if self._workers[i].connection in ready]:
                stack, message = busy[i], self._workers[i].receive()
                if isinstance(message, Failed) and message.kind in ("lost", "unforeseen"):
                    self._restart(i)
                if isinstance(message, Failed) and message.kind == "data":
                    blind.add(i)
                if isinstance(message, (Finished, Stopped, Failed)):
                    del busy[i]
                yield stack, message

    def stop(self) -> None:
        self._stopping.value = 1

    def close(self) -> None:
        self._keep_workers(0)
        self._trainer = None
        self._unlimit()
        _give_memory_back()
        torch.set_num_threads(self._threads_before)


def _pickled(settings: WorkerSettings) -> tuple[bytes, str]:
    """Return the settings for other processes, and why they cannot be sent; one of both is empty."""
    import cloudpickle

    try:
        return cloudpickle.dumps(settings), ""
    except Exception as error:  # objects of the user's raise whatever they like
        return b"", f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that do not import the user's script: it would run again there, and nothing needs it."""
    main = sys.modules["__main__"]
    names = vars(main)
    kept: dict[str, Any] = {name: names[name] for name in ("__spec__", "__file__") if name in names}
    names |= {"__spec__": None}
    names.pop("__file__", None)
    try:
        yield
    finally:
        names |= kept


class _Trainer:
    """Trains stacks in the process that it is made in, and keeps the data sets that they need on its device."""

    def __init__(
        self, device: torch.device, settings: WorkerSettings, loaded: dict[str, Dataset], stopping: Any
    ) -> None:
        self._device, self._settings, self._loaded, self._stopping = device, settings, loaded, stopping
        self._data: dict[str, Dataset] = {}  # all of them, since stacks of different data sets alternate
        keep_memory()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def train(self, stack: PlannedStack) -> Iterator[Message]:
        def read() -> bytes:
            assert stack.checkpoint is not None
            return read_checkpoint(stack.checkpoint, stack.epoch)

        return train_stack(
            stack.runs, lambda: self._data_set(stack.runs[0].data_key), self._device, self._settings,
            None if stack.checkpoint is None else read, lambda: bool(self._stopping.value), stack.branches,
        )  # fmt: skip

    def _data_set(self, name: str) -> Dataset:
        if name not in self._data:
            data = self._loaded.pop(name, None) or self._settings.load(name, self._device)
            self._data[name] = data.to(self._device)
        return self._data[name]


class _Worker:
    """A process that trains stacks and measures rates, and this end of the pipe to it."""

    def __init__(self, device: torch.device, threads: int, memory: int | None, settings: bytes, stopping: Any) -> None:
        self.connection, child_end = _CONTEXT.Pipe()
        arguments = (child_end, device, threads, memory, settings, stopping)
        self.process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        with _without_main():
            self.process.start()
        child_end.close()

    @property
    def bytes(self) -> int:
        """The memory that the process takes now."""
        import psutil

        with contextlib.suppress(psutil.Error):
            rss: int = psutil.Process(self.process.pid).memory_info().rss
            return rss
        return 0

    def send(self, request: Any) -> None:
        """Send a `PlannedStack` to train, or (key, facts, size, how) to measure a rate."""
        with contextlib.suppress(OSError):  # the process has ended: `receive` says so
            self.connection.send(request)

    def receive(self) -> Any:
        """Wait for a message or rate; Failed where the process has ended or raised an exception."""
        try:
            return self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # it may have been killed in the middle of a message
            self.process.join(5)
            return Failed("lost", _how_it_ended(self.process.exitcode))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(
    connection: Connection, device: torch.device, threads: int, memory: int | None, pickled: bytes, stopping: Any
) -> None:
    """Answer requests in a worker process until the parent ends, or after an exception, with Failed."""
    # Ctrl-C and the signals of a batch system reach all processes of a job, but are for the parent.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if memory is not None:
        limit_own_memory(memory)
    try:
        settings: WorkerSettings = pickle.loads(pickled)
        trainer = _Trainer(device, settings, {}, stopping)
        while True:
            request = connection.recv()
            if isinstance(request, PlannedStack):
                for message in trainer.train(request):
                    connection.send(message)
            else:
                key, facts, size, how = request
                connection.send(measure_rate(key, facts, size, device, plugins=settings.plugins, **how))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has ended
    except Exception as error:
        connection.send(failure(error))


def _how_it_ended(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-exit_code).name
            why = ", by the system for the memory it took, or by somebody" if name == "SIGKILL" else ""
            return f"its process ended with exit code {exit_code}: {name}{why}"
    return f"its process ended with exit code {exit_code}"


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
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, (1 << 31) - 1)


def _give_memory_back() -> None:
    """Give what `keep_memory` has kept back to the system: a report that follows needs it."""
    malloc_trim = _of_c_library("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_c_library(name: str) -> Any:
    """Return a function of the C library; None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
