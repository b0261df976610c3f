"""Tables of captured steps, which their first replay fills, and memory that lives as long as a graph."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import interpreter
from devices import Backend, backend_fixture, parameter
from ncollapse.kernels.update import graph_memory
from ncollapse.kernels.update.graph_memory import free_ended, keep_for_graph
from ncollapse.kernels.update.table import UNFILLED, Col, Extras, HyperTable, Lists, Table, code
from update_twins import addresses, like, slot_for

backend = backend_fixture("interpreter", "cuda")


@pytest.mark.parametrize(
    ("backend", "order"),
    [parameter("interpreter", "forwards"), parameter("interpreter", "backwards"), parameter("cuda", "any")],
    indirect=["backend"],
)
@pytest.mark.parametrize("unfilled", ["all", "some"])
def test_a_launch_fills_the_table_of_a_captured_step(
    backend: Backend, order: str, unfilled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; with empty parameters, a missing gradient, runs of several rules, copies and norms."""
    from ncollapse.kernels.update import gpu

    if order == "backwards":
        interpreter.run_backwards(monkeypatch, [])
    device, rules = backend.device, ["adam", "sgd", "lion"]
    row = torch.tensor([[0.05, 0.3, 0.4, 0.9, 0.99, 1e-8]], dtype=torch.float64, device=device)
    sizes = [(3, 5000), (3, 0), (3, 7), (3, 2, 5)]
    params, grads = ([torch.randn(size).to(device) for size in sizes] for _ in range(2))
    seen: list[list[Any]] = []
    for tensors, replayed in ((params, True), ([like(p, device) for p in params], False)):
        extras = Extras(
            copies=[torch.zeros_like(p, dtype=torch.bfloat16) for p in tensors],
            norms=torch.zeros(3, 2, dtype=torch.float64, device=device),
        )
        lists = Lists(tensors, [slot_for("adam", p) for p in tensors], [0] * 4, extras)
        table = Table(lists, torch.float32, HyperTable(row, [], [], [[code(rule) for rule in rules]]), gpu.CHUNK)
        table.point(addresses(lists, [*grads[:2], None, grads[3]]))
        filled = table.tensors.clone()
        if replayed:
            gone = torch.rand(filled.shape) < (1.0 if unfilled == "all" else 0.5)
            table.tensors = torch.where(gone.to(device), UNFILLED, filled)
            table.source = filled.clone() if backend.name == "interpreter" else filled.cpu().pin_memory()
        scratch = gpu.Scratch(table)
        for _ in range(2):
            with interpreter.quiet():
                gpu.launch_update(table, scratch, None, None)
            read = (table.tensors == filled).cpu()
            # Empty parameters have no program; the launch's last one reads what counts their steps.
            assert read[filled[:, Col.NUMEL].cpu() > 0].all()
            assert read[:, [Col.STEP, Col.GRAD, Col.RUN]].all()
            if replayed:
                table.source.fill_(-7)  # nothing is read from there any more
        seen.append([*tensors, *extras.copies, extras.norms])
        seen[-1] += [t for slot in lists.slots for t in (slot.first, slot.second, slot.step)]
        assert [slot.step.item() for slot in lists.slots if slot.step is not None] == [2, 2, 0, 2]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


class Graph:
    """What torch's graphs do with what they keep."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.callbacks: list[Callable[[], None]] = []

    def retain_object(self, held: Any) -> None:
        self.kept.append(held)

    def register_destroy_callback(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def destroy(self) -> None:
        for callback in self.callbacks:
            callback()
        self.kept, self.callbacks = [], []


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Graph:
    graph = Graph()
    monkeypatch.setattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph", lambda: graph, raising=False)
    monkeypatch.setattr(graph_memory, "_ended", [])
    return graph


@pytest.mark.parametrize("until_idle", [False, True])
def test_a_graph_keeps_memory_as_long_as_it_lives(capturing: Graph, until_idle: bool) -> None:
    tensor = torch.ones(3)
    user, address = weakref.ref(tensor), tensor.data_ptr()
    otherwise: list[Any] = []
    keep_for_graph([tensor, None], otherwise, until_idle=until_idle)
    assert otherwise == []
    del tensor
    gc.collect()
    assert user() is None  # what the user has attached to the tensor is not kept
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and torch._C._has_storage(t)]
    memory = [weakref.ref(t) for t in held if t.device.type == "cpu" and t.data_ptr() == address]
    del held
    assert len(memory) == 1
    capturing.destroy()
    assert (memory[0]() is not None) == until_idle  # a replay may still run
    free_ended()
    assert memory[0]() is None


@pytest.mark.parametrize("graph", [None, object()], ids=["not known", "of C++ code"])
def test_where_torch_keeps_nothing_for_a_graph_a_list_does(monkeypatch: pytest.MonkeyPatch, graph: Any) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "get_currently_capturing_graph", lambda: graph, raising=False)
    otherwise: list[Any] = []
    tensor = torch.ones(3)
    keep_for_graph([tensor], otherwise)
    assert otherwise[0][0].data_ptr() == tensor.data_ptr()
