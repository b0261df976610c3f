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
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ncollapse.train.data.sets import Dataset
from ncollapse.train.errors import UserError
from ncollapse.train.sweep.grouping import Shape
from ncollapse.train.sweep.messages import Engine, Failed, Finished, How, Job, Message, Take, train
from ncollapse.train.sweep.processes import keep_memory
from ncollapse.train.sweep.ray_connect import connect
from ncollapse.train.sweep.stack_size import Choice, Work
from ncollapse.train.sweep.this_machine import PER_GPU, WORTH_MEASURING, room_for
from ncollapse.train.sweep.throughput import Facts, measure

#: Of each task. Tasks share a machine's cores among them, as the processes of the local engine do.
_THREADS = 1
#: Seconds between looks at the size of the cluster.
_LOOK = 2.0


def choose_cluster(work: Work, ray_address: str | None, device: torch.device, how: How) -> tuple[Choice, Engine]:
    """Choose the size of stacks by measurement on the cluster, and start the engine.

    Args:
        ray_address: HOST:PORT; by default $RAY_ADDRESS, a cluster on this machine, or else a new one here.
        device: "cpu" for the cluster's cores, "cuda" for its GPUs.

    Raises:
        UserError: see `Cluster`.
    """
    engine = Cluster(ray_address, _THREADS, device, how)
    try:
        return engine.choose(work), engine
    except BaseException:
        engine.close()
        raise


class Cluster:
    """Trains stacks as tasks on a Ray cluster: one on `threads` cores each, or `per_gpu` on each GPU.

    Args:
        ray_address, device: see `choose_cluster`.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or it has nothing of the kind of `device`.
    """

    def __init__(self, ray_address: str | None, threads: int, device: torch.device, how: How, per_gpu: int = 1) -> None:
        self._ray = connect(ray_address)
        self._errors = self._ray.exceptions
        self._given, self._how = how, self._ray.put(how)
        self._threads, self._gpu, self._per_gpu = threads, device.type == "cuda", per_gpu
        self._device = torch.device("cuda", 0) if self._gpu else device  # Ray shows a task its own GPU alone
        self._data: dict[str, Any] = {}  # name -> reference to the data set in the cluster
        self._flying: dict[Any, Job] = {}  # the messages of a task -> what it trains
        if self._room() == 0:
            self.close()
            raise UserError(
                f"the Ray cluster has no {'GPU' if self._gpu else 'CPU'} to train on: give another --device, or start "
                "nodes that have some with `ray start --address HOST:6379`"
            )

    def _remote(self, what: Callable[..., Any], **options: Any) -> Any:
        return self._ray.remote(num_cpus=self._threads, num_gpus=1 / self._per_gpu if self._gpu else 0, **options)(what)

    def _room(self, resources: Mapping[str, float] | None = None) -> int:
        """How many stacks the whole cluster trains side by side, or these resources of it."""
        resources = self._ray.cluster_resources() if resources is None else resources
        cores = int(resources.get("CPU", 0) // self._threads)
        return min(cores, int(resources.get("GPU", 0)) * self._per_gpu) if self._gpu else cores

    @property
    def device(self) -> str:
        """See `ncollapse.train.sweep.messages.Engine`."""
        resources = self._ray.cluster_resources()
        if not self._gpu:
            kind = f"{resources.get('CPU', 0):g} cores"
        else:
            prefix = "accelerator_type:"
            models = ", ".join(sorted(name.removeprefix(prefix) for name in resources if name.startswith(prefix)))
            kind = f"{resources.get('GPU', 0):g} GPUs" + (f" ({models})" if models else "")
        nodes = sum(node["Alive"] for node in self._ray.nodes())
        return f"Ray cluster, {nodes} machine{'s' if nodes != 1 else ''}, {kind}"

    def run(self, take: Take) -> Iterator[tuple[Job, Message]]:
        """See `ncollapse.train.sweep.messages.Engine`."""
        # Ray must not try again by itself: it would start with the first checkpoint, and give every message twice. The
        # sweep does, from the last checkpoint. For each task on a GPU Ray starts a new process, as an idle one would
        # keep the GPU's memory.
        task = self._remote(_train, num_returns="streaming", max_retries=0)
        room, looked = self._room(), time.monotonic()
        while True:
            # One task waits even where no node is left: for nodes that come back, or that an autoscaler starts for it.
            while len(self._flying) < max(room, 1) and (job := take()) is not None:
                messages = task.remote(job, [self._data_set(job)], self._how, self._threads, self._device)
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
            data = self._given.loaded.pop(name, None) or self._given.load_data(name, torch.device("cpu"))
            self._data[name] = self._ray.put(_packed(data))
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
        """The best size of stacks, with as many side by side as the cluster has room for, and how many share a GPU."""
        if len(work.runs) == 1 or (work.stack != "auto" and not self._gpu):  # too large, and the sweep halves it
            choice = work.unmeasured(self._threads, {shape: len(own) for shape, own in work.shapes.items()})
            return dataclasses.replace(choice, workers=min(self._room(), len(work.runs)))
        choices = []
        for per_gpu in self._packings():
            self._per_gpu = per_gpu
            choices.append(self._measured(work))
            if not choices[0].rates:  # too little to do
                return choices[0]
        best = min(choices, key=lambda choice: work.seconds(choice.rates))
        self._per_gpu = best.per_gpu
        return dataclasses.replace(best, measured=tuple(one for choice in choices for one in choice.measured))

    def _packings(self) -> list[int]:
        """How many stacks may share a GPU: as many as it has cores beside it."""
        if not self._gpu:
            return [1]
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        cores = max(node.get("CPU", 0) / node["GPU"] for node in nodes)
        return [count for count in PER_GPU if count == 1 or count * self._threads <= cores]

    def _measured(self, work: Work) -> Choice:
        """The best size of stacks by measurement; an unmeasured one where there is too little to do."""
        workers = min(self._room(), len(work.runs))
        with self._probes(workers) as (count, ask):

            def rate(shape: Shape, facts: Facts, size: int, quick: bool = False) -> float | None:
                try:
                    rates = ask("measure", shape, facts, size, quick)
                except (self._errors.RayActorError, self._errors.OutOfMemoryError):  # killed for the memory it took
                    return None
                return None if None in rates else sum(rates) * workers / count

            shapes = {shape: work.facts[shape.data] for shape in work.shapes}
            fits = ask("room", shapes)
            # Stacks on one machine share its memory, those on one GPU the GPU's.
            nodes = self._ray.nodes()
            beside = {node["NodeID"]: self._per_gpu if self._gpu else self._room(node["Resources"]) for node in nodes}
            room = {s: min(fit[s] // max(1, min(beside[node], workers)) for node, fit in fits) for s in shapes}
            room = {shape: max(1, fit) for shape, fit in room.items()}
            if self._per_gpu == 1:
                choice = dataclasses.replace(work.unmeasured(self._threads, room), workers=workers)
                quick = {s: rate(s, shapes[s], size, quick=True) for s, size in choice.sizes.items()}
                if work.seconds({shape: rate for shape, rate in quick.items() if rate}) < WORTH_MEASURING:
                    return choice
            return dataclasses.replace(work.measured(rate, workers, self._threads, room), per_gpu=self._per_gpu)

    @contextmanager
    def _probes(self, workers: int) -> Iterator[tuple[int, Callable[..., list[Any]]]]:
        """Processes that measure at once, as those that train would: how many, and what asks all of them."""
        if self._gpu:  # GPUs share nothing: those that share one, in a bundle of resources that has one
            count = min(self._per_gpu, workers)
            bundle = {"GPU": 1.0, "CPU": float(self._threads * count)}
            group = self._ray.util.placement_group([bundle])
            within = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
            probe = self._remote(_Probe, scheduling_strategy=within)
        else:  # cores share caches and memory
            count = max(1, min(workers, self._room(self._ray.available_resources())))
            group, probe = None, self._remote(_Probe)
        probes = [probe.remote(self._threads, self._device) for _ in range(count)]

        def ask(method: str, *args: Any) -> list[Any]:
            answers: list[Any] = self._ray.get([getattr(one, method).remote(*args) for one in probes])
            return answers

        try:
            yield count, ask
        finally:
            for one in probes:
                self._ray.kill(one)
            if group is not None:
                self._ray.util.remove_placement_group(group)

    def close(self) -> None:
        """See `ncollapse.train.sweep.messages.Engine`: a cluster that was there before stays."""
        for messages in self._flying:
            self._ray.cancel(messages, force=True)
        self._ray.shutdown()


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
