"""The Ray engine: stacks as tasks on a cluster of machines, or on this one; README.md says how to start a cluster."""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.data.streamed import Streamed
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
from ncollapse.train.engine.ray_connect import ClusterHead, connect
from ncollapse.train.engine.this_machine import keep_memory
from ncollapse.train.engine.throughput import DataFacts, Rate, measure_rate, room_on
from ncollapse.train.errors import DataError, UserError, first_line
from ncollapse.train.plugins import Plugins
from ncollapse.train.results.checkpoint_file import read_checkpoint
from ncollapse.train.results.writer import PlannedStack

#: Threads of each task. Tasks share a machine's cores among them, as the processes of the local engine do.
_THREADS = 1
#: Seconds between two queries of the cluster's size.
_QUERY_SECONDS = 2.0


class Cluster(Engine):
    """Trains stacks as tasks on a Ray cluster: one on each core, or some on each GPU.

    Args:
        ray_address: HOST:PORT; by default $RAY_ADDRESS, a cluster on this machine, or else a new one here.
        device: "cpu" for the cluster's cores, "cuda" for its GPUs.
        loaded: data sets by name, on the CPU, that were read already; emptied as they are used.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or it has nothing of the kind of `device`.
    """

    in_process = False
    note: str
    """A sentence for the user on a cluster that was started for this sweep; empty where there was one."""

    def __init__(
        self, ray_address: str | None, device: torch.device, settings: WorkerSettings,
        loaded: dict[str, Dataset] | None = None,
    ) -> None:  # fmt: skip
        self._ray, self.note = connect(ray_address)
        self._head = ClusterHead(self._ray.get_runtime_context().gcs_address)
        self._settings, self._settings_ref = settings, self._ray.put(settings)
        self._loaded = {} if loaded is None else loaded
        self._on_gpus = device.type == "cuda"
        self._device = torch.device("cuda", 0) if self._on_gpus else device  # Ray shows a task only its own GPU
        self._workers, self._threads, self._per_gpu = 1, _THREADS, 1
        self._data: dict[str, Any] = {}  # name -> reference to the data set in the cluster
        self._in_flight: dict[Any, PlannedStack] = {}  # the messages of a task -> the stack that it trains
        self._probes: list[Any] = []  # actors that measure, with the bundle of resources that they share on a GPU
        self._bundle: Any = None
        self._stopping = False
        if self.slots(1) == 0:
            self.close()
            raise UserError(
                f"the Ray cluster has no {'GPU' if self._on_gpus else 'CPU'} to train on: give another --device, or "
                "start nodes that have some with `ray start --address HOST:6379`"
            )

    @property
    def device(self) -> str:
        resources = self._ray.cluster_resources()
        if not self._on_gpus:
            kind = f"{resources.get('CPU', 0):g} cores"
        else:
            prefix = "accelerator_type:"
            models = ", ".join(sorted(name.removeprefix(prefix) for name in resources if name.startswith(prefix)))
            kind = f"{resources.get('GPU', 0):g} GPUs" + (f" ({models})" if models else "")
        nodes = len(self._nodes())
        return f"Ray cluster, {nodes} machine{'s' if nodes != 1 else ''}, {kind}"

    def _nodes(self) -> list[dict[str, Any]]:
        self._head.check()  # Ray would wait for a lost one for a minute, and then end this process
        return [node for node in self._ray.nodes() if node["Alive"]]

    @property
    def gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0)) if self._on_gpus else 0

    def slots(self, per_gpu: int) -> int:
        """See `Engine`; each worker on a GPU also needs a core of the same machine."""
        return sum(self._slots_of(node["Resources"], per_gpu) for node in self._nodes())

    def _slots_of(self, resources: Mapping[str, float], per_gpu: int) -> int:
        cores = int(resources.get("CPU", 0) // self._threads)
        return min(cores, int(resources.get("GPU", 0)) * per_gpu) if self._on_gpus else cores

    def threads(self, workers: int) -> int:
        return _THREADS

    def use(self, workers: int, threads: int, per_gpu: int = 1) -> None:
        """See `Engine`; `run` uses all slots of the cluster, since nodes come and go."""
        if (workers, threads, per_gpu) != (self._workers, self._threads, self._per_gpu):
            self._close_probes()
        self._workers, self._threads, self._per_gpu = workers, threads, per_gpu

    def _remote(self, function: Callable[..., Any], **options: Any) -> Any:
        gpus = 1 / self._per_gpu if self._on_gpus else 0
        return self._ray.remote(num_cpus=self._threads, num_gpus=gpus, **options)(function)

    def run(self, next_stack: Callable[[], PlannedStack | None]) -> Iterator[tuple[PlannedStack, Message]]:
        self._close_probes()
        # Ray must not retry by itself: it would start from the first checkpoint, and send every message twice. The
        # sweep retries from the last checkpoint. For each task on a GPU Ray starts a new process, since an idle one
        # would keep the GPU's memory.
        task = self._remote(_train, num_returns="streaming", max_retries=0)
        flag, told = self._ray.remote(num_cpus=0)(_StopFlag).remote(), False
        queried, blind = -math.inf, False  # blind: a data set cannot be read; what is in training goes on
        while True:
            if time.monotonic() - queried > _QUERY_SECONDS:  # nodes come and go
                slots, queried = self.slots(self._per_gpu), time.monotonic()
            # One task waits even where no node is left: for nodes that come back, or that an autoscaler starts for it.
            while not blind and len(self._in_flight) < max(slots, 1) and (stack := next_stack()) is not None:
                try:
                    checkpoint = None if stack.checkpoint is None else read_checkpoint(stack.checkpoint, stack.epoch)
                    data = [self._data_set(stack.runs[0].data_key)]
                except UserError as error:
                    yield stack, failure(error)
                    blind = isinstance(error, DataError)
                    continue
                messages = task.remote(
                    stack.runs, data, self._device, self._settings_ref, checkpoint, self._threads, flag, stack.branches
                )
                self._in_flight[messages] = stack
            if not self._in_flight:
                return
            if self._stopping and not told:
                told = True
                flag.raise_it.remote()
            self._ray.wait(list(self._in_flight), timeout=_QUERY_SECONDS)
            # Take a message of every task that has one: a stack with many messages would hold up those of the others.
            ready, _ = self._ray.wait(list(self._in_flight), num_returns=len(self._in_flight), timeout=0)
            for messages in ready:
                stack, message = self._in_flight[messages], self._receive(messages)
                if isinstance(message, (Finished, Stopped, Failed)):
                    del self._in_flight[messages]
                yield stack, message

    def _data_set(self, name: str) -> Any:
        """A reference to a data set, put into the cluster at its first use: its machines need no data folder.

        None for one that is streamed, which they have to have.
        """
        if name not in self._data:
            data = self._loaded.pop(name, None) or self._settings.load(name, torch.device("cpu"))
            if isinstance(data, Streamed):  # each process opens it itself
                return None
            # Arrays instead of tensors: processes of a machine share the memory of arrays that Ray holds.
            parts = {k: part.numpy() if isinstance(part, torch.Tensor) else part for k, part in vars(data).items()}
            self._data[name] = self._ray.put(parts)
        return self._data[name]

    def _receive(self, messages: Any) -> Message:
        errors = self._ray.exceptions
        lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.RaySystemError)
        try:
            return self._ray.get(next(messages))
        except errors.OutOfMemoryError as error:  # Ray ended the process before the system would have
            return Failed("memory", first_line(error) or type(error).__name__)
        except lost as error:
            return Failed("lost", first_line(error) or type(error).__name__)

    def room(self, key: StackKey, facts: DataFacts) -> int | None:
        """See `Engine`; known once probes are there."""
        if not self._probes:
            return None
        # Stacks on one machine share its memory, those on one GPU the GPU's.
        slots = {node["NodeID"]: self._slots_of(node["Resources"], 1) for node in self._nodes()}
        sharing = dict.fromkeys(slots, self._per_gpu) if self._on_gpus else slots
        fits = self._ask("room", key, facts)
        return max(1, min(fit // max(1, min(sharing[node], self._workers)) for node, fit in fits))

    def measure_rate(
        self, key: StackKey, facts: DataFacts, size: int, *, branches: bool = False, quick: bool = False,
        runs: Sequence[RunConfig] = (),
    ) -> Rate | None:  # fmt: skip
        """See `Engine`; measured by workers that share a machine or a GPU, and scaled to all workers."""
        if not self._probes:
            self._open_probes()
        errors = self._ray.exceptions
        try:
            rates = self._ask("measure_rate", key, facts, size, branches, quick, runs)
        except (errors.RayActorError, errors.OutOfMemoryError):  # killed for the memory it took
            self._close_probes()
            return None
        if None in rates:
            return None
        total = Rate.total(rates)
        return dataclasses.replace(total, steps=total.steps * self._workers / len(rates))

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        return self._ray.get([getattr(probe, method).remote(*arguments) for probe in self._probes])

    def _open_probes(self) -> None:
        """Start processes that measure at once, under the conditions of those that will train."""
        if self._on_gpus:  # GPUs share nothing, so the workers of one GPU are enough, in a bundle of resources with it
            count = min(self._per_gpu, self._workers)
            self._bundle = self._ray.util.placement_group([{"GPU": 1.0, "CPU": float(self._threads * count)}])
            strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._bundle)
            probe = self._remote(_Probe, scheduling_strategy=strategy)
        else:  # cores share caches and memory
            count = max(1, min(self._workers, self._slots_of(self._ray.available_resources(), 1)))
            probe = self._remote(_Probe)
        plugins = self._settings.plugins
        self._probes = [probe.remote(self._threads, self._device, plugins) for _ in range(count)]

    def _close_probes(self) -> None:
        for probe in self._probes:
            self._ray.kill(probe)
        if self._bundle is not None:
            self._ray.util.remove_placement_group(self._bundle)
        self._probes, self._bundle = [], None

    def stop(self) -> None:
        self._stopping = True

    def close(self) -> None:
        """See `Engine`; a cluster that was running before keeps running."""
        self._head.close()
        if not self._head.lost:  # then nothing answers
            self._close_probes()
            for messages in self._in_flight:
                self._ray.cancel(messages, force=True)
        self._ray.shutdown()


# The rest runs in processes of the cluster.


class _Probe:
    def __init__(self, threads: int, device: torch.device, plugins: Plugins) -> None:
        _set_up(threads)
        self._device, self._plugins = device, plugins

    def room(self, key: StackKey, facts: DataFacts) -> tuple[str, int]:
        """Return the id of the node, and the number of runs that fit into its memory."""
        import ray

        return ray.get_runtime_context().get_node_id(), room_on(self._device, key, facts, plugins=self._plugins)

    def measure_rate(
        self, key: StackKey, facts: DataFacts, size: int, branches: bool, quick: bool, runs: Sequence[RunConfig]
    ) -> Rate | None:
        how: dict[str, Any] = {"branches": branches, "quick": quick, "runs": runs}
        return measure_rate(key, facts, size, self._device, plugins=self._plugins, **how)


class _StopFlag:
    """Tells the tasks, on whatever machine, that the sweep stops."""

    def __init__(self) -> None:
        self._raised = False

    def raise_it(self) -> None:
        self._raised = True

    def is_raised(self) -> bool:
        return self._raised


def _train(
    runs: Sequence[RunConfig], data: list[Any], device: torch.device, settings: WorkerSettings,
    checkpoint: bytes | None, threads: int, flag: Any, branches: bool,
) -> Iterator[Message]:  # fmt: skip
    """Train a stack; `data` holds a reference, since Ray would replace a bare one by a new copy for every task."""
    _set_up(threads)
    read = None if checkpoint is None else lambda: checkpoint
    asked = time.monotonic()

    def stopping() -> bool:
        nonlocal asked
        import ray

        if time.monotonic() - asked < _QUERY_SECONDS:  # an answer takes a millisecond, an epoch may take less
            return False
        asked = time.monotonic()
        return bool(ray.get(flag.is_raised.remote()))

    def data_set() -> Dataset:
        return settings.load(runs[0].data_key, device) if data[0] is None else _data_set(data[0], device)

    yield from train_stack(runs, data_set, device, settings, read, stopping, branches)


@functools.cache
def _set_up(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_memory()


@functools.cache  # a process trains stack after stack; all data sets stay, since they alternate
def _data_set(reference: Any, device: torch.device) -> Dataset:
    import ray

    with warnings.catch_warnings():
        # torch warns that such arrays cannot be written to; nothing writes to a data set.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        parts: dict[str, Any] = {
            name: torch.from_numpy(part).to(device) if isinstance(part, np.ndarray) else part
            for name, part in ray.get(reference).items()
        }
    return Dataset(**parts)
