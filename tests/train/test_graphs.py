"""Steps in CUDA graphs, with a double for the GPU's recorder: gradients of single runs, and what cannot be recorded."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncollapse.train.config import RunConfig
from ncollapse.train.data.dataset import Dataset
from ncollapse.train.plugins import Plugins
from ncollapse.train.training import graphs
from ncollapse.train.training.graphs import waits_for_gpu
from ncollapse.train.training.loop import Training
from ncollapse.train.training.step import Step

#: Whether work is recorded now.
RECORDING: list[str] = []
#: The current device, if any was made that.
DEVICES: list[str] = []


class Recorder:
    """Stands for `torch.cuda.graph`: computes, and at its end refuses what a GPU would refuse."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        assert DEVICES == ["cpu"], "the device of the tensors must be the current one"
        RECORDING.append("recording")

    def __exit__(self, kind: Any, *_: Any) -> None:
        RECORDING.clear()
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


class Graph:
    resets = 0

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        Graph.resets += 1


@contextmanager
def made_current(device: torch.device) -> Iterator[None]:
    DEVICES.append(device.type)
    try:
        yield
    finally:
        DEVICES.pop()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that were set."""
    found: list[str] = []
    for name, double in {
        "CUDAGraph": Graph, "graph": Recorder, "current_stream": lambda: "main", "set_stream": found.append,
        "device": made_current,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(graphs, "main_stream", lambda: None)
    return found


class Mine(nn.Module):
    """A parameter that no layer holds: a single run is computed by the module itself."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.head, self.scale = nn.Linear(64, 8), nn.Linear(8, num_classes), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.hidden(x.flatten(1)) * self.scale).relu())


def masked(logits: Tensor, labels: Tensor) -> Tensor:
    if RECORDING:
        raise RuntimeError("operation not permitted when stream is capturing")
    return F.cross_entropy(logits, labels, reduction="none")


class Waiting(torch.optim.SGD):
    """Says that a graph can hold its step, wrongly."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["capturable"] = True

    def step(self, closure: Any = None) -> None:
        if RECORDING:
            raise RuntimeError("operation not permitted when stream is capturing")
        super().step(closure)


def step_of(data: Dataset, **settings: Any) -> tuple[Training, Step, Callable[[], list[Tensor]]]:
    given: dict[str, Any] = {"model": {"mine": Mine}, "loss": {"masked": masked}, "optimizer": {"waiting": Waiting}}
    plugins = Plugins(given=given)
    used = {"model": "mine"} | settings
    run = RunConfig(code=plugins.code_of(used), limit=64, weight_decay=0.0, **used)  # type: ignore[arg-type]
    training = Training([run], data, torch.device("cpu"), plugins=plugins)
    return training, training._step, lambda: [value.clone() for value in training.stack.tensors().values()]


@pytest.mark.parametrize("optimizer", ["torch.optim:SGD", "waiting"])
def test_a_replay_gives_the_gradients_of_its_graph_to_the_optimizer(
    optimizer: str, digits: Dataset, streams: list[str]
) -> None:
    training, step, values = step_of(digits, optimizer=optimizer)
    batch = torch.arange(16)
    step._capture(batch, None)
    assert step.captured.startswith("forward and backward pass: ")
    if optimizer == "waiting":
        assert "test_graphs.py, line" in step.captured
        assert streams == ["main"]
    expected = values()
    rows = list(training.stack.rows.values())
    grads = [row.grad.clone() for row in rows if row.grad is not None]
    for row in rows:
        row.grad = None  # as after a step of another batch size
    step._replays[batch.shape](batch, None)
    for value, before, grad in zip(values(), expected, grads, strict=True):
        torch.testing.assert_close(value[0], before[0] - training.runs[0].lr * grad)
    assert len(grads) == len(rows)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "torch.optim:SGD"}], ids=["ours", "torch's"])
def test_a_step_and_its_graphs_are_freed_at_once(settings: dict[str, str], digits: Dataset, streams: list[str]) -> None:
    """Not by the collector of cycles, which nobody asks where the GPU's memory is used up."""
    training, step, _ = step_of(digits, **settings)
    for size in (16, 8):
        step._capture(torch.arange(size), None)
    assert len(step._replays) == 2
    gone, lanes = weakref.ref(step), step.lanes
    gc.collect()
    gc.disable()
    try:
        training._step = Step(lanes)
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_recorded_is_computed_step_by_step(digits: Dataset, streams: list[str]) -> None:
    _, step, values = step_of(digits, loss="masked")
    resets = Graph.resets
    step._capture(torch.arange(16), None)
    assert not step._graphs
    assert not step._replays
    assert step.captured.startswith("nothing: test_graphs.py, line ")
    assert step.captured.endswith("operation not permitted when stream is capturing")
    assert (Graph.resets - resets, streams) == (2, ["main"] * 2)
    before = values()
    step(torch.arange(16))
    assert not any(torch.equal(a, b) for a, b in zip(values(), before, strict=True))


class Stream:
    """Stands for a stream: notes for which others it waits, and which is the current one."""

    device = "cuda:0"
    log: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: "Stream") -> None:
        Stream.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        Stream.log.append(f"on {self.name}")

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_lanes_fork_from_the_stream_of_the_step_and_join_it(
    fails: bool, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even after an error, since a recording cannot end before."""
    runs = [RunConfig(limit=64, seed=seed) for seed in range(2)]
    step = Training(runs, digits, torch.device("cpu"), branches=True)._step
    step._streams = [Stream("a"), Stream("b")]  # type: ignore[list-item]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    Stream.log.clear()
    batch = torch.stack([torch.arange(16), torch.arange(16, 32)])
    of_lanes = []
    for lane in step.lanes:
        monkeypatch.setattr(lane, "gradients", lambda batch, views: of_lanes.append(batch.tolist()))
        monkeypatch.setattr(lane.updates, "step", lambda: Stream.log.append("update"))
    if fails:
        monkeypatch.setattr(step.lanes[1], "gradients", lambda batch, views: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step._work(batch, None)
    else:
        step._work(batch, None)
        assert of_lanes == batch.tolist()
    forks = ["a waits for main", "on a", "update", "b waits for main", "on b", *([] if fails else ["update"])]
    assert Stream.log == [*forks, "main waits for a", "main waits for b"]


def test_a_replay_gives_the_gradients_of_all_lanes_to_their_optimizers(digits: Dataset, streams: list[str]) -> None:
    given: dict[str, Any] = {"optimizer": {"waiting": Waiting}}
    plugins = Plugins(given=given)
    runs = [
        RunConfig(
            code=plugins.code_of({"optimizer": "waiting"}), optimizer="waiting", limit=64, lr=lr, weight_decay=0.0
        )
        for lr in (0.1, 0.2)
    ]
    training = Training(runs, digits, torch.device("cpu"), plugins=plugins, branches=True)
    step, batch = training._step, torch.arange(16)
    step._capture(batch, None)
    assert step.captured.startswith("forward and backward pass: ")
    before = [{n: p.detach().clone() for n, p in lane.stack.params.items()} for lane in step.lanes]
    grads = [{n: p.grad for n, p in lane.stack.params.items()} for lane in step.lanes]
    for lane in step.lanes:
        for param in lane.takers:
            param.grad = None
    step._replays[batch.shape](batch, None)
    for run, lane, old, grad in zip(runs, step.lanes, before, grads, strict=True):
        for name, param in lane.stack.params.items():
            torch.testing.assert_close(param.detach(), old[name] - run.lr * grad[name])


def test_memory_that_is_used_up_is_no_reason_against_graphs(
    digits: Dataset, streams: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, step, _ = step_of(digits)
    monkeypatch.setattr(step.lanes[0].updates, "step", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        step._capture(torch.arange(16), None)
    assert streams == ["main"]


def test_lines_that_wait_for_the_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with waits_for_gpu() as lines:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally …)", stacklevel=1)
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("of the user's", stacklevel=1)
    assert [line.partition(" ")[0] for line in lines] == ["test_graphs.py,"]
    assert [str(warning.message) for warning in seen] == ["of the user's"]
    assert modes == ["warn", 0]
