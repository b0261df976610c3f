"""The Ray engine: stacks as tasks on a cluster of machines, or on this one.

Two machines, with the same ncollapse, Ray and Python on both::

    ray start --head --port 6379                              # on the first
    ray start --address HOST:6379                             # on every other one, now or later
    ncollapse sweep paper --engine ray --out results/paper    # on the first

The command may run on any machine of the cluster; it alone reads the data sets and writes the results folder. Without a
cluster, Ray starts one on this machine for the time of the sweep. A cluster that asks for a token (Ray makes one where
`~/.ray/auth_token` exists) needs that file and RAY_AUTH_MODE=token on every machine.
"""

import dataclasses
import functools
import importlib
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from nc.train.data import Dataset
from nc.train.engine.choose import Choice, Work
from nc.train.engine.local import WORTH_MEASURING, room_for
from nc.train.engine.measure import Facts, measure
from nc.train.engine.plan import Shape
from nc.train.engine.processes import keep_memory
from nc.train.engine.work import Engine, Failed, Finished, How, Job, Message, Take, train
from nc.train.errors import UserError

#: Of each task. Tasks share a machine's cores among them, as the processes of the local engine do.
_THREADS = 1
#: Seconds between looks at the size of the cluster.
_LOOK = 2.0
#: Seconds that a machine may take to accept a connection.
_ANSWER = 10.0
#: Bounds for what Ray does when something else answers at the address, or this machine is not of the cluster: by
#: default it tries for a quarter of an hour. Read when Ray is imported.
_PATIENCE = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "10",
    "RAY_gcs_server_request_timeout_seconds": "20",
}


def choose_cluster(work: Work, ray_address: str | None, device: torch.device, how: How) -> tuple[Choice, Engine]:
    """Choose the size of stacks by measurement on the cluster, and start the engine.

    Args:
        ray_address: HOST:PORT; by default $RAY_ADDRESS, a cluster on this machine, or else a new one here.
        device: "cpu" for the cluster's cores, "cuda" for its GPUs.

    Raises:
        UserError: see `start_cluster`.
    """
    engine = Cluster(ray_address, _THREADS, device, how)
    try:
        return engine.choose(work), engine
    except BaseException:
        engine.close()
        raise


def start_cluster(ray_address: str | None, threads: int, device: torch.device, how: How) -> Engine:
    """The engine alone, for stacks that are planned already; see `choose_cluster`.

    Args:
        threads: of each stack.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or it has nothing of the kind of `device`.
    """
    return Cluster(ray_address, threads, device, how)


class Cluster:
    """Trains stacks as tasks on a Ray cluster: one on `threads` cores each, or one on each GPU."""

    def __init__(self, ray_address: str | None, threads: int, device: torch.device, how: How) -> None:
        self._ray = _connect(ray_address)
        self._errors = self._ray.exceptions
        self._load_data, self._how = how.load_data, self._ray.put(how)
        self._threads, self._gpu = threads, device.type == "cuda"
        self._device = torch.device("cuda", 0) if self._gpu else device  # Ray shows a task its own GPU alone
        self._data: dict[str, Any] = {}  # name -> reference to the data set in the cluster
        self._flying: dict[Any, Job] = {}  # the messages of a task -> what it trains
        # Ray must not try again by itself: it would start with the first checkpoint, and give every message twice. The
        # sweep does, from the last checkpoint. For each task on a GPU Ray starts a new process, as an idle one would
        # keep the GPU's memory.
        self._train = self._remote(_train, num_returns="streaming", max_retries=0)
        if self._room() == 0:
            self.close()
            raise UserError(
                f"the Ray cluster has no {'GPU' if self._gpu else 'CPU'} to train on: give another --device, or start "
                "nodes that have some with `ray start --address HOST:6379`"
            )

    def _remote(self, what: Callable[..., Any], **options: Any) -> Any:
        return self._ray.remote(num_cpus=self._threads, num_gpus=int(self._gpu), **options)(what)

    def _room(self, resources: Mapping[str, float] | None = None) -> int:
        """How many stacks the whole cluster trains side by side, or these resources of it."""
        resources = self._ray.cluster_resources() if resources is None else resources
        cores = int(resources.get("CPU", 0) // self._threads)
        return min(cores, int(resources.get("GPU", 0))) if self._gpu else cores

    def run(self, take: Take) -> Iterator[tuple[Job, Message]]:
        """See `nc.train.engine.work.Engine`."""
        room, looked = self._room(), time.monotonic()
        while True:
            # One task waits even where no node is left: for nodes that come back, or that an autoscaler starts for it.
            while len(self._flying) < max(room, 1) and (job := take()) is not None:
                messages = self._train.remote(job, [self._data_set(job)], self._how, self._threads, self._device)
                self._flying[messages] = job
            if not self._flying:
                return
            self._ray.wait(list(self._flying), timeout=_LOOK)
            # Not the first that is ready alone: stacks that talk much would keep the others from being heard.
            ready, _ = self._ray.wait(list(self._flying), num_returns=len(self._flying), timeout=0)
            for messages in ready:
                job, message = self._flying[messages], self._receive(messages)
                if isinstance(message, (Finished, Failed)):
                    del self._flying[messages]
                yield job, message
            if time.monotonic() - looked > _LOOK:  # nodes come and go
                room, looked = self._room(), time.monotonic()

    def _data_set(self, job: Job) -> Any:
        """The data set of a stack, put into the cluster when it is first needed: its machines need no data folder."""
        name = job.runs[0].data
        if name not in self._data:
            self._data[name] = self._ray.put(_packed(self._load_data(name, torch.device("cpu"))))
        return self._data[name]

    def _receive(self, messages: Any) -> Message:
        errors = self._errors
        lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.RaySystemError)
        try:
            message: Message = self._ray.get(next(messages))
            return message
        except errors.OutOfMemoryError as error:  # Ray ended the process before the system would have
            return Failed("memory", _first_line(error))
        except lost as error:
            return Failed("lost", _first_line(error))

    def choose(self, work: Work) -> Choice:
        """The best size of stacks, with as many side by side as the cluster has room for."""
        workers = min(self._room(), len(work.runs))
        if work.stack != "auto" or len(work.runs) == 1:  # where that is too large, the sweep halves it
            choice = work.unmeasured(self._threads, {shape: len(own) for shape, own in work.shapes.items()})
            return dataclasses.replace(choice, workers=workers)
        # Cores share caches and memory, so that all are measured at once; GPUs share nothing.
        count = 1 if self._gpu else max(1, min(workers, self._room(self._ray.available_resources())))
        probe = self._remote(_Probe)
        probes = [probe.remote(self._threads, self._device) for _ in range(count)]

        def ask(method: str, *args: Any) -> list[Any]:
            answers: list[Any] = self._ray.get([getattr(one, method).remote(*args) for one in probes])
            return answers

        def rate(shape: Shape, facts: Facts, size: int, quick: bool = False) -> float | None:
            try:
                rates = ask("measure", shape, facts, size, quick)
            except (self._errors.RayActorError, self._errors.OutOfMemoryError):  # killed for the memory that it took
                return None
            return None if None in rates else sum(rates) * workers / count

        try:
            shapes = {shape: work.facts[shape.data] for shape in work.shapes}
            fits = ask("room", shapes)
            # Stacks on one machine share its memory; a GPU is a stack's own.
            beside = {node["NodeID"]: 1 if self._gpu else self._room(node["Resources"]) for node in self._ray.nodes()}
            room = {s: min(fit[s] // max(1, min(beside[node], workers)) for node, fit in fits) for s in shapes}
            room = {shape: max(1, fit) for shape, fit in room.items()}
            choice = dataclasses.replace(work.unmeasured(self._threads, room), workers=workers)
            quick = {s: rate(s, shapes[s], size, quick=True) for s, size in choice.sizes.items()}
            if work.seconds({shape: rate for shape, rate in quick.items() if rate}) < WORTH_MEASURING:
                return choice
            return work.measured(rate, workers, self._threads, room)
        finally:
            for one in probes:
                self._ray.kill(one)

    def close(self) -> None:
        """See `nc.train.engine.work.Engine`: a cluster that was there before stays."""
        for messages in self._flying:
            self._ray.cancel(messages, force=True)
        self._ray.shutdown()


def _connect(ray_address: str | None) -> Any:
    """Connect this process to a cluster, or start one; returns the module ray. See `start_cluster` for errors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}): pip install 'ncollapse[ray]'") from None
    address = address or _running_here()
    if address is not None and address not in ("auto", "local"):  # names that Ray knows
        _knock(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(ray_address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        why = [repr(error), *str(error.__cause__ or error).strip().splitlines()][-1]
        raise UserError(_no_answer(address or "this machine", why)) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which ends the process at once
    return ray


def _running_here() -> str | None:
    """The address of a cluster that was started on this machine, where Ray tells it."""
    with suppress(ImportError, AttributeError):
        found: str | None = importlib.import_module("ray._private.services").canonicalize_bootstrap_address(None)
        return found
    return None


def _knock(address: str) -> None:
    """Raise UserError unless something answers at an address: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise UserError(f"--ray-address is HOST:PORT, as in 192.168.0.1:6379; got {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(_no_answer(address, str(error))) from None


def _no_answer(address: str, why: str) -> str:
    return (
        f"no connection to a Ray cluster at {address} ({why}). Start one with `ray start --head --port 6379`, and with "
        "`ray start --address HOST:6379` on its other machines; this must be one of them. `ray stop` ends what is left "
        "of one here; without a cluster, --ray-address and $RAY_ADDRESS, Ray starts one on this machine alone"
    )


# What follows runs in processes of the cluster.


class _Probe:
    def __init__(self, threads: int, device: torch.device) -> None:
        _set_up(threads)
        self._device = device

    def room(self, shapes: dict[Shape, Facts]) -> tuple[str, dict[Shape, int]]:
        """The node, and how many runs of each shape fit into its memory."""
        import ray

        fits = {shape: room_for(shape, facts, self._device) for shape, facts in shapes.items()}
        return ray.get_runtime_context().get_node_id(), fits

    def measure(self, shape: Shape, facts: Facts, size: int, quick: bool) -> float | None:
        return measure(shape, facts, size, self._device, quick=quick)


def _train(job: Job, data: list[Any], how: How, threads: int, device: torch.device) -> Iterator[Message]:
    """The task: train a stack.

    Args:
        data: holds the reference to the data set; a bare one Ray would replace by a new copy for every task.
    """
    _set_up(threads)
    yield from train(job, _data_set(data[0], device), device, how)


@functools.cache
def _set_up(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_memory()


@functools.cache  # a process trains stack after stack; all data sets stay, since they take turns
def _data_set(reference: Any, device: torch.device) -> Dataset:
    import ray

    with warnings.catch_warnings():
        # torch warns that such arrays cannot be written to; nobody writes to a data set.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        parts: dict[str, Any] = {
            name: torch.from_numpy(part).to(device) if isinstance(part, np.ndarray) else part
            for name, part in ray.get(reference).items()
        }
    return Dataset(**parts)


def _packed(data: Dataset) -> dict[str, Any]:
    """A data set with arrays for tensors: the processes of a machine share the memory of arrays that Ray holds."""
    parts = {field.name: getattr(data, field.name) for field in dataclasses.fields(Dataset)}
    return {name: part.numpy() if isinstance(part, torch.Tensor) else part for name, part in parts.items()}


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
